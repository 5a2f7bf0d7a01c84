"""What readers share: they find the files of every task in a folder, and turn them into items."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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


def files_in(folder: Path) -> list[Path]:
    """Return all files below a folder.

    Raises:
        SnrfError: it is not a folder, or has too many files.
    """
    if not os.path.isdir(folder):
        raise SnrfError(folder, "is not a folder", "give the folder that the evaluation wrote")
    files: list[Path] = []
    for place, _, names in os.walk(folder):
        files += [Path(place, name) for name in names]
        if len(files) > _MAX_FILES:
            raise SnrfError(folder, f"has more than {_MAX_FILES} files", "give a model's folder")
    return sorted(files)
