"""Evaluations: any callable that asks a loaded model the same items as another, and returns a score for each.

    def evaluate(model, processor):
        return {"reasoning": [1.0, 0.0, ...], "perception": Items(scores=(...), malformed=(...))}

``load_evaluation`` finds one by a reference: a YAML file of the built-in exact-match evaluation,
``package.module:name``, ``path/file.py:name``, or an entry point of the group ``mergekit_snrf.evaluations``. Arguments
of a callable follow a question mark: ``evaluation.py:board?n=100&seed=1``. An evaluation must be deterministic: equal
models, equal scores.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import parse_qsl

import torch
import yaml

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.references import find_attribute, imported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENTRY_POINTS = "mergekit_snrf.evaluations"

Role = Literal["gain", "keep"]
"""Whether a metric is what a merge shall gain (reasoning), or what it shall keep (perception)."""

_YAML = (".yml", ".yaml")


@dataclass(frozen=True)
class Items:
    """What a model scored on the items of one metric, in an order that is the same for every model.

    Attributes:
        scores: one an item, higher is better, such as 1.0 for a right answer and 0.0 for a wrong one.
        malformed: whether the item's answer could not be read, which also makes it wrong; None where that is unknown.
        ids: names of the items, which must be equal from model to model.
        groups: the task of each item. The metric is the mean over tasks of a task's mean, whatever the tasks' sizes.

    Raises:
        SnrfError: there are no items, a score is not finite, or the lengths differ.
    """

    scores: tuple[float, ...]
    malformed: tuple[bool, ...] | None = None
    ids: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.scores:
            raise SnrfError("there are no items; an evaluation scores at least one")
        for index, score in enumerate(self.scores):
            if not math.isfinite(score):
                raise SnrfError(f"the score of item {index} is {score}; scores must be finite numbers")
        for name in ("malformed", "ids", "groups"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.scores):
                raise SnrfError(f"{name} has {len(values)} entries for {len(self.scores)} scores; give one an item")

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def mean(self) -> float:
        """The metric."""
        return self._mean(self.scores)

    @property
    def malformed_rate(self) -> float | None:
        """Share of the answers that could not be read, averaged as the scores are."""
        return None if self.malformed is None else self._mean(self.malformed)

    def _mean(self, values: Sequence[float]) -> float:
        tasks: dict[str, list[float]] = {}
        for task, value in zip(self.groups or [""] * len(values), values, strict=True):
            tasks.setdefault(task, []).append(value)
        return math.fsum(math.fsum(task) / len(task) for task in tasks.values()) / len(tasks)


Scores = Mapping[str, Items]
"""Items by name of the metric."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that was found by its reference; call it through ``evaluate``.

    Attributes:
        name: the reference.
        function: takes a loaded model in eval mode and its processor (a tokenizer, for a model without images).
        roles: of the metrics that are not of role ``gain``.
    """

    name: str
    function: Callable[[Any, Any], Any]
    roles: Mapping[str, Role] = field(default_factory=dict)

    def role(self, metric: str) -> Role:
        """Return the role of a metric."""
        return self.roles.get(metric, "gain")


def load_evaluation(reference: str) -> Evaluation:
    """Find an evaluation, and check what can be checked without a model.

    A callable's attribute ``roles`` (metric -> ``gain`` or ``keep``) says what a merge shall gain and what it shall
    keep. Whatever a reference names in Python is imported, so it runs with the user's rights.

    Args:
        reference: ``file.yml``, ``path/file.py:name``, ``package.module:name`` or the name of an entry point; the last
            three may be followed by ``?key=value&key=value``, the values as YAML writes them.

    Raises:
        SnrfError: there is no such file, module, attribute or entry point, it cannot be imported or called, or an
            argument is not one that it takes.
    """
    if not reference:
        raise SnrfError("--eval is empty; name what the models shall be asked")
    if reference.endswith(_YAML):
        from mergekit_snrf.evidence.exact_match import load_exact_match

        exact_match = load_exact_match(reference)
        return Evaluation(reference, exact_match, exact_match.roles)
    place, _, query = reference.partition("?")
    found = find_attribute(place) if ":" in place else _from_entry_point(reference, place)
    if not callable(found):
        raise SnrfError(
            f"{reference}: is {type(found).__name__}, not callable; name a function of a model and its processor"
        )
    arguments = _arguments(reference, query) if query else {}
    try:
        inspect.signature(found).bind(None, None, **arguments)
    except TypeError as error:
        raise SnrfError(f"{reference}: cannot be called with a model and its processor ({error})") from None
    except ValueError:
        pass  # A function written in C need not tell its signature.
    return Evaluation(reference, partial(found, **arguments), _roles(reference, getattr(found, "roles", None)))


@torch.no_grad()
def evaluate(
    evaluation: Evaluation, model: PreTrainedModel, processor: Any, *, like: Scores | None = None
) -> dict[str, Items]:
    """Evaluate a model, which is put in eval mode.

    Args:
        evaluation: of ``load_evaluation``.
        model: any loaded model that the evaluation can ask.
        processor: of the model.
        like: what another model scored. Both must have the same metrics, and these the same items.

    Raises:
        SnrfError: the evaluation fails, or returns anything but finite scores for named metrics.
    """
    model.eval()
    try:
        returned = evaluation.function(model, processor)
    except SnrfError as error:
        raise SnrfError(f"{evaluation.name}: {str(error).removeprefix(f'{evaluation.name}: ')}") from error
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise SnrfError(f"{evaluation.name}: fails with {type(error).__name__}: {reason}; -vv shows where") from error
    if not isinstance(returned, Mapping) or not returned:
        raise SnrfError(
            f"{evaluation.name}: returned {type(returned).__name__ if returned else 'nothing'}; it must return a "
            f"mapping from the names of metrics to a score for every item"
        )
    scores = {}
    for metric, value in returned.items():
        if not isinstance(metric, str):
            raise SnrfError(f"{evaluation.name}: the name of a metric must be text, got {metric!r}")
        try:
            scores[metric] = value if isinstance(value, Items) else _items(value)
        except SnrfError as error:
            raise SnrfError(f"{evaluation.name}: metric {metric!r}: {error}") from None
    if like is not None:
        _check_alike(evaluation.name, like, scores)
    return scores


def _from_entry_point(reference: str, name: str) -> Any:
    points = entry_points(group=ENTRY_POINTS)
    for point in points:
        if point.name == name:
            return imported(reference, point.load)
    known = ", ".join(sorted({point.name for point in points})) or "none is installed"
    raise SnrfError(
        f"{reference}: is neither a .yml file, nor path/file.py:name or package.module:name, nor an entry point of the "
        f"group {ENTRY_POINTS} ({known}); correct --eval"
    )


def _arguments(reference: str, query: str) -> dict[str, Any]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
        return {key: yaml.safe_load(value) for key, value in pairs}
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SnrfError(f"{reference}: {query!r} is not key=value&key=value ({reason})") from None


def _roles(reference: str, roles: Any) -> Mapping[str, Role]:
    if roles is None:
        return {}
    if not isinstance(roles, Mapping) or not set(roles.values()) <= {"gain", "keep"}:
        raise SnrfError(f"{reference}: its attribute roles must map metrics to 'gain' or 'keep', got {roles!r}")
    return cast("Mapping[str, Role]", dict(roles))


def _items(value: Any) -> Items:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise SnrfError(f"must be a score for every item, got {type(value).__name__}")
    try:
        scores = tuple(float(score) for score in value)
    except (TypeError, ValueError) as error:
        raise SnrfError(f"holds a score that is no number ({error})") from None
    return Items(scores)


def _check_alike(name: str, first: Scores, other: Scores) -> None:
    if set(first) != set(other):
        lacking = ", ".join(sorted(set(first) ^ set(other)))
        raise SnrfError(
            f"{name}: {lacking} was scored for one model and not for another; an evaluation must score the same "
            f"metrics for every model"
        )
    for metric, items in first.items():
        found = other[metric]
        if len(items) != len(found):
            raise SnrfError(
                f"{name}: metric {metric!r} has {len(items)} items for one model and {len(found)} for another; models "
                f"are compared item by item"
            )
        if (items.ids, items.groups) != (found.ids, found.groups):
            raise SnrfError(
                f"{name}: metric {metric!r} has other items, or in another order, for one model than for another; "
                f"models are compared item by item"
            )
