"""Sweeps of a recipe's parameters: one loaded target is edited to every combination and back, no model is written."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, ValidationError

from mergekit_snrf.errors import SnrfError, did_you_mean, first_line, invalid
from mergekit_snrf.evidence.evaluation import Evaluation
from mergekit_snrf.evidence.items import Items, Role, Scores
from mergekit_snrf.evidence.results import Study
from mergekit_snrf.evidence.study import Row, Setup, build_study, score
from mergekit_snrf.evidence.sweep import Curve
from mergekit_snrf.files.reading import DATA_BYTES, read_bytes
from mergekit_snrf.files.settings import Settings
from mergekit_snrf.files.writing import write_text
from mergekit_snrf.merge.parameters import SPEC

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PARAMETERS = tuple(parameter.name for parameter in SPEC.parameters)
_STRENGTHS = ("keep", "beta")
_MOST = 1000


@dataclass(frozen=True)
class Combination:
    """One value for every swept parameter, and the recipe with them."""

    values: Mapping[str, Any]
    recipe: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of its row, such as ``beta 0.5, rank 4``."""
        return _named(self.values)


class ScoredRow(Settings):
    """What one row of a sweep scored; ``settings`` are those of its row."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)
    scores: dict[str, Items]


class Sweep(Settings):
    """A sweep, whether complete or interrupted.

    Attributes:
        key: sha256 of what the scores depend on; an interrupted sweep continues only with the same.
        rows: what was scored.
        best: name of the chosen row; None until all rows are scored.
        study: the rows as a comparison with the best one as its claim.
    """

    format: Literal["snrf-sweep"] = "snrf-sweep"
    version: Literal[1] = 1
    key: str
    rows: tuple[ScoredRow, ...] = ()
    best: str | None = None
    study: Study | None = None


def combinations(recipe: Mapping[str, Any], settings: Sequence[str]) -> list[Combination]:
    """Return the recipe with every combination of the values, the last parameter changing fastest.

    Args:
        recipe: the parsed content of a recipe file.
        settings: such as ``beta=0.25,0.5``; values are written as in YAML.

    Raises:
        SnrfError: a parameter is unknown, named twice or without values, or there are too many combinations.
    """
    swept: dict[str, list[Any]] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in _PARAMETERS:
            raise SnrfError(None, f"{name!r} is not a parameter", did_you_mean(name, _PARAMETERS), field="set")
        try:
            values = yaml.safe_load(f"[{text}]")
        except (yaml.YAMLError, ValueError) as error:
            raise SnrfError(None, f"{setting!r} ({first_line(error)})", "write beta=0.25,0.5", field="set") from None
        if not values or name in swept:
            what = f"{setting!r} has no values" if not values else f"{name} is set twice"
            raise SnrfError(None, what, f"write {name}=VALUE,VALUE once", field="set")
        swept[name] = values
    found = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    names = [_named(values) for values in found]
    if len(set(names)) < len(names) or len(found) > _MOST:
        what = f"makes {len(found)} combinations, more than {_MOST}" if len(found) > _MOST else "repeats a value"
        raise SnrfError(None, what, "leave values out", field="set")
    return [Combination(values, _with(recipe, values)) for values in found]


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:g}" if type(value) is float else f"{name} {value}" for name, value in values.items()
    )


def _with(recipe: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with other values, where it has the parameter already or else at its top level."""
    changed: dict[str, Any] = copy.deepcopy(dict(recipe))
    models = changed.get("models")
    entries = [entry for entry in models if isinstance(entry, dict)] if isinstance(models, list) else []
    for name, value in values.items():
        own = [entry["parameters"] for entry in entries if name in (entry.get("parameters") or {})]
        for place in own or [changed.setdefault("parameters", {})]:
            place[name] = value
    return changed


