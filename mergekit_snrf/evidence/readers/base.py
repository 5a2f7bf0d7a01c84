"""What a reader does: find the files of every task in a folder, and turn them into items."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.items import Items

_MAX_FILES = 10_000
MAX_SAMPLES = 100_000
MAX_METRICS = 100
MAX_NAME = 200


class UnknownMetricError(Exception):
    """Why a metric is left out."""


@dataclass(frozen=True)
class Found:
    """The files of one task in a folder, and what to say about the choice of them."""

    paths: Sequence[Path]
    note: str = ""


@dataclass(frozen=True)
class Task:
    """What one model scored on one task.

    Attributes:
        items: by metric, with ids.
        left_out: metrics without items, and why.
        evidence: by sample, what must be equal between models where both have it: its hash, its answer.
    """

    items: Mapping[str, Items] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    evidence: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)


class Reader(Protocol):
    """Reads the folders of one tool; ``remedy`` says how to make the tool write samples."""

    @property
    def name(self) -> str:
        """Of the tool."""

    @property
    def remedy(self) -> str:
        """How to make the tool write samples."""

    def find(self, files: Sequence[Path]) -> dict[str, Found]:
        """Return the files of every task among all files of a folder; none: the tool wrote no samples here.

        Raises:
            SnrfError: the folder holds results of several models.
        """

    def wrote(self, file: Path) -> bool:
        """Return whether the tool writes such a file also without samples."""

    def read(self, task: str, paths: Sequence[Path]) -> Task:
        """Return the items of a task.

        Raises:
            SnrfError: a file is damaged or too large.
        """


def files_in(folder: Path) -> list[Path]:
    """Return all files below a folder.

    Raises:
        SnrfError: it is not a folder, or has too many files.
    """
    if not os.path.isdir(folder):
        raise SnrfError(folder, "is not a folder", "give the folder that the evaluation wrote")
    files: list[Path] = []
    for part in _walk(folder):
        files += part
        if len(files) > _MAX_FILES:
            raise SnrfError(folder, f"has more than {_MAX_FILES} files", "give a model's folder")
    return sorted(files)


def _walk(folder: Path) -> Iterator[list[Path]]:
    for place, _, names in os.walk(folder):
        yield [Path(place, name) for name in names]
