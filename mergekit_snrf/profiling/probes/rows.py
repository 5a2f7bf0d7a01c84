"""The rows of a data set: the draw, their text, answers and images, and the rows that cannot be used."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_snrf.errors import SnrfError, did_you_mean, first_line, os_reason
from mergekit_snrf.files.reading import open_regular
from mergekit_snrf.profiling.probes.conversation import Turn, is_conversation, read_conversation
from mergekit_snrf.profiling.probes.images import decode, image_folders, read_image
from mergekit_snrf.profiling.probes.source import DATA_SUFFIXES, IMAGE, ProbeSource, RowError, template_fields

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

log = logging.getLogger(__name__)

BAD_SHARE = 0.05
"""A larger share of bad rows is an error."""

_SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One usable row of a data set.

    Attributes:
        number: of the row in its split, from 0.
        fields: the text of the question's column and of every column that the template names.
        question: empty if the template makes the whole prompt.
        turns: role and text of every message before the answer, where the column holds a conversation.
        images: sha256 of each image, as encoded in the data set.
        answer: the text of the answer's column; None where the model generates it.
    """

    number: int
    fields: Mapping[str, str]
    question: str = ""
    images: tuple[str, ...] = ()
    answer: str | None = None
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Rows:
    """The rows that were drawn from a data set, by number, and why others of them cannot be used."""

    source: ProbeSource
    rows: tuple[Row, ...] = field(repr=False)
    bad: Mapping[int, RowError] = field(default_factory=dict, repr=False)
    _dataset: datasets.Dataset | None = field(default=None, repr=False, compare=False)
    _folder: Path | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, row: Row) -> list[Image]:
        """Return the decoded images of a row: upright by their EXIF orientation, RGB, in their own size."""
        if not row.images or self._dataset is None:
            return []
        values = self._dataset[row.number]
        try:
            entries = _image_entries(values, self.source)
            return [decode(read_image(entry, image_folders(self._folder))) for entry in entries]
        except RowError as error:
            raise SnrfError(self.source.dataset, f"row {row.number}: {error.what}", field="images") from None


def load_rows(source: ProbeSource, *, answers: bool, folder: Path | None = None, behind: int = 0) -> Rows:
    """Return the rows of a data set that become probes.

    With ``limit`` these are the first ``limit`` of a permutation of all rows that depends only on ``seed`` and on the
    number of rows (numpy's legacy MT19937 generator, whose stream never changes), so a smaller limit gives a subset of
    the rows of a larger one. Bad rows are not replaced by others. ``SnrfError``: the data set cannot be read, a column
    does not exist, or more than 5 % of the rows are bad.

    Args:
        answers: read the column of the answers.
        folder: where a relative data file is looked for after the working folder.
        behind: as many rows of the permutation are skipped, those that a draw of this limit took.
    """
    dataset, images_folder = _open(source, folder)
    columns = _check_columns(source, answers, dataset)
    numbers = _draw(len(dataset), source, behind)
    rows: list[Row] = []
    bad: dict[int, RowError] = {}
    text = dataset.select_columns(list(dict.fromkeys(columns.values())))
    for number in numbers:
        try:
            rows.append(_read_row(number, text, source, columns, images_folder))
        except RowError as error:
            bad[number] = error
    report_bad(source.dataset, bad, len(numbers))
    return Rows(source, tuple(rows), bad, dataset, images_folder)


def count_rows(source: ProbeSource, folder: Path | None = None) -> int:
    """Return how many rows a data set has."""
    return len(_open(source, folder)[0])


def column_names(dataset: str) -> list[str]:
    """Return the columns of a data set."""
    return list(_open(ProbeSource(dataset=dataset, template="{column}"), None)[0].column_names)