def curves(found: Sequence[Combination]) -> dict[str, tuple[Curve, float]]:
    """Return, by name, the curve that a combination is a point of, and its strength.

    The strength is ``keep`` or else ``beta``; combinations that differ in nothing else are one curve. Without a
    swept strength there are none.
    """
    key = next((key for key in _STRENGTHS if found and key in found[0].values), None)
    if key is None or not all(isinstance(one.values[key], int | float) for one in found):
        return {}
    known: dict[str, Curve] = {}
    points = {}
    for one in found:
        others = _named({name: value for name, value in one.values.items() if name != key})
        subject = f"the merge with {others}" if others else "the recipe's merge"
        curve = known.setdefault(others, Curve(others or "recipe", key, subject))
        points[one.name] = (curve, float(one.values[key]))
    return points


def run_sweep(
    rows: Sequence[Row],
    model: PreTrainedModel,
    processor: Any,
    evaluation: Evaluation,
    started: Sweep,
    visit: Callable[[Sweep], None],
) -> dict[str, list[Scores]]:
    """Score every row that ``started`` does not have with the same settings; ``visit`` gets the sweep after each.

    Raises:
        SnrfError: an edit does not fit the model, the evaluation fails, or its items changed since the start.
    """
    settings = {row.name: dict(row.settings) for row in rows}
    usable = tuple(row for row in started.rows if row.settings == settings.get(row.name))
    sweep = started.model_copy(update={"rows": usable})
    scores: dict[str, list[Scores]] = {row.name: [row.scores] for row in usable}
    like = next((found[0] for found in scores.values()), None)
    for row in rows:
        if row.name in scores:
            continue
        scores[row.name] = list(score(row, model, processor, evaluation, like))
        like = like or scores[row.name][0]
        scored = ScoredRow(name=row.name, settings=dict(row.settings), scores=dict(scores[row.name][0]))
        sweep = sweep.model_copy(update={"rows": (*sweep.rows, scored)})
        visit(sweep)
    return scores


def best_row(
    names: Sequence[str], scores: Mapping[str, Sequence[Scores]], roles: Mapping[str, Role], reference: str, drop: float
) -> tuple[str, bool]:
    """Return the row with the largest mean gain among those that keep enough, and whether there is such a row.

    Args:
        names: of the rows to choose from.
        drop: how far each metric to keep may fall below the reference, in the unit of the tables.
    """

    def change(name: str, role: Role) -> list[float]:
        metrics = [metric for metric in scores[reference][0] if roles.get(metric, "gain") == role]
        pairs = [[scores[one][0][metric].mean for one in (name, reference)] for metric in metrics]
        return [_scale(metric, scores) * (own - before) for metric, (own, before) in zip(metrics, pairs, strict=True)]

    kept = [name for name in names if min(change(name, "keep"), default=0.0) >= -drop - 1e-9]
    if kept:
        return max(kept, key=lambda name: sum(change(name, "gain"))), True
    return max(names, key=lambda name: min(change(name, "keep"), default=0.0)), False


def _scale(metric: str, scores: Mapping[str, Sequence[Scores]]) -> float:
    """Return 100 for a metric whose means are shares, which tables show in points."""
    return 100.0 if all(0 <= one[metric].mean <= 1 for draws in scores.values() for one in draws) else 1.0


def swept_study(
    setup: Setup,
    rows: Sequence[Row],
    scores: Mapping[str, Sequence[Scores]],
    roles: Mapping[str, Role],
    best: str,
    tried: int,
) -> Study:
    """Return the rows as a comparison whose claim is the best of the ``tried`` ones, and say that it was chosen."""
    claimed = [replace(row, role="claim") if row.name == best else row for row in rows]
    study = build_study(setup, claimed, scores, roles)
    chosen = (
        f"{best} was chosen among {tried} combinations on these items, which makes it look better than it is: "
        f"check it on other items before you rely on it."
    )
    return study.model_copy(update={"verdict": [*study.verdict, chosen]})


def sweep_key(content: Mapping[str, Any]) -> str:
    """Return the sha256 of what the scores of a sweep depend on."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


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
