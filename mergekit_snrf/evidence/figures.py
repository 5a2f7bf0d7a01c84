"""Figures of the results (matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from mergekit_snrf.errors import printable
from mergekit_snrf.evidence.drawing import CHANCE, COLORS, INK, new_figure, percent_axis, styled
from mergekit_snrf.evidence.overlap import total
from mergekit_snrf.evidence.results import AmplifiedNeuron, Overlap, Study
from mergekit_snrf.evidence.wording import leading, percent, quoted, scale
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import PROJECTIONS, Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SETS = COLORS[:2]
_ROLES = {"reference": (INK, "s"), "claim": (COLORS[0], "o"), "control": (COLORS[1], "D")}
_DASHES: tuple[Any, ...] = (":", "-.", (0, (1, 1)), "--", (0, (5, 1)))
_LINES = {name: (color, dash) for name, color, dash in zip(PROJECTIONS, COLORS, _DASHES, strict=True)}
_MAX_HEIGHT = 60.0
_MAX_LABELLED_LAYERS = 128
_FEW = 10


@styled
def overlap_diagram(overlap: Overlap) -> Figure:
    """Draw both sets as circles whose areas are the counts, and beside them, to the same scale, those of chance."""
    from matplotlib.patches import Patch

    counts = total(overlap.sites)
    figure, panels = new_figure(2.4, columns=2)
    sizes = counts.shared + counts.only[0], counts.shared + counts.only[1]
    drawings = {"measured": float(counts.shared), "by chance": counts.chance}
    for panel, (title, shared) in zip(panels, drawings.items(), strict=True):
        _circles(panel, sizes, shared, whole=max(1, counts.union))
        panel.set_title(title)
    width = max(abs(bound) for panel in panels for bound in panel.get_xlim())
    height = max(abs(bound) for panel in panels for bound in panel.get_ylim())
    for panel in panels:
        panel.set_xlim(-width, width, auto=True)
        panel.set_ylim(-height, height, auto=True)
        # The panel keeps its width, which the row of numbers below the circles needs.
        panel.set_aspect("equal", adjustable="datalim")
    handles = [Patch(facecolor=(color, 0.3), edgecolor=color) for color in _SETS]
    figure.legend(handles, [fill(printable(name), 60) for name in overlap.names], loc="outside lower center")
    return figure


def _circles(panel: Axes, sizes: tuple[int, int], shared: float, whole: float) -> None:
    """Draw two circles of ``sizes`` / ``whole`` square units that overlap by ``shared`` / ``whole``."""
    from matplotlib_venn import venn2, venn2_circles
    from matplotlib_venn.layout.venn2 import DefaultLayoutAlgorithm

    panel.set_axis_off()
    subsets = (sizes[0] - shared, sizes[1] - shared, shared)
    if not sum(subsets):
        panel.text(0.5, 0.5, "no neurons", ha="center", va="center", transform=panel.transAxes)
        return
    layout = DefaultLayoutAlgorithm(normalize_to=sum(subsets) / whole)
    style: dict[str, Any] = {"ax": panel, "layout_algorithm": layout}
    venn2(subsets, None, _SETS, alpha=0.3, subset_label_formatter=lambda _: "", **style)
    for circle, color in zip(venn2_circles(subsets, linewidth=1.2, **style), _SETS, strict=True):
        circle.set_edgecolor(color)
    common = round(shared)
    labels = (sizes[0] - common, "only"), (common, "shared"), (sizes[1] - common, "only")
    for place, color, (count, what) in zip((0.06, 0.5, 0.94), (_SETS[0], INK, _SETS[1]), labels, strict=True):
        side: Any = {0.06: "left", 0.5: "center", 0.94: "right"}[place]
        text = panel.text(place, -0.02, f"{count}\n{what}", color=color, ha=side, va="top", transform=panel.transAxes)
        text.set(fontsize=8, fontweight="bold")


@styled
def mask_map(neurons: NeuronSet) -> Figure:
    """Draw where the neurons live: counts in cells coloured by their share of the layer's projection."""
    shares = {site: (int(member.sum()) / len(member), str(int(member.sum()))) for site, member in neurons.items()}
    return _map(shares, "neurons; colour: share of the projection")


