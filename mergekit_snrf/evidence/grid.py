"""The grid of a sweep: the combinations of a recipe's parameters, their curves, and the best of them."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from mergekit_snrf.errors import SnrfError, did_you_mean
from mergekit_snrf.evidence.items import Role, Scores
from mergekit_snrf.evidence.sweep import Curve
from mergekit_snrf.files.reading import load_yaml, parse_yaml
from mergekit_snrf.files.references import sha256
from mergekit_snrf.merge.recipe import SPEC
from mergekit_snrf.models.checkpoint import Checkpoint
from mergekit_snrf.profiling.request import versions

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


Values = Sequence[str] | Mapping[str, Any]
"""Texts such as ``beta=0.25,0.5``, whose values are written as in YAML, or lists of values by parameter."""


def combinations(recipe: Mapping[str, Any], settings: Values) -> list[Combination]:
    """Return the recipe with every combination of the values, the last parameter changing fastest.

    Args:
        recipe: the parsed content of a recipe file.
        settings: the values of every parameter.

    Raises:
        SnrfError: a parameter is unknown, named twice or without values, or there are too many combinations.
    """
    swept: dict[str, list[Any]] = {}
    for setting, name, values in _values(settings):
        if name not in _PARAMETERS:
            raise SnrfError(None, f"{name!r} is not a parameter", did_you_mean(name, _PARAMETERS), field="set")
        if not values or name in swept:
            what = f"{setting!r} has no values" if not values else f"{name} is set twice"
            raise SnrfError(None, what, f"write {name}=VALUE,VALUE once", field="set")
        if name in _STRENGTHS and all(type(value) in (int, float) for value in values):
            # A curve runs from the weakest merge to the strongest.
            values = sorted(values, reverse=name == "keep")
        swept[name] = values
    count = math.prod(map(len, swept.values()))
    if count > _MOST:
        raise SnrfError(None, f"makes {count} combinations, more than {_MOST}", "leave values out", field="set")
    found = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    if len({_named(values) for values in found}) < count:
        raise SnrfError(None, "repeats a value", "leave it out", field="set")
    return [Combination(values, _with(recipe, values)) for values in found]


def _values(settings: Values) -> Iterator[tuple[str, str, list[Any]]]:
    """Yield every setting as it was given, its parameter and its values."""
    if isinstance(settings, Mapping):
        for name, given in settings.items():
            values = list(given) if isinstance(given, list | tuple) else [given]
            yield f"{name}={given}", str(name), values
        return
    for setting in [settings] if isinstance(settings, str) else settings:
        name, _, text = setting.partition("=")
        try:
            yield setting, name, [_number(name, value) for value in parse_yaml(f"[{text}]", None)]
        except SnrfError as error:
            raise SnrfError(None, f"{setting!r} is {error.what}", "write beta=0.25,0.5", field="set") from None


def _number(name: str, value: Any) -> Any:
    """Return ``1e-1``, which is text in YAML, as a number where a strength is one."""
    try:
        return float(value) if isinstance(value, str) and name in _STRENGTHS else value
    except ValueError:
        return value


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in values.items())


def _shown(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _with(recipe: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with other values, where it has the parameter already or else at its top level."""
    changed: dict[str, Any] = copy.deepcopy(dict(recipe))
    models = changed.get("models")
    entries = [entry for entry in models if isinstance(entry, dict)] if isinstance(models, list) else []
    for name, value in values.items():
        own = [entry["parameters"] for entry in entries if name in (entry.get("parameters") or {})]
        if not own and not changed.get("parameters"):
            changed["parameters"] = {}
        for place in own or [changed["parameters"]]:
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


def best_row(
    names: Sequence[str], scores: Mapping[str, Sequence[Scores]], roles: Mapping[str, Role], reference: str, drop: float
) -> tuple[str, bool]:
    """Return the row with the largest mean gain among those that keep enough, and whether there is such a row.

    Args:
        names: of the rows to choose from.
        drop: how far each metric to keep may fall below the reference, in the unit of the tables.
    """

    # Tables show a metric whose means are shares in points.
    scales = {
        metric: 100.0 if all(0 <= one[metric].mean <= 1 for draws in scores.values() for one in draws) else 1.0
        for metric in scores[reference][0]
    }

    def change(name: str, role: Role) -> list[float]:
        metrics = [metric for metric in scores[reference][0] if roles.get(metric, "gain") == role]
        pairs = [[scores[one][0][metric].mean for one in (name, reference)] for metric in metrics]
        return [scales[metric] * (own - before) for metric, (own, before) in zip(metrics, pairs, strict=True)]

    kept = [name for name in names if min(change(name, "keep"), default=0.0) >= -drop - 1e-9]
    if kept:
        return max(kept, key=lambda name: sum(change(name, "gain"))), True
    return max(names, key=lambda name: min(change(name, "keep"), default=0.0)), False


def sweep_key(content: Mapping[str, Any], evaluation: str, models: Sequence[Checkpoint]) -> str:
    """Return the sha256 of what the scores of a sweep depend on.

    Args:
        content: the recipe, and how the target is loaded.
        evaluation: a reference, whose files are read.
        models: whose weights are known by their sizes and times, not read.
    """
    files = {str(path): sha256(path) for path in _evaluation_files(evaluation)}
    weights = [
        [name, os.stat(model.folder / name).st_size, os.stat(model.folder / name).st_mtime_ns]
        for model in models
        if model.folder is not None
        for name in sorted({tensor.file for tensor in model.tensors.values()})
    ]
    facts = {"evaluation": [evaluation, files], "weights": weights, "versions": versions(), **content}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _evaluation_files(reference: str) -> list[Path]:
    """Return the file that an evaluation is in, and the data files of a built-in one."""
    place = reference.partition("?")[0]
    path = Path(place if place.endswith((".yml", ".yaml")) else place.rpartition(":")[0])
    if not path.is_file():
        return []
    if path.suffix == ".py":
        return [path]
    metrics = load_yaml(path).get("metrics", {})
    return [path, *(path.parent / Path(metric["data"]).expanduser() for metric in metrics.values())]
