"""What the intervals of a comparison support, in sentences, and no more."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_snrf.analysis.controls import Row
from mergekit_snrf.analysis.intervals import scale_of, spoken
from mergekit_snrf.analysis.results import Condition, Contrast, Interval, Measured, Study

FEW_ITEMS = 30
"""Below this, the intervals of a bootstrap are too narrow to go by."""
FEW_DRAWS = 5
"""Below this, the draws tell little of all the others."""


def verdict(study: Study, rows: Sequence[Row]) -> list[str]:
    """Return the sentences of a comparison.

    Metrics to gain get a sentence for the claim and for every control; metrics to keep one for the claim, and one for
    every control that differs from it.
    """
    conditions = {condition.name: condition for condition in study.conditions}
    measured = {name: condition.metrics for name, condition in conditions.items()}
    claim = next(row for row in rows if row.role == "claim")
    by_name = {row.name: row for row in rows}
    sentences = []
    for metric in study.items:
        scale, unit = scale_of(metric, measured)
        sentences.append(_change(claim.name, metric, measured[claim.name][metric], scale, unit))
        for contrast in study.contrasts:
            if contrast.metric == metric and (study.roles.get(metric) != "keep" or _side(contrast.difference, scale)):
                row = by_name[contrast.right]
                sentences.append(_contrast(contrast, row, conditions[row.name], scale, unit))
    compared = len(study.contrasts) + len(study.items)
    if compared > 1:
        sentences.append(
            f"These are {compared} differences with intervals of {100 * study.level:g} % each, not "
            f"corrected for their number: of many, some exclude zero by chance."
        )
    few = [metric for metric, items in study.items.items() if items < FEW_ITEMS]
    if few:
        sentences.append(f"The intervals of {' and '.join(few)} are of fewer than {FEW_ITEMS} items, and too narrow.")
    draws = min((c.draws for c in study.conditions if "seeds" in c.settings), default=FEW_DRAWS)
    if draws < FEW_DRAWS:
        count = f"{draws} draws tell" if draws > 1 else "One draw tells"
        sentences.append(
            f"{count} little of how much draws differ, so the intervals over draws are too narrow; use more."
        )
    return sentences


def _change(claim: str, metric: str, measured: Measured, scale: float, unit: str) -> str:
    assert measured.change is not None
    side = _side(measured.change, scale)
    if not side:
        return f"No change of {metric} by {claim} can be told from chance: {spoken(measured.change, scale, '+')}{unit}."
    return f"{claim} {'raises' if side > 0 else 'lowers'} {metric} by {_size(measured.change, scale)}{unit}."


def _contrast(contrast: Contrast, row: Row, condition: Condition, scale: float, unit: str) -> str:
    measured, draws = condition.metrics[contrast.metric], ""
    assert measured.change is not None
    if condition.draws > 1:
        best = max(condition.settings["means"][contrast.metric]) - measured.mean.estimate + measured.change.estimate
        draws = f" (mean of {condition.draws} draws, the highest {round(scale * best, 1) + 0.0:+.1f})"
    change = spoken(measured.change, scale, "+")
    start = f"{row.spoken or row.name}{draws} changes {contrast.metric} by {change}{unit}"
    side = _side(contrast.difference, scale)
    if side:
        effect = f", so {row.about} {'helps' if side > 0 else 'hurts'}" if row.about else ""
        than = f"{_size(contrast.difference, scale)}{unit} {'higher' if side > 0 else 'lower'}"
        return f"{start}; with {contrast.left} it is {than}{effect}."
    effect = f", so it is not shown that {row.about} helps" if row.about else ""
    difference = spoken(contrast.difference, scale, "+")
    return f"{start}; the difference of {contrast.left} to it, {difference}{unit}, includes zero{effect}."


def _side(interval: Interval, scale: float) -> int:
    """Return -1 or 1 where an interval lies on one side of zero, else 0; a bound shown as 0.0 points counts as zero."""
    low, high = (round(scale * bound, 1) if scale == 100 else bound for bound in (interval.low, interval.high))
    return -1 if high < 0 else 1 if low > 0 else 0


def _size(interval: Interval, scale: float) -> str:
    """Format a difference without its sign, the smaller bound first."""
    if interval.estimate >= 0:
        return spoken(interval, scale)
    return spoken(Interval(estimate=-interval.estimate, low=-interval.high, high=-interval.low), scale)
