"""The table and the verdict of a study, as ``snrf ablate`` and ``snrf compare`` print them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_snrf.cli.common import table

if TYPE_CHECKING:
    from mergekit_snrf.analysis.results import Study


def report(study: Study) -> str:
    """Return a study as text: a table a metric, and the verdict."""
    from mergekit_snrf.analysis.intervals import scale_of, spoken

    measured = {condition.name: condition.metrics for condition in study.conditions}
    parts = []
    for metric, items in study.items.items():
        scale, _ = scale_of(metric, measured)
        against = {c.right: c.difference for c in study.contrasts if c.metric == metric}
        claim = next(condition.name for condition in study.conditions if condition.role == "claim")
        rows = []
        for condition in study.conditions:
            value = condition.metrics[metric]
            name = f"{condition.name}, {condition.draws} draws" if condition.draws > 1 else condition.name
            change = "-" if value.change is None else spoken(value.change, scale, "+")
            difference = spoken(against[condition.name], scale, "+") if condition.name in against else "-"
            malformed = "-" if value.malformed is None else f"{100 * value.malformed:.1f} %"
            neurons = condition.neurons or "-"
            rows.append((name, neurons, spoken(value.mean, scale), change, difference, malformed))
        unit = " in %" if scale == 100 else ""
        header = (f"{metric}{unit}, {items} items", "neurons", "mean", "change", f"{claim} minus it", "malformed")
        parts.append(table(header, rows))
    parts.append(
        f"[{100 * study.level:g} % intervals]: paired bootstrap over items and draws, seed {study.seed}.\n"
        + "\n".join(study.verdict)
    )
    return "\n\n".join(parts)