@styled
def overlap_map(overlap: Overlap) -> Figure:
    """Draw the shared neurons as per cent of the union for every layer and projection."""
    shares = {
        Site(counts.layer, counts.projection): (counts.share, percent(counts.share).removesuffix(" %"))
        for counts in overlap.sites
        if counts.share is not None
    }
    return _map(shares, "shared, % of the union")


def _map(cells: Mapping[Site, tuple[float, str]], title: str) -> Figure:
    """Draw a share in [0, 1] and a text for every site, layers downwards."""
    import numpy as np
    from matplotlib import colormaps

    layers = sorted({site.layer for site in cells})
    height = min(_MAX_HEIGHT, 1.3 + 0.19 * len(layers))
    figure, (panel,) = new_figure(height)
    if not cells:
        return _nothing(figure, panel, "no neurons")
    names = list(PROJECTIONS)
    grid = np.full((len(layers), len(names)), np.nan)
    rows = {layer: row for row, layer in enumerate(layers)}
    for site, (share, _) in cells.items():
        grid[rows[site.layer], names.index(site.projection)] = share
    top = float(np.nanmax(grid)) or 1.0
    mesh = panel.pcolormesh(
        grid, cmap=colormaps["cividis"].resampled(32), vmin=0, vmax=top, edgecolors="none", linewidth=0
    )
    if len(layers) <= _MAX_LABELLED_LAYERS:
        for site, (share, text) in cells.items():
            color = "white" if share < 0.5 * top else "black"
            x, y = names.index(site.projection) + 0.5, rows[site.layer] + 0.5
            panel.text(x, y, text, color=color, ha="center", va="center", fontsize=8)
    panel.invert_yaxis()
    panel.xaxis.tick_top()
    panel.set_xticks([x + 0.5 for x in range(len(names))], names)
    step = max(1, math.ceil(len(layers) / 40))
    panel.set_yticks([row + 0.5 for row in range(0, len(layers), step)], [str(layer) for layer in layers[::step]])
    panel.set_ylabel("layer")
    panel.tick_params(length=0)
    panel.spines[["left", "bottom"]].set_visible(False)
    bar = figure.colorbar(mesh, ax=panel, location="bottom", aspect=40, shrink=0.8, pad=0.02, fraction=0.35 / height)
    bar.set_label(title)
    percent_axis(bar.ax.xaxis)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    # Without edges of their own, viewers leave gaps between the steps.
    bar.solids.set_edgecolor("face")
    return figure


def _nothing(figure: Figure, panel: Axes, why: str) -> Figure:
    panel.set_axis_off()
    panel.text(0.5, 0.5, why, ha="center", va="center", transform=panel.transAxes)
    return figure


