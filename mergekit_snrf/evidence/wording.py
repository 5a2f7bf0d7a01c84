"""The results in words and tables: sentences and tables of terminal and report, alternative texts of the figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_snrf.errors import printable
from mergekit_snrf.evidence.intervals import scale_of, spoken
from mergekit_snrf.evidence.overlap import by_projection, site_order, total
from mergekit_snrf.evidence.results import AmplifiedNeuron, Counts, Overlap, SiteOverlap, Study, TokenOdds, Tuning
from mergekit_snrf.neurons.sets import NeuronSet, Site

_LONGEST_TOKEN = 30
# A local path from the root or the home folder: alone, of a model with its adapter, or among an evaluation's arguments.
_LOCAL = re.compile(
    r"(^|[+?&=])(?:file://)?(?:(?:~[^+?&=\\/]*|[A-Za-z]:)[\\/]|/|\\\\)(?:[^+?&=]*[\\/])?([^+?&=\\/]+[\\/]*)(?=$|[+?&=])"
)


def without_folders(text: str) -> str:
    """Return a path, a model or an evaluation with absolute local paths cut to their last part, for a shared page."""
    return _LOCAL.sub(r"\1\2", text)


def scale(study: Study, metric: str) -> tuple[float, str]:
    """Return by what the numbers of a metric are multiplied to be shown, and their unit: shares become per cent."""
    rows = {condition.name: condition.metrics for condition in study.conditions if metric in condition.metrics}
    factor, _ = scale_of(metric, rows)
    return factor, " in %" if factor == 100 else ""


def percent(part: float | None) -> str:
    """Format a share as per cent with one digit, and none at all as a dash."""
    return "-" if part is None else f"{100 * part:.1f} %"


def rule(settings: Mapping[str, Any]) -> str:
    """Describe a selection rule or other settings: ``top_ratio 0.1, at_least 0.9``."""
    return printable(", ".join(f"{name} {_value(value)}" for name, value in settings.items()))


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name} {_value(part)}" for name, part in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def quoted(token: str) -> str:
    """Return a token in quotes, with escapes, and shortened if it is long."""
    return repr(token if len(token) <= _LONGEST_TOKEN else f"{token[: _LONGEST_TOKEN - 1]}…")


def chance_sentence(counts: Counts) -> str:
    """Say how much two sets share, and what chance would give."""
    if not counts.union:
        return "Neither model has a neuron under this rule."
    text = (
        f"{counts.shared} of the union's {counts.union} neurons are shared ({percent(counts.share)}); "
        f"random sets of the same sizes would share {counts.chance:.1f} ({percent(counts.chance_share)})"
    )
    if counts.z is None:
        return f"{text}, and could share no other number."
    side = "no more and no less" if abs(counts.z) < 3 else "more" if counts.z > 0 else "less"
    return (
        f"{text}, with a standard deviation of {counts.deviation:.1f}: "
        f"{side} than chance explains (z = {counts.z:.1f})."
    )


def overlap_text(overlap: Overlap) -> str:
    """Describe the overlap diagram."""
    first, second = map(printable, overlap.names)
    counts = total(overlap.sites)
    return (
        f"Two overlapping circles of true area, selection {rule(overlap.rule)}: {counts.only[0]} neurons of {first} "
        f"only, {counts.shared} shared, {counts.only[1]} of {second} only. {chance_sentence(counts)}"
    )


def overlap_map_text(overlap: Overlap) -> str:
    """Describe the heat map of an overlap."""
    parts = [
        f"{name} {percent(counts.share)} (chance {percent(counts.chance_share)})"
        for name, counts in by_projection(overlap).items()
    ]
    return _map_text("shared neurons as per cent of the union", overlap.sites, parts)


def mask_map_text(neurons: NeuronSet) -> str:
    """Describe the heat map of a mask."""
    parts = [
        f"{name} {count} of {size} ({percent(count / size)})" for name, (count, size) in counts_of(neurons).items()
    ]
    return _map_text("the mask's neurons", neurons, parts)


def _map_text(what: str, sites: Iterable[Site | SiteOverlap], parts: Sequence[str]) -> str:
    layers = len({site.layer for site in sites})
    return f"Heat map of {what}, {layers} layers by projection. Over all layers: {', '.join(parts)}."


def counts_of(neurons: NeuronSet) -> dict[str, tuple[int, int]]:
    """Return (neurons in the set, neurons of the sites it lists) by projection, and under ``all`` over everything."""
    counts = {name: (count, size) for name, (_, count, size) in neurons.by_projection().items() if size}
    return {**counts, "all": tuple(map(sum, zip(*counts.values(), strict=True)))} if counts else {}  # type: ignore[dict-item]


def curve_text(overlap: Overlap) -> str:
    """Describe the curve of an overlap."""
    points = {point.rule["top_ratio"]: point for point in overlap.curve}
    picked = sorted(points)[:: max(1, len(points) // 5)]
    values = [
        f"{percent(points[ratio].share)} at top ratio {ratio:g} (chance {percent(points[ratio].chance_share)})"
        for ratio in picked
    ]
    return f"Line chart of shared neurons as share of the union over top ratios: {', '.join(values)}."


def study_text(study: Study, metric: str) -> str:
    """Describe the interval plot of one metric."""
    factor, unit = scale(study, metric)
    values = [
        f"{condition.name} {spoken(condition.metrics[metric].mean, factor)}"
        for condition in study.conditions
        if metric in condition.metrics
    ]
    return printable(f"Interval plot of {metric}{unit} with {100 * study.level:g} % intervals: {'; '.join(values)}.")


def tuning_sentences(tuning: Tuning) -> list[str]:
    """Say which keep was chosen, and what it bounds."""
    chosen = tuning.chosen
    probes = ", ".join(f"{count} {name}" for name, count in tuning.probes.items())
    return [
        f"keep {tuning.keep:g} is the smallest with a KL of at most {tuning.max_kl:g} nats a token on held-out probes "
        f"({probes}).",
        f"{percent(chosen.changed)} of the answers change, so accuracy on these probes cannot change by more; the "
        f"worst kind is {chosen.worst} ({percent(chosen.kinds[chosen.worst][1])}).",
    ]


def token_bars_text(neuron: AmplifiedNeuron, count: int = 12) -> str:
    """Describe the bars of one neuron by its leading tokens."""
    tokens = [token_text(token) for token in leading(neuron, count)]
    return printable(
        f"Bars of {neuron.neuron}: tokens more frequent with the neuron amplified, by log-odds "
        f"(amplified count:plain count): {', '.join(tokens) or 'none'}."
    )


def leading(neuron: AmplifiedNeuron, count: int) -> list[TokenOdds]:
    """Return the first ``count`` tokens that amplifying the neuron makes more frequent."""
    return [token for token in neuron.tokens if token.log_odds > 0][:count]


def token_text(token: TokenOdds) -> str:
    """Describe a token: ``' sum' 3.02 (41:2)``."""
    return f"{quoted(token.token)} {token.log_odds:.2f} ({token.amplified}:{token.plain})"


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
    factor, unit = scale(study, metric)
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
        mean, malformed = spoken(value.mean, factor), percent(value.malformed)
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
            percent(point.changed),
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
        share, expected = percent(counts.share), percent(counts.chance_share)
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
        name = without_folders(str(key))
        if isinstance(value, Mapping):
            rows += [(f"{name} {inner}", text) for inner, text in _flat(value)]
        elif value is not None:
            # A template is text for a model, where a slash does not mean a folder.
            shown = value if key == "template" else _without_folders(value)
            rows.append((name, shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)))
    return rows


def _without_folders(value: Any) -> Any:
    if isinstance(value, str):
        return without_folders(value)
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    if isinstance(value, Mapping):
        return {without_folders(str(key)): _without_folders(part) for key, part in value.items()}
    return value
