"""Rows of a dataset that become probes: questions, answers and images, and the rows that cannot be used."""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.profiling.probes.template import template_fields
from mergekit_snrf.profiling.settings import DATA_SUFFIXES, ProbesConfig, ProfileConfig, SideConfig, answer_column

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

log = logging.getLogger(__name__)

BAD_SHARE = 0.05
"""More bad rows than this share of all is an error."""

_SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One usable row of a dataset.

    Attributes:
        number: of the row in its split, from 0.
        fields: the text of the question's column and of every column that the template names.
        question: empty if the side's template makes the whole prompt.
        images: sha256 of each image, as encoded in the dataset.
        answer: the text of the answer's column, or None where the model generates it.
    """

    number: int
    fields: Mapping[str, str]
    question: str = ""
    images: tuple[str, ...] = ()
    answer: str | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    number: int
    reason: str

    def __str__(self) -> str:
        return f"row {self.number}: {self.reason}"


@dataclass(frozen=True)
class Rows:
    """The rows that were taken from a dataset, by number.

    Attributes:
        name: of the dataset, for messages.
        bad: rows that were taken but cannot be used.
    """

    name: str
    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...] = ()
    _dataset: datasets.Dataset | None = field(default=None, repr=False, compare=False)
    _images: str | None = None
    _folder: Path | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, row: Row) -> list[Image]:
        """Decode the images of a row: upright by their EXIF orientation, RGB, in their own size.

        Raises:
            SnrfError: an image that could be read before cannot any more.
        """
        if not row.images or self._dataset is None or self._images is None:
            return []
        value = self._dataset[row.number][self._images]
        try:
            return [_decode(_encoded(entry, self._folder)) for entry in _entries(value)]
        except _RowError as error:
            raise SnrfError(f"{self.name}: row {row.number}: {error}") from None


def load_rows(side: SideConfig, config: ProfileConfig, folder: Path | None = None) -> Rows:
    """Take the rows of one side's dataset that become its probes.

    With ``limit``, the rows are the first ``limit`` of a permutation of all rows that depends on ``seed`` and on the
    number of rows only (numpy's legacy MT19937 generator, whose stream never changes), so a smaller limit takes a
    subset of the rows of a larger one. Without, all rows are taken. Bad rows are not replaced by others.

    Args:
        side: the model's side of profile.yml.
        config: for limit, seed and the source of answers.
        folder: where a relative data file is looked for after the working folder.

    Raises:
        SnrfError: the dataset cannot be read, a column does not exist, or more than 5 % of the rows are bad.
    """
    probes = side.probes
    dataset, images_folder = _open(probes, folder)
    columns = _check_columns(side, config, dataset)
    numbers = _draw(len(dataset), config)
    rows: list[Row] = []
    bad: list[BadRow] = []
    text = dataset.select_columns(list(dict.fromkeys(columns.values())))
    for number in numbers:
        try:
            rows.append(_read_row(number, text[number], side, columns, images_folder))
        except _RowError as error:
            bad.append(BadRow(number, str(error)))
    loaded = Rows(probes.dataset, tuple(rows), tuple(bad), dataset, probes.images, images_folder)
    report_bad(loaded.name, loaded.bad, len(numbers))
    return loaded


def report_bad(name: str, bad: Sequence[BadRow], total: int, *, before: Sequence[BadRow] = ()) -> None:
    """Log every bad row with its number and reason.

    Args:
        name: of the dataset.
        bad: rows that turned out bad now.
        total: rows that were taken.
        before: rows that were bad already, and are logged.

    Raises:
        SnrfError: more than 5 % of ``total`` rows are bad, or none is left; the message shows the first few.
    """
    every = [*before, *bad]
    if len(every) > BAD_SHARE * total or total == 0:
        shown = "; ".join(map(str, every[:_SHOWN])) + ("; ..." if len(every) > _SHOWN else "")
        what = f"{len(every)} of {total} rows cannot be used ({shown})" if total else "has no rows"
        raise SnrfError(f"{name}: {what}; mend the dataset or the keys of profile.yml, at most 5 % may be bad")
    for row in bad:
        log.warning("%s: %s; left out", name, row)


class _RowError(Exception):
    """Why a row cannot be used."""


def _open(probes: ProbesConfig, folder: Path | None) -> tuple[datasets.Dataset, Path | None]:
    """Return the split with images left encoded, and the local folder that image paths are relative to."""
    try:
        import datasets
    except ImportError:
        raise SnrfError("probes need the package 'datasets'; pip install 'mergekit-snrf[profile]'") from None
    path = Path(probes.dataset).expanduser()
    if not path.exists() and folder is not None and (folder / path).exists():
        path = folder / path
    arguments: dict[str, Any] = {"split": probes.split, "revision": probes.revision}
    images_folder = None
    if path.is_file():
        builder = DATA_SUFFIXES.get(path.suffix)
        if builder is None:
            raise SnrfError(f"{path}: a data file must end in one of {', '.join(DATA_SUFFIXES)}")
        if probes.config is not None or probes.revision is not None:
            raise SnrfError(f"{path}: config and revision are for datasets on the hub; remove them for a local file")
        images_folder = path.absolute().parent
        split = probes.split or "train"
        arguments = {"split": split, "data_files": {split.split("[")[0]: str(path.absolute())}}
        place, config = builder, None
    elif path.is_dir():
        place, config, images_folder = str(path), probes.config, path.absolute()
    elif path.suffix in {*DATA_SUFFIXES, ".txt", ".tsv", ".gz", ".zip"} or probes.dataset.startswith(("/", ".", "~")):
        raise SnrfError(f"{probes.dataset}: no such file; correct the path of probes.dataset")
    else:
        place, config = probes.dataset, probes.config
    try:
        loaded = datasets.load_dataset(place, config, **arguments)
    except StopIteration:
        raise SnrfError(f"{probes.dataset}: is empty; give a file with at least one row") from None
    except (datasets.exceptions.DatasetsError, OSError, ValueError, TypeError, RuntimeError) as error:
        reason = _first_line(error.__cause__ or error)
        remedy = "mend it" if images_folder else "check name, config, split, network and login (hf auth login)"
        raise SnrfError(f"{probes.dataset}: cannot be read as a dataset ({reason}); {remedy}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) != 1:
            raise SnrfError(f"{probes.dataset}: has the splits {', '.join(loaded)}; choose one with probes.split")
        loaded = next(iter(loaded.values()))
    for name, feature in loaded.features.items():
        encoded = _left_encoded(feature)
        if encoded is not feature:
            loaded = loaded.cast_column(name, encoded)
    return loaded, images_folder


def _left_encoded(feature: Any) -> Any:
    # Decoding is put off: one damaged image must cost one row, not the dataset.
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(getattr(feature, "feature", None), datasets.Image):
        return type(feature)(datasets.Image(decode=False))
    return feature


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _check_columns(side: SideConfig, config: ProfileConfig, dataset: datasets.Dataset) -> dict[str, str]:
    """Return key -> column of every column that is read."""
    probes = side.probes
    wanted = {"question": probes.question, "images": probes.images, "answer": answer_column(side, config)}
    columns = {f"probes.{key}": column for key, column in wanted.items() if column is not None}
    if side.template is not None:
        columns |= {f"template {{{name}}}": name for name in template_fields(side.template)}
    if not columns:
        raise SnrfError(
            f"{probes.dataset}: no column is read, so all probes would be the same; name {{a column}} in the template "
            f"{side.template!r}, or set probes.question"
        )
    for key, column in columns.items():
        if column not in dataset.column_names:
            raise SnrfError(
                f"{probes.dataset}: has no column {column!r} ({key}); the columns are {', '.join(dataset.column_names)}"
            )
    return columns


def _draw(rows: int, config: ProfileConfig) -> list[int]:
    if config.limit is None or config.limit >= rows:
        return list(range(rows))
    permutation = np.random.RandomState([config.seed]).permutation(rows)
    return sorted(int(number) for number in permutation[: config.limit])


def _read_row(
    number: int, values: Mapping[str, Any], side: SideConfig, columns: Mapping[str, str], folder: Path | None
) -> Row:
    fields = {
        column: _text(values[column], column)
        for key, column in columns.items()
        if key not in ("probes.images", "probes.answer")
    }
    images: tuple[str, ...] = ()
    if side.probes.images is not None:
        entries = _entries(values[side.probes.images])
        if not entries:
            raise _RowError(f"no image in column {side.probes.images!r}")
        encoded = [_encoded(entry, folder) for entry in entries]
        for content in encoded:
            _decode(content)
        images = tuple(hashlib.sha256(content).hexdigest() for content in encoded)
    column = columns.get("probes.answer")
    answer = _text(values[column], column) if column is not None else None
    question = fields[side.probes.question] if side.probes.question is not None else ""
    return Row(number, fields, question, images, answer)


def _text(value: Any, column: str) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise _RowError(f"column {column!r} is empty")
    if not isinstance(value, (str, int, float)):
        raise _RowError(f"column {column!r} holds {type(value).__name__}, not text")
    text = str(value)
    if not text.strip():
        raise _RowError(f"column {column!r} is empty")
    return text


def _entries(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _encoded(entry: Any, folder: Path | None) -> bytes:
    """Return an image file's bytes from what a dataset holds: bytes, a path, or both in a mapping."""
    if isinstance(entry, Mapping):
        entry = entry.get("bytes") if entry.get("bytes") is not None else entry.get("path")
    if isinstance(entry, (bytes, bytearray, memoryview)):
        return bytes(entry)
    if not isinstance(entry, str) or not entry:
        what = "is missing" if not entry else f"is {type(entry).__name__}, not a path or bytes"
        raise _RowError(f"an image {what}")
    path = Path(entry)
    if not path.is_absolute():
        if folder is None:
            raise _RowError(f"image {entry!r} is a relative path, which only a local data file can have")
        path = folder / path
    try:
        return path.read_bytes()
    except OSError as error:
        raise _RowError(f"image {str(path)!r} cannot be read ({error.strerror or error})") from None


def _decode(content: bytes) -> Image:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise SnrfError("image probes need the package 'pillow'; pip install 'mergekit-snrf[profile]'") from None
    try:
        with Image.open(io.BytesIO(content)) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _RowError(f"an image of {len(content)} bytes cannot be decoded ({_first_line(error)})") from None
