"""Tables of untrusted xlsx, tsv and json files, read with limits."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from mergekit_snrf.errors import SnrfError, first_line
from mergekit_snrf.evidence.readers.base import MAX_METRICS, MAX_SAMPLES
from mergekit_snrf.files.reading import DATA_BYTES, load_json, open_regular, read_text

SUFFIXES = (".xlsx", ".tsv", ".json")
_UNPACKED_BYTES = 1_000_000_000
_DAMAGED = "the file is damaged, get it again"


def columns_of(path: Path) -> list[str]:
    """Return the names of a table's columns; of anything else none.

    Raises:
        SnrfError: the file cannot be read, is too large, or damaged.
    """
    with _table(path) as rows:
        return list(next(rows, {}))


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """Return the rows of a table by column.

    Raises:
        SnrfError: the file cannot be read, is too large, damaged, or has no rows.
    """
    with _table(path) as rows:
        found = list(islice(rows, MAX_SAMPLES + 1))
    if len(found) > MAX_SAMPLES:
        raise SnrfError(path, f"the file has more than {MAX_SAMPLES} samples", "give fewer samples")
    if not found:
        raise SnrfError(path, "has no samples", "give a table with rows")
    return found


@contextmanager
def _table(path: Path) -> Iterator[Iterator[Mapping[str, Any]]]:
    if path.suffix == ".xlsx":
        with _sheet(path) as cells:
            yield _by_column(path, cells)
    elif path.suffix == ".tsv":
        text = io.StringIO(read_text(path, DATA_BYTES), newline="")
        yield _by_column(path, _csv(path, text))
    else:
        content = load_json(path)
        records = content if isinstance(content, list) else []
        yield (record for record in records if isinstance(record, dict))


def _csv(path: Path, text: io.StringIO) -> Iterator[list[str]]:
    try:
        yield from csv.reader(text, delimiter="\t", strict=True)
    except csv.Error as error:
        raise SnrfError(path, f"not a table of tabs ({first_line(error)})", _DAMAGED) from None


def _by_column(path: Path, cells: Iterator[Any]) -> Iterator[Mapping[str, Any]]:
    header = [str(name) for name in next(cells, ())]
    if len(header) > MAX_METRICS:
        raise SnrfError(path, f"has {len(header)} columns, more than the limit of {MAX_METRICS}", _DAMAGED)
    yield from (dict(zip(header, row, strict=False)) for row in cells if any(cell is not None for cell in row))


@contextmanager
def _sheet(path: Path) -> Iterator[Iterator[Any]]:
    """Yield the rows of an xlsx file's first sheet; its parts are unpacked only if they are of a sane size together."""
    try:
        from openpyxl import load_workbook
    except ModuleNotFoundError:
        remedy = "pip install 'mergekit-snrf[analysis]', or write tables with PRED_FORMAT=tsv"
        raise SnrfError(path, "reading .xlsx needs the package openpyxl", remedy) from None

    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as parts:
                size = sum(part.file_size for part in parts.infolist())
            if size > _UNPACKED_BYTES:
                raise SnrfError(path, f"unpacks to {size} bytes, more than the limit of {_UNPACKED_BYTES}", _DAMAGED)
            book = load_workbook(file, read_only=True, data_only=True, keep_links=False)
            yield book.worksheets[0].iter_rows(max_row=MAX_SAMPLES + 2, values_only=True)
        except SnrfError:
            raise
        except Exception as error:
            # Openpyxl raises whatever the parts of a damaged file make its parser raise.
            raise SnrfError(path, f"not a readable xlsx file ({first_line(error)})", _DAMAGED) from None