def report_bad(
    name: str, bad: Mapping[int, RowError], total: int, *, before: Mapping[int, RowError] | None = None
) -> None:
    """Log the rows of a data set that were found bad now; those ``before`` were logged.

    ``SnrfError``: more than 5 % of the ``total`` are bad; it shows the first few, or the one reason that all share.
    """
    if total == 0:
        raise SnrfError(name, "has no rows", "use a data set with at least one row", field="dataset")
    every = {**(before or {}), **bad}
    errors = list(every.values())
    if len(errors) == total > 1 and len({error.what for error in errors}) == 1:
        what = f"none of the {total} rows can be used, all for the same reason: {errors[0].what}"
        raise SnrfError(errors[0].where or name, what, errors[0].remedy, field=errors[0].field)
    if len(errors) > BAD_SHARE * total:
        shown = "; ".join(f"row {number}: {error.what}" for number, error in list(every.items())[:_SHOWN])
        what = f"{len(errors)} of {total} rows cannot be used ({shown}{'; ...' if len(errors) > _SHOWN else ''})"
        (field, remedy), _ = Counter((error.field, error.remedy) for error in errors).most_common(1)[0]
        raise SnrfError(name, what, remedy or "correct the data set, at most 5 % may be bad", field=field)
    for number, error in bad.items():
        log.warning("%s: row %d: %s; left out", name, number, error.what)


def _open(source: ProbeSource, folder: Path | None) -> tuple[datasets.Dataset, Path | None]:
    """Return the split with images left encoded, and the local folder of a local data set."""
    try:
        import datasets
    except ImportError:
        raise SnrfError(None, "probes need the package 'datasets'", "pip install 'mergekit-snrf[profile]'") from None
    place, options, images_folder = _place(source, folder)
    try:
        loaded = datasets.load_dataset(place, **options)
    except StopIteration:
        raise SnrfError(source.dataset, "is empty", "use a file with at least one row", field="dataset") from None
    except (datasets.exceptions.DatasetsError, OSError, ValueError, TypeError, RuntimeError) as error:
        remedy = "correct it" if images_folder else "check name, config, split, network and login (hf auth login)"
        reason = first_line(error.__cause__ or error)
        raise SnrfError(source.dataset, f"cannot be read as a data set ({reason})", remedy, field="dataset") from None
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) != 1:
            raise SnrfError(source.dataset, "has several splits", f"use one of {', '.join(loaded)}", field="split")
        loaded = next(iter(loaded.values()))
    for name, feature in loaded.features.items():
        encoded = _left_encoded(feature)
        if encoded is not feature:
            loaded = loaded.cast_column(name, encoded)
    return loaded, images_folder


def _place(source: ProbeSource, folder: Path | None) -> tuple[str, dict[str, Any], Path | None]:
    """Return the arguments of ``load_dataset``, and the folder of a local data set."""
    path = Path(os.path.expanduser(source.dataset))
    try:
        if not os.path.exists(path) and folder is not None and os.path.exists(folder / path):
            path = folder / path
        is_file, is_folder = os.path.exists(path) and not os.path.isdir(path), os.path.isdir(path)
    except (OSError, ValueError) as error:
        raise SnrfError(source.dataset, f"cannot be read ({os_reason(error)})", field="dataset") from None
    options: dict[str, Any] = {"name": source.config, "split": source.split, "revision": source.revision}
    if is_folder:
        return str(path), options, path.absolute()
    if is_file:
        builder = DATA_SUFFIXES.get(path.suffix)
        if builder is None or not os.path.isfile(path):
            what = "is not a data file"
            remedy = f"use a file that ends in one of {', '.join(DATA_SUFFIXES)}"
            raise SnrfError(source.dataset, what, remedy, field="dataset")
        with open_regular(path) as file:
            # A text without line breaks, such as a sparse file, would be read into memory as a whole.
            if path.suffix != ".parquet" and b"\0" in file.read(2**16):
                raise SnrfError(source.dataset, "is not text", "get the file again", field="dataset")
        for key in ("config", "revision"):
            if getattr(source, key) is not None:
                raise SnrfError(source.dataset, "is only for data sets on the hub", "remove it", field=key)
        split = source.split or "train"
        files = {split.split("[")[0]: str(path.absolute())}
        return builder, {"split": split, "data_files": files}, path.absolute().parent
    if path.suffix in {*DATA_SUFFIXES, ".txt", ".tsv", ".gz", ".zip"} or source.dataset.startswith(("/", ".", "~")):
        raise SnrfError(source.dataset, "does not exist", "correct the path", field="dataset")
    return source.dataset, options, None


