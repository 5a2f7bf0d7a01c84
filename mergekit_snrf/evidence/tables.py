"""Tables of results, the same in the terminal and in the report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_snrf.evidence import wording
from mergekit_snrf.evidence.intervals import spoken
from mergekit_snrf.evidence.overlap import by_projection, site_order
from mergekit_snrf.evidence.results import Counts, Overlap, Study, Tuning


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first column names the row.

    The columns ``words`` are flush left; a ``folded`` table is shown only when the reader unfolds it.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    words: frozenset[int] = frozenset()
    folded: bool = False


def study_table(study: Study, metric: str) -> Table:
    """Return what a study measured of one metric: a row per condition, without empty columns."""
    factor, unit = wording.scale(study, metric)
    claim = next((condition.name for condition in study.conditions if condition.role == "claim"), "claim")
    against = {one.right: one.difference for one in study.contrasts if (one.left, one.metric) == (claim, metric)}
    rows = []
    for condition in study.conditions:
        if metric not in condition.metrics:
            continue
        value = condition.metrics[metric]
        name = f"{condition.name}, {condition.draws} draws" if condition.draws > 1 else condition.name
        change, difference = (
            "-" if interval is None else spoken(interval, factor, "+")
            for interval in (value.change, against.get(condition.name))
        )
        mean, malformed = spoken(value.mean, factor), wording.percent(value.malformed)
        rows.append((name, condition.neurons or "-", mean, change, difference, malformed))
    items = f", {study.items[metric]} items" if metric in study.items else ""
    header = ("condition", "neurons", "mean", "change", f"{claim} minus it", "malformed")
    # Columns without any entry are left out.
    shown = [place for place, _ in enumerate(header) if any(row[place] != "-" for row in rows)]
    cells = [[row[place] for place in shown] for row in rows]
    return Table(f"{metric}{unit}{items}", [header[place] for place in shown], cells)


def tuning_table(tuning: Tuning) -> Table:
    """Return the strengths of RegMean that were tried, by rising keep; the choice has a star."""
    metrics = sorted(tuning.target)
    header = ("keep", "KL", "worst kind", "its KL", "answers changed", *metrics)
    rows = [
        (
            f"{point.keep:g}{' *' if point.keep == tuning.keep else ''}",
            f"{point.kl:.4f}",
            point.worst,
            f"{point.kinds[point.worst][0]:.4f}",
            wording.percent(point.changed),
            *(f"{point.scores[metric]:.3f}" for metric in metrics),
        )
        for point in tuning.points
    ]
    return Table("Tried strengths; * is the choice", header, rows)


def counts_table(caption: str, label: str, rows: Iterable[tuple[str, Counts]], *, folded: bool = False) -> Table:
    """Return a row for every name: what both sets hold, each alone, and chance."""
    header = (label, "shared", "A only", "B only", "union", "share", "chance", "chance share", "z")
    cells: list[tuple[object, ...]] = []
    for name, counts in rows:
        share, expected = wording.percent(counts.share), wording.percent(counts.chance_share)
        z = "-" if counts.z is None else f"{counts.z:.1f}"
        cells.append((name, counts.shared, *counts.only, counts.union, share, f"{counts.chance:.1f}", expected, z))
    return Table(caption, header, cells, folded=folded)


def projections_table(overlap: Overlap, caption: str = "") -> Table:
    """Return the counts of an overlap by projection."""
    return counts_table(caption, "projection", by_projection(overlap).items())


def layers_table(overlap: Overlap) -> Table:
    """Return the counts of an overlap by layer and projection."""
    sites = [(f"{site.layer} {site.projection}", site) for site in sorted(overlap.sites, key=site_order)]
    return counts_table("By layer and projection", "layer", sites, folded=True)


def settings_table(caption: str, content: Mapping[str, Any]) -> Table:
    """Return settings or provenance as a table, without local folders."""
    return Table(caption, ("setting", "value"), _flat(content), frozenset({1}))


def _flat(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Write nested mappings as lines ``target probes count``, other values as JSON, and no local folders."""
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        name = wording.without_folders(str(key))
        if isinstance(value, Mapping):
            rows += [(f"{name} {inner}", text) for inner, text in _flat(value)]
        elif value is not None:
            # A template is text for a model, where a slash does not mean a folder.
            shown = value if key == "template" else _without_folders(value)
            rows.append((name, shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)))
    return rows


def _without_folders(value: Any) -> Any:
    if isinstance(value, str):
        return wording.without_folders(value)
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    if isinstance(value, Mapping):
        return {wording.without_folders(str(key)): _without_folders(part) for key, part in value.items()}
    return value