@styled
def overlap_curve(overlap: Overlap) -> Figure:
    """Draw the share of the union over top ratios: all projections, each of them, and what chance would give.

    Ratios at which a projection has fewer than ten neurons in the union are shaded; the axes fit the others.
    """
    figure, (panel,) = new_figure(3.4)
    points = sorted(overlap.curve, key=lambda point: point.rule["top_ratio"])
    ratios = [point.rule["top_ratio"] for point in points]
    curves: dict[tuple[float, ...], list[str]] = {}
    for name in PROJECTIONS:
        counts = [point.projections.get(name, (0, 0, 0)) for point in points]
        if any(any(point) for point in counts):
            # Equal curves lie on each other: a profile ranks fwd.up and fwd.down by the same impacts.
            curves.setdefault(tuple(_share(*point) for point in counts), []).append(name)
    for shares, names in curves.items():
        color, dash = _LINES[names[0]]
        panel.plot(ratios, shares, color=color, linestyle=dash, linewidth=1.3, label=", ".join(names))
    panel.plot(ratios, _numbers(point.share for point in points), color=INK, linewidth=2.5, label="all")
    expected = _numbers(point.chance_share for point in points)
    panel.plot(ratios, expected, color=CHANCE, linewidth=1.5, marker=".", markersize=3, label="all, by chance")
    few = [ratio for ratio, point in zip(ratios, points, strict=True) if any(map(_is_few, point.projections.values()))]
    if few:
        label = f"a projection with fewer than {_FEW} neurons"
        panel.axvspan(ratios[0], max(few), facecolor=INK, alpha=0.15, linewidth=0, zorder=0, label=label)
    counts = [(point.shared, *point.only) for point in points]
    counts += [count for point in points for count in point.projections.values()]
    fair = [_share(*count) for count in counts if not _is_few(count)] + [share for share in expected if share < 1]
    panel.set(xlabel="top ratio", ylabel="shared, share of the union", xlim=(ratios[0], ratios[-1]))
    panel.set_ylim(0, min(1.02, 1.05 * max(fair, default=1.0)) or 1.0)
    percent_axis(panel.yaxis)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _is_few(counts: Sequence[int]) -> bool:
    return sum(counts) < _FEW


def _share(shared: int, *only: int) -> float:
    # A value that equals itself, so that equal curves are found; matplotlib leaves it out as it does NaN.
    return shared / (shared + sum(only)) if shared + sum(only) else math.inf


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


@styled
def study_intervals(study: Study, metric: str) -> Figure:
    """Draw mean and interval of every condition on one metric, and a line at the reference.

    All metrics in per cent have the same axis, so that their figures can be compared.
    """
    rows = [condition for condition in study.conditions if metric in condition.metrics]
    labels = [fill(printable(condition.name), 26) for condition in rows]
    height = min(_MAX_HEIGHT, 0.9 + sum(0.12 + 0.17 * max(1, len(label.splitlines())) for label in labels))
    figure, (panel,) = new_figure(height)
    factor, unit = scale(study, metric)
    for row, condition in enumerate(rows):
        mean = condition.metrics[metric].mean
        low, estimate, high = (factor * value for value in (mean.low, mean.estimate, mean.high))
        color, marker = _ROLES[condition.role]
        panel.plot([low, high], [row, row], color=color, linewidth=1.8, solid_capstyle="butt")
        panel.plot([estimate], [row], color=color, marker=marker, markersize=6)
        if condition.role == "reference":
            panel.axvline(estimate, color=INK, linewidth=0.8, linestyle=":", zorder=0)
    panel.set_yticks(range(len(rows)), labels)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    if unit:
        alike = [
            100 * bound
            for condition in study.conditions
            for name, measured in condition.metrics.items()
            if scale(study, name)[1] == unit
            for bound in (measured.mean.low, measured.mean.high)
        ]
        margin = 0.05 * (max(alike) - min(alike)) or 1
        panel.set_xlim(min(alike) - margin, max(alike) + margin)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.set_xlabel(f"{printable(metric)}{unit}, {100 * study.level:g} % intervals")
    return figure


@styled
def token_bars(neuron: AmplifiedNeuron, count: int = 12) -> Figure:
    """Draw the tokens that amplifying a neuron makes more frequent: log-odds as bars, with both counts."""
    tokens = leading(neuron, count)
    figure, (panel,) = new_figure(0.75 + 0.21 * max(2, len(tokens)))
    if not tokens:
        return _nothing(figure, panel, "no token is more frequent")
    panel.barh(range(len(tokens)), [token.log_odds for token in tokens], color=COLORS[0], height=0.7)
    counts = [f"{token.amplified}:{token.plain}" for token in tokens]
    for axes, labels in ((panel, [quoted(token.token) for token in tokens]), (panel.twinx(), counts)):
        axes.set_yticks(range(len(tokens)), labels, fontsize=8)
        axes.set_ylim(len(tokens) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
    panel.set_xlabel("log-odds; at the right, how often amplified:plain")
    return figure
