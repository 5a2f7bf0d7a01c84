"""Figures of domain-specific neurons: where they are, and what happens without them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from mergekit_snrf.errors import printable
from mergekit_snrf.evidence.ablate import CLAIM, RANDOM
from mergekit_snrf.evidence.domains import PLACES, changes
from mergekit_snrf.evidence.drawing import COLORS, Drawing, new_figure, styled
from mergekit_snrf.evidence.results import DomainAblation
from mergekit_snrf.evidence.wording import scale
from mergekit_snrf.profiling.result.domains import Chosen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LONGEST_NAME = 14


def counts_drawing(chosen: Sequence[Chosen]) -> Drawing:
    """Draw how many neurons of every layer are specific to each domain, a panel for each module."""
    sums = []
    for one in chosen:
        counts = zip(one.sets, one.counts.sum(1).tolist(), strict=True)
        sums.append(f"{PLACES[one.module]}: {', '.join(f'{name} {count}' for name, count in counts)}")
    text = printable(f"Lines of domain-specific neurons by layer. Over all layers, {'; '.join(sums)}.")
    return Drawing(_counts(chosen), "Domain-specific neurons by layer", text)


@styled
def _counts(chosen: Sequence[Chosen]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, panels = new_figure(0.5 + 1.6 * len(chosen), rows=len(chosen))
    for panel, one in zip(panels, chosen, strict=True):
        styles = zip(cycle(COLORS), cycle(_MARKERS), strict=False)
        for name, counts, (color, marker) in zip(one.sets, one.counts.tolist(), styles, strict=False):
            panel.plot(counts, color=color, marker=marker, markersize=4, linewidth=1.2, label=printable(name))
        panel.set_title(f"specific in {PLACES[one.module]}")
        panel.set(ylabel="neurons", ylim=(0, None), xlim=(-0.4, len(one.layers) - 0.6))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    panels[-1].set_xlabel("layer")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def matrix_drawing(result: DomainAblation) -> Drawing:
    """Draw the change of every metric without the neurons of each domain, and without as many random ones."""
    parts = []
    for module in dict.fromkeys(one.module for one in result.studies):
        for domain, by_condition in changes(result, module).items():
            cells = ", ".join(f"{metric} {value:+.1f}" for metric, value in by_condition[CLAIM].items())
            parts.append(f"without {domain} in {PLACES[module]}: {cells}")
    text = printable(
        f"Heat maps of changes without the neurons of a domain, beside random neurons; {'; '.join(parts)}."
    )
    return Drawing(_matrix(result), "Every domain's neurons off, on the items of every domain", text)


@styled
def _matrix(result: DomainAblation) -> Figure:
    modules = list(dict.fromkeys(one.module for one in result.studies))
    found = {module: changes(result, module) for module in modules}
    shown = [one for domains in found.values() for both in domains.values() for one in both.values()]
    widest = max(abs(value) for one in shown for value in one.values())
    height = 0.9 + sum(0.75 + 0.22 * len(domains) for domains in found.values())
    figure, panels = new_figure(height, columns=2, rows=len(modules))
    mesh = None
    for row, module in enumerate(modules):
        names = list(found[module])
        for panel, condition in zip(panels[2 * row : 2 * row + 2], (CLAIM, RANDOM), strict=True):
            metrics = list(found[module][names[0]][condition])
            grid = [[found[module][name][condition][metric] for metric in metrics] for name in names]
            mesh = panel.pcolormesh(grid, cmap="RdBu", vmin=-(widest or 1), vmax=widest or 1, edgecolors="none")
            for y, values in enumerate(grid):
                for x, value in enumerate(values):
                    color = "white" if abs(value) > 0.6 * widest else "black"
                    panel.text(
                        x + 0.5,
                        y + 0.5,
                        f"{round(value) + 0.0:+.0f}",
                        color=color,
                        ha="center",
                        va="center",
                        fontsize=8,
                    )
            panel.invert_yaxis()
            panel.set_title("as many random neurons" if condition == RANDOM else f"in {PLACES[module]}")
            panel.set_xticks(
                [x + 0.5 for x in range(len(metrics))], [_short(metric) for metric in metrics], rotation=30
            )
            panel.set_yticks([y + 0.5 for y in range(len(names))], [_short(name) for name in names])
            panel.tick_params(length=0, labelsize=8, labelleft=condition == CLAIM)
            panel.spines[["left", "bottom"]].set_visible(False)
        panels[2 * row].set_ylabel("without neurons of")
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=panels, location="bottom", aspect=40, shrink=0.8, fraction=0.25 / height)
    points = all(scale(one.study, metric)[0] == 100 for one in result.studies for metric in one.study.items)
    bar.set_label(f"change{' in points' if points else ''} on the items of each column")
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set_edgecolor("face")
    return figure


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
