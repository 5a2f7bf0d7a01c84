"""The strength of RegMean without labels: the smallest ``keep`` whose merge stays close to its target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.controls import Merge, regmean
from mergekit_snrf.evidence.heldout import Distance, HeldOut
from mergekit_snrf.files.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOWEST, HIGHEST, STEPS = 0.05, 300.0, 9
"""Where ``keep`` is looked for, and how often the interval of its logarithm is halved."""


class TunedPoint(Settings):
    """A strength that was tried.

    Attributes:
        kl: mean over the kinds.
        changed: share of changed answers, mean over the kinds.
        kinds: KL and share of changed answers by kind.
        scores: means of the evaluation's metrics, where one was given.
    """

    keep: float
    kl: float
    changed: float
    kinds: dict[str, tuple[float, float]]
    scores: dict[str, float] = Field(default_factory=dict)

    @property
    def worst(self) -> str:
        """The kind that moved most."""
        return max(self.kinds, key=lambda name: self.kinds[name][0])


class Tuning(Settings):
    """How ``keep`` was chosen.

    Attributes:
        keep: the choice.
        max_kl: the bound, in nats a token.
        points: what was tried, by rising keep.
        probes: held-out probes by kind.
        target: means of the evaluation's metrics on the target.
        settings: whatever else is needed to repeat it.
    """

    format: Literal["snrf-tuning"] = "snrf-tuning"
    version: Literal[1] = 1
    keep: float
    max_kl: float
    points: tuple[TunedPoint, ...]
    probes: dict[str, int]
    target: dict[str, float] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def chosen(self) -> TunedPoint:
        """The point of the choice."""
        return next(point for point in self.points if point.keep == self.keep)


def tune(
    merge: Merge,
    model: PreTrainedModel,
    held_out: Sequence[HeldOut],
    max_kl: float,
    *,
    evaluate: Callable[[], dict[str, float]] | None = None,
    visit: Callable[[TunedPoint], None] | None = None,
) -> Tuning:
    """Find the smallest ``keep`` within a bound by bisection; the model is edited in memory and put back.

    Args:
        merge: of a recipe with ``update: regmean``.
        model: the loaded target.
        held_out: probes of every kind to keep.
        max_kl: bound of the mean KL(target || merge) per token of the target's answers, averaged over the kinds.
        evaluate: returns means of metrics of the model as it is, for every point.
        visit: is given every point as it is measured.

    Raises:
        SnrfError: even the largest ``keep`` is not within the bound.
    """
    moments = merge.moments
    if moments is None:
        raise ValueError("the merge has no moments")
    points: dict[float, TunedPoint] = {}

    def within(keep: float) -> bool:
        with regmean(merge, keep, moments)(model):
            found = {one.name: one.distance(model) for one in held_out}
            points[keep] = _point(keep, found, {} if evaluate is None else evaluate())
        if visit is not None:
            visit(points[keep])
        return points[keep].kl <= max_kl

    target = {} if evaluate is None else evaluate()
    low, high = math.log(LOWEST), math.log(HIGHEST)
    for _ in range(STEPS):
        middle = (low + high) / 2
        if within(_rounded(middle)):
            high = middle
        else:
            low = middle
    keep = _rounded(high)
    if keep not in points and not within(keep):
        what = f"keep {keep:g} has a KL of {points[keep].kl:.3g}, more than {max_kl:g}"
        raise SnrfError(None, what, "allow more, or take the moments on more probes to keep", field="max_kl")
    tried = tuple(points[one] for one in sorted(points))
    return Tuning(
        keep=keep, max_kl=max_kl, points=tried, probes={one.name: one.probes for one in held_out}, target=target
    )


def _rounded(place: float) -> float:
    return float(f"{math.exp(place):.3g}")


def _point(keep: float, found: dict[str, Distance], scores: dict[str, float]) -> TunedPoint:
    return TunedPoint(
        keep=keep,
        kl=sum(one.kl for one in found.values()) / len(found),
        changed=sum(one.changed for one in found.values()) / len(found),
        kinds={name: (one.kl, one.changed) for name, one in found.items()},
        scores=scores,
    )
