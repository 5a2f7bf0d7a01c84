"""The strength of RegMean without labels: the smallest ``keep`` whose merge stays close to its target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.controls import Merge, regmean
from mergekit_snrf.evidence.heldout import Distance, HeldOut
from mergekit_snrf.evidence.study_results import TunedPoint, Tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOWEST, HIGHEST, STEPS = 0.05, 300.0, 9
"""Where ``keep`` is looked for, and how often the interval of its logarithm is halved."""


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
