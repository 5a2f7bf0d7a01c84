"""Sweeps as data: what was scored of each combination, and the file that an interrupted sweep continues from."""

from __future__ import annotations

import json
import os
from typing import Any, Literal

from pydantic import Field, ValidationError

from mergekit_snrf.errors import SnrfError, invalid
from mergekit_snrf.evidence.items import Items
from mergekit_snrf.evidence.study_results import Study
from mergekit_snrf.files.reading import DATA_BYTES, read_bytes
from mergekit_snrf.files.settings import Settings
from mergekit_snrf.files.shown import Plotted
from mergekit_snrf.files.writing import write_text


class ScoredRow(Settings):
    """What one row of a sweep scored; ``settings`` are those of its row."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)
    scores: dict[str, Items]


class Sweep(Plotted, Settings):
    """A sweep, whether complete or interrupted.

    Attributes:
        key: sha256 of what the scores depend on; an interrupted sweep continues only with the same.
        rows: what was scored.
        best: name of the chosen row; None until all rows are scored.
        recipe: the content of the best recipe.
        study: the rows as a comparison with the best one as its claim.
    """

    format: Literal["snrf-sweep"] = "snrf-sweep"
    version: Literal[1] = 1
    key: str
    rows: tuple[ScoredRow, ...] = ()
    best: str | None = None
    recipe: dict[str, Any] | None = None
    study: Study | None = None

    def __repr__(self) -> str:
        return f"<Sweep: {len(self.rows)} rows, {'interrupted' if self.best is None else f'best is {self.best}'}>"


def read_sweep(path: str | os.PathLike[str], key: str) -> Sweep:
    """Return the sweep of a file, or a new one if there is no file.

    Raises:
        SnrfError: it is not a sweep, or one of another recipe, evaluation or model.
    """
    if not os.path.exists(path):
        return Sweep(key=key)
    try:
        found = Sweep.model_validate_json(read_bytes(path, DATA_BYTES))
    except ValidationError as error:
        raise invalid(path, error.errors(), remedy="choose another file, or remove it") from None
    if found.key != key:
        what = "is the sweep of another recipe, evaluation or model"
        raise SnrfError(path, what, "choose another file, or remove it")
    return found


def write_sweep(path: str | os.PathLike[str], sweep: Sweep) -> None:
    """Write a sweep as JSON, as a whole or not at all."""
    write_text(path, json.dumps(sweep.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
