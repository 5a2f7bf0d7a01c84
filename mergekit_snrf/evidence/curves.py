"""Curves of merges over their strength: what is gained against what is kept, and how ``keep`` was chosen."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergekit_snrf.errors import printable
from mergekit_snrf.evidence.drawing import COLORS, INK, Drawing, new_figure, plain_axis, styled
from mergekit_snrf.evidence.intervals import spoken
from mergekit_snrf.evidence.results import Condition, Study, Tuning
from mergekit_snrf.evidence.wording import scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = {
    "regmean": (COLORS[0], "o", "-"),
    "linear": (COLORS[1], "s", "-"),
    "regmean from base": (COLORS[2], "^", "--"),
}
_POINTS = {"DARE": (COLORS[3], "D"), "random": (COLORS[4], "v"), "base": (COLORS[2], "P"), "least": (COLORS[4], "X")}
_OTHER = (COLORS[4], "D")


def tradeoff_drawings(study: Study) -> dict[str, Drawing]:
    """Return gain against keep, by the name of a file, for every pair of a metric to gain and one to keep.

    A study without sweeps has none.
    """
    if study.kind != "comparison" or all(condition.curve is None for condition in study.conditions):
        return {}
    drawings = {}
    for gain in study.items:
        for keep in study.items:
            if (study.roles.get(gain), study.roles.get(keep)) != ("gain", "keep"):
                continue
            caption = f"{gain} against {keep}, {100 * study.level:g} % intervals of the changes to the target"
            name = re.sub(r"\W+", "-", f"{gain}-against-{keep}")
            drawings[name] = Drawing(tradeoff(study, gain, keep), caption, tradeoff_text(study, gain, keep))
    return drawings


@styled
def tradeoff(study: Study, gain: str, keep: str) -> Figure:
    """Draw gain against keep, a curve for every sweep from the target on, with intervals of the changes."""
    figure, (panel,) = new_figure(4.6)
    factors = scale(study, keep)[0], scale(study, gain)[0]
    spare = itertools.cycle((*look, "-") for look in ((COLORS[4], "D"), (COLORS[3], "v"), (COLORS[2], "X"), (INK, "P")))
    reference, curves, points = _drawn(study, gain, keep)
    start = _place(reference, gain, keep, factors)
    looks = {name: _LINES.get(name) or next(spare) for name in curves}
    for name, members in curves.items():
        color, marker, dash = looks[name]
        places = [start, *(_place(one, gain, keep, factors) for one in members)]
        label = f"{name}: {_key(members)} {members[0].strength or 0.0:g} to {members[-1].strength or 0.0:g}"
        panel.plot(*zip(*places, strict=True), color=color, linestyle=dash, linewidth=1.3, label=label, zorder=2)
        for one in members:
            _cross(panel, one, (gain, keep), factors, (color, marker))
    for one in points:
        color, marker = next((look for name, look in _POINTS.items() if one.name.startswith(name)), _OTHER)
        if one.role == "claim":
            color, marker = COLORS[0], "o"
        _cross(panel, one, (gain, keep), factors, (color, marker))
        if one.role != "claim":
            panel.plot([], [], color=color, marker=marker, linestyle="none", markersize=5, label=printable(one.name))
    for one in study.conditions:
        if one.role == "claim":
            place = _place(one, gain, keep, factors)
            label = f"{printable(one.name)} (the recipe)"
            ring: Any = {"markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.4, "linestyle": "none"}
            panel.plot(*place, marker="o", markersize=12, zorder=4, label=label, **ring)
    panel.plot(*start, color=INK, marker="*", markersize=13, linestyle="none", zorder=4, label="target")
    panel.set_xlabel(f"{printable(keep)}{scale(study, keep)[1]} (kept)")
    panel.set_ylabel(f"{printable(gain)}{scale(study, gain)[1]} (gained)")
    panel.grid(color=INK, alpha=0.15, linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=1, fontsize=8)
    return figure


def _drawn(study: Study, gain: str, keep: str) -> tuple[Condition, dict[str, list[Condition]], list[Condition]]:
    """Return the target, the points of every curve from weak to strong, and the rows that are not on one."""
    rows = [one for one in study.conditions if {gain, keep} <= one.metrics.keys()]
    reference = next(one for one in rows if one.role == "reference")
    curves: dict[str, list[Condition]] = {}
    for one in rows:
        if one.curve is not None:
            curves.setdefault(one.curve, []).append(one)
    for members in curves.values():
        members.sort(key=lambda one: one.strength or 0.0, reverse=_key(members) == "keep")
    others = [one for one in rows if one.curve is None and one is not reference and " at equal " not in one.name]
    return reference, dict(sorted(curves.items(), key=lambda item: [*_LINES, item[0]].index(item[0]))), others


def _place(one: Condition, gain: str, keep: str, factors: tuple[float, float]) -> tuple[float, float]:
    return factors[0] * one.metrics[keep].mean.estimate, factors[1] * one.metrics[gain].mean.estimate


def _cross(
    panel: Axes, one: Condition, metrics: tuple[str, str], factors: tuple[float, float], look: tuple[str, str]
) -> None:
    """Draw a point with the paired intervals of its changes to the target."""
    gain, keep = metrics
    x, y = _place(one, gain, keep, factors)
    bars = []
    for metric, factor in ((keep, factors[0]), (gain, factors[1])):
        change = one.metrics[metric].change
        assert change is not None
        bars.append([[factor * (change.estimate - change.low)], [factor * (change.high - change.estimate)]])
    panel.errorbar(x, y, xerr=bars[0], yerr=bars[1], color=look[0], elinewidth=0.8, alpha=0.45, zorder=1)
    panel.plot(x, y, color=look[0], marker=look[1], markersize=5, linestyle="none", zorder=3)


def _key(members: Sequence[Condition]) -> str:
    return "keep" if "keep" in members[0].settings else "beta"


def tradeoff_text(study: Study, gain: str, keep: str) -> str:
    """Describe the figure of a trade-off."""
    factors = scale(study, gain)[0], scale(study, keep)[0]
    reference, curves, others = _drawn(study, gain, keep)

    def said(one: Condition) -> str:
        return f"{one.name} {spoken(one.metrics[gain].mean, factors[0])}, {spoken(one.metrics[keep].mean, factors[1])}"

    values = [said(one) for one in (reference, *(one for members in curves.values() for one in members), *others)]
    return printable(
        f"Line chart of {gain} against {keep}, a curve for every method from the target on, {gain} first, with "
        f"{100 * study.level:g} % intervals: {'; '.join(values)}."
    )


def tuning_drawing(tuning: Tuning) -> Drawing:
    """Return how keep was chosen as a figure."""
    values = [f"{point.kl:.3g} at keep {point.keep:g}" for point in tuning.points]
    text = (
        f"Line chart of KL(target || merge) per token against keep, bound {tuning.max_kl:g}, chosen keep "
        f"{tuning.keep:g}: {', '.join(values)}."
    )
    return Drawing(tuning_curve(tuning), "KL against keep", text)


@styled
def tuning_curve(tuning: Tuning) -> Figure:
    """Draw KL, and below it the metrics of an evaluation, against keep, with the bound and the choice."""
    metrics = sorted(tuning.target)
    figure, panels = new_figure(3.4 + 2.2 * bool(metrics), rows=1 + bool(metrics))
    keeps = [point.keep for point in tuning.points]
    for index, name in enumerate(tuning.probes):
        color, kls = COLORS[index % len(COLORS)], [point.kinds[name][0] for point in tuning.points]
        panels[0].plot(keeps, kls, color=color, linewidth=0.9, linestyle=":", marker=".", label=printable(name))
    kls = [point.kl for point in tuning.points]
    panels[0].plot(keeps, kls, color=INK, linewidth=1.8, marker="o", markersize=4, label="mean of the kinds")
    panels[0].axhline(tuning.max_kl, color=INK, linewidth=0.8, linestyle="--", label=f"bound {tuning.max_kl:g}")
    panels[0].set(yscale="log", ylabel="KL, nats a token")
    for index, metric in enumerate(metrics):
        look: Any = {"color": COLORS[index % len(COLORS)], "marker": "os^Dv"[index % 5], "markersize": 4}
        panels[1].plot(keeps, [point.scores[metric] for point in tuning.points], label=printable(metric), **look)
        panels[1].axhline(tuning.target[metric], color=look["color"], linewidth=0.8, linestyle="--")
    if metrics:
        panels[1].set_ylabel("mean (dashed: target)")
    for panel in panels:
        panel.set_xscale("log")
        panel.axvline(tuning.keep, color=INK, linewidth=0.8)
        panel.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        plain_axis(panel.xaxis)
        plain_axis(panel.yaxis)
        panel.set_xticks([1, 3, 10, 30, 100, 0.1, 0.3], minor=False)
        panel.set_xlim(min(keeps) / 1.15, max(keeps) * 1.15)
    panels[-1].set_xlabel(f"keep; chosen: {tuning.keep:g}")
    return figure
