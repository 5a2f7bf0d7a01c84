"""What the intervals of a comparison support, in sentences, and no more."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_snrf.evidence.controls import Row
from mergekit_snrf.evidence.intervals import FEW_DRAWS, FEW_ITEMS, scale_of, side_of, size_of, spoken
from mergekit_snrf.evidence.results import Condition, Contrast, Measured, Study


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
        of_claim = measured[claim.name][metric]
        claimed = of_claim.change is not None and side_of(of_claim.change, scale) > 0
        sentences.append(_change(claim.name, metric, of_claim, scale, unit))
        for contrast in study.contrasts:
            if contrast.metric == metric and (study.roles.get(metric) != "keep" or side_of(contrast.difference, scale)):
                row = by_name[contrast.right]
                sentences.append(_contrast(contrast, row, conditions[row.name], scale, unit, claimed=claimed))
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
    side = side_of(measured.change, scale)
    if not side:
        return f"No change of {metric} by {claim} can be told from chance: {spoken(measured.change, scale, '+')}{unit}."
    return f"{claim} {'raises' if side > 0 else 'lowers'} {metric} by {size_of(measured.change, scale)}{unit}."


def _contrast(contrast: Contrast, row: Row, condition: Condition, scale: float, unit: str, *, claimed: bool) -> str:
    measured, draws = condition.metrics[contrast.metric], ""
    assert measured.change is not None
    if condition.draws > 1:
        best = max(condition.settings["means"][contrast.metric]) - measured.mean.estimate + measured.change.estimate
        draws = f" (mean of {condition.draws} draws, the highest {round(scale * best, 1) + 0.0:+.1f})"
    change = spoken(measured.change, scale, "+")
    start = f"{row.spoken or row.name}{draws} changes {contrast.metric} by {change}{unit}"
    side = side_of(contrast.difference, scale)
    if side:
        # Where the merge itself shows nothing, nothing can be said to help.
        shown = row.about and (side < 0 or claimed)
        effect = f", so {row.about} {'helps' if side > 0 else 'hurts'}" if shown else ""
        than = f"{size_of(contrast.difference, scale)}{unit} {'higher' if side > 0 else 'lower'}"
        return f"{start}; with {contrast.left} it is {than}{effect}."
    effect = f", so it is not shown that {row.about} helps" if row.about else ""
    difference = spoken(contrast.difference, scale, "+")
    return f"{start}; the difference of {contrast.left} to it, {difference}{unit}, includes zero{effect}."