def _left_encoded(feature: Any) -> Any:
    # Images are decoded later, row by row: one damaged image must not cost the whole data set.
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(getattr(feature, "feature", None), datasets.Image):
        return type(feature)(datasets.Image(decode=False))
    return feature


def _check_columns(source: ProbeSource, answers: bool, dataset: datasets.Dataset) -> dict[str, str]:
    """Return the columns to read, by the field that names each."""
    if answers and source.answer is None:
        raise SnrfError(source.dataset, "names no column with the answers", "set it", field="answer")
    wanted = {"question": source.question, "answer": source.answer if answers else None}
    columns = {key: column for key, column in wanted.items() if column is not None}
    columns |= {f"images {name}": name for name in source.image_columns}
    columns |= {f"template {name}": name for name in template_fields(source.template or "")}
    for key, column in columns.items():
        if column not in dataset.column_names:
            remedy = did_you_mean(column, dataset.column_names, "the columns are")
            raise SnrfError(source.dataset, f"has no column {column!r}", remedy, field=key.split()[0])
    return columns


def _draw(rows: int, source: ProbeSource, behind: int) -> list[int]:
    if not behind and (source.limit is None or source.limit >= rows):
        return list(range(rows))
    permutation = np.random.RandomState([source.seed]).permutation(rows)
    end = rows if source.limit is None else behind + source.limit
    return sorted(int(number) for number in permutation[behind:end])


def _read_row(
    number: int, dataset: datasets.Dataset, source: ProbeSource, columns: Mapping[str, str], folder: Path | None
) -> Row:
    try:
        values = dataset[number]
    except UnicodeDecodeError as error:
        raise RowError(None, f"is not UTF-8 text ({first_line(error)})", "convert the file to UTF-8") from None
    images = _read_images(values, source, folder) if source.image_columns else ()
    turns: tuple[Turn, ...] = ()
    reply, answer = None, columns.get("answer")
    if source.question is not None and is_conversation(values[source.question]):
        turns, reply = read_conversation(values[source.question], source.question)
        if not images and any(IMAGE in text for _, text in turns):
            raise RowError(None, f"the conversation has {IMAGE}, but no column of images is named", field="images")
        values = {**values, source.question: turns[-1][1]}
    shown = [column for key, column in columns.items() if not key.startswith(("images", "answer"))]
    fields = {column: _text(values[column], column) for column in shown}
    question = fields[source.question] if source.question is not None else ""
    if answer is not None:
        answer = _text(reply if turns and answer == source.question else values[answer], answer)
    return Row(number, fields, question, images, answer, turns)


def _image_entries(values: Mapping[str, Any], source: ProbeSource) -> list[Any]:
    return [entry for column in source.image_columns for entry in _entries(values[column])]


def _read_images(values: Mapping[str, Any], source: ProbeSource, folder: Path | None) -> tuple[str, ...]:
    entries = _image_entries(values, source)
    if not entries:
        raise RowError(None, f"no image in column {', '.join(map(repr, source.image_columns))}")
    digests = []
    for entry in entries:
        content = read_image(entry, image_folders(folder))
        decode(content)
        digests.append(hashlib.sha256(content).hexdigest())
    return tuple(digests)


def _text(value: Any, column: str) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)) or not str(value).strip():
        raise RowError(None, f"column {column!r} is empty")
    if not isinstance(value, (str, int, float)):
        raise RowError(None, f"column {column!r} holds {type(value).__name__}, not text")
    return str(value)


def _entries(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
