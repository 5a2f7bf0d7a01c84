"""What a model scored on the items of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergekit_snrf.errors import SnrfError

Role = Literal["gain", "keep"]
"""Whether a metric is what a merge should improve (reasoning), or what it should preserve (perception)."""


@dataclass(frozen=True)
class Items:
    """What a model scored on the items of one metric, in an order that is the same for every model.

    Attributes:
        scores: one per item, finite, higher is better, such as 1.0 for a right answer and 0.0 for a wrong one.
        malformed: whether an answer could not be read, which also makes it wrong; None where that is unknown.
        ids: names of the items, equal from model to model.
        groups: the task of each item. The metric is the mean over tasks of a task's mean.
    """

    scores: tuple[float, ...]
    malformed: tuple[bool, ...] | None = None
    ids: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.scores:
            raise SnrfError(None, "there are no items", "return a score for at least one", field="scores")
        for index, score in enumerate(self.scores):
            if not math.isfinite(score):
                raise SnrfError(None, f"item {index} has the score {score}", "return finite numbers", field="scores")
        for name in ("malformed", "ids", "groups"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.scores):
                what = f"has {len(values)} entries for {len(self.scores)} scores"
                raise SnrfError(None, what, "give one per item", field=name)

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


def as_items(value: Any) -> Items:
    """Return what an evaluation returned for one metric: ``Items``, or a score per item."""
    if isinstance(value, Items):
        return value
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise SnrfError(None, f"must be a score per item, got {type(value).__name__}", "return a list of numbers")
    try:
        scores = tuple(float(score) for score in value)
    except (TypeError, ValueError) as error:
        raise SnrfError(None, f"a score is not a number ({error})", "return a list of numbers") from None
    return Items(scores)


def check_alike(where: str, first: Scores, other: Scores) -> None:
    """Raise ``SnrfError`` unless two models were scored on the same metrics and items, in the same order."""
    remedy = "models are compared item by item, so every model must be asked the same items in the same order"
    if set(first) != set(other):
        lacking = ", ".join(sorted(set(first) ^ set(other)))
        raise SnrfError(where, f"{lacking} was scored for one model and not for another", remedy)
    for metric, items in first.items():
        found = other[metric]
        if len(items) != len(found):
            what = f"has {len(items)} items for one model and {len(found)} for another"
            raise SnrfError(where, what, remedy, field=f"metric {metric!r}")
        if (items.ids, items.groups) != (found.ids, found.groups):
            raise SnrfError(where, "the items differ from model to model", remedy, field=f"metric {metric!r}")
