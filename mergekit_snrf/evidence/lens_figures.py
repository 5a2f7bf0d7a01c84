"""Figures, tables and sentences of a logit lens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit_snrf.errors import printable
from mergekit_snrf.evidence.drawing import COLORS, INK, Drawing, new_figure, percent_axis, plain_axis, styled
from mergekit_snrf.evidence.results import KINDS, Lens
from mergekit_snrf.evidence.wording import Table, percent, quoted, without_folders

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVES = (*KINDS, "probability", "most probable")
_LOOKS = dict(zip(_CURVES, zip(COLORS, "os^Dv", strict=True), strict=True))
_PANELS = {
    "entropy": "entropy, nats",
    "kl": "KL(last layer || layer), nats",
    "agrees": "same top token as the last layer",
}
_FREQUENT = 5


def lens_drawings(lens: Lens) -> dict[str, Drawing]:
    """Return the figures of a lens by the names of their files: a line a kind, the answer's tokens, the attention."""
    parts = [f"{one.kind} {', '.join(f'{value:.2f}' for value in one.entropy)}" for one in lens.kinds]
    charts = "Line charts of entropy, KL to the last layer and agreement with it by layer"
    text = f"{charts}. Entropy from layer 0 on: {'; '.join(parts)}."
    drawings = {"lens": Drawing(_by_kind(lens), "By layer, a line for each kind of position", text)}
    if lens.answer is not None:
        values = ", ".join(
            f"{100 * p:.1f} % (mean rank {r:.1f})"
            for p, r in zip(lens.answer.probability, lens.answer.rank, strict=True)
        )
        text = f"Line chart of the probability of the answer's tokens by layer from 0 on: {values}."
        drawings["answer"] = Drawing(_answer(lens), "The tokens of the answer, by layer", text)
    if lens.image_attention is not None:
        values = ", ".join(map(percent, lens.image_attention))
        text = f"Line chart of the share of text tokens' attention that goes to images, by layer from 1 on: {values}."
        drawings["attention"] = Drawing(_attention(lens), "Attention of text to images, by layer", text)
    return drawings


@styled
def _by_kind(lens: Lens) -> Figure:
    figure, panels = new_figure(6.6, rows=len(_PANELS))
    for panel, (name, label) in zip(panels, _PANELS.items(), strict=True):
        curves: dict[str, list[float]] = {one.kind: getattr(one, name) for one in lens.kinds}
        _plot(panel, curves, range(lens.layers + 1), label)
    panels[-1].set_ylim(0, 1.02)
    percent_axis(panels[-1].yaxis)
    panels[-1].set_xlabel("layer (0: before the first)")
    labels = {one.kind: f"{one.kind} ({one.tokens} positions)" for one in lens.kinds}
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, [labels[name] for name in names], loc="outside lower center", ncols=2, fontsize=8)
    return figure


@styled
def _answer(lens: Lens) -> Figure:
    assert lens.answer is not None
    figure, panels = new_figure(4.8, rows=2)
    shares = {"probability": lens.answer.probability, "most probable": lens.answer.hits}
    _plot(panels[0], shares, range(lens.layers + 1), "of the answer's tokens")
    panels[0].set_ylim(0, 1.02)
    percent_axis(panels[0].yaxis)
    panels[0].legend(fontsize=8)
    _plot(panels[1], {"rank": lens.answer.rank}, range(lens.layers + 1), "mean rank (1: most probable)")
    panels[1].set_yscale("log")
    plain_axis(panels[1].yaxis)
    panels[1].set_xlabel("layer (0: before the first)")
    return figure


@styled
def _attention(lens: Lens) -> Figure:
    assert lens.image_attention is not None
    figure, (panel,) = new_figure(2.6)
    _plot(panel, {"image": lens.image_attention}, range(1, lens.layers + 1), "attention of text to images")
    panel.set_ylim(0, None)
    percent_axis(panel.yaxis)
    panel.set_xlabel("layer")
    return figure


def _plot(panel: Axes, curves: Mapping[str, Sequence[float]], layers: range, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for name, values in curves.items():
        color, marker = _LOOKS.get(name, (INK, "o"))
        panel.plot(layers, values, color=color, marker=marker, markersize=3.5, linewidth=1.3, label=name)
    panel.set_ylabel(label, fontsize=8)
    panel.set_xlim(layers[0] - 0.2, layers[-1] + 0.2)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(color=INK, alpha=0.15, linewidth=0.6)


def lens_table(lens: Lens) -> Table:
    """Return entropy, KL and agreement of every kind, the answer's tokens, and the attention to images, by layer."""
    header = ["layer"]
    columns: list[list[str]] = []
    for one in lens.kinds:
        header += [f"{one.kind}: entropy", "KL", "agrees"]
        columns += [[f"{v:.3f}" for v in one.entropy], [f"{v:.3f}" for v in one.kl], [percent(v) for v in one.agrees]]
    if lens.answer is not None:
        header += ["answer's tokens: rank", "probability", "most probable"]
        shares = ([percent(v) for v in curve] for curve in (lens.answer.probability, lens.answer.hits))
        columns += [[f"{v:.1f}" for v in lens.answer.rank], *shares]
    if lens.image_attention is not None:
        header.append("text to images")
        columns.append(["-", *map(percent, lens.image_attention)])
    rows = [(layer, *(column[layer] for column in columns)) for layer in range(lens.layers + 1)]
    return Table("By layer; entropy and KL to the last layer in nats", header, rows)


def frequent_table(lens: Lens) -> Table:
    """Return the most frequent of the most probable tokens by layer and kind."""
    rows = [
        (
            layer,
            *(
                ", ".join(f"{printable(quoted(token))} {count}" for token, count in one.top[layer][:_FREQUENT])
                for one in lens.kinds
            ),
        )
        for layer in range(lens.layers + 1)
    ]
    header = ("layer", *(one.kind for one in lens.kinds))
    return Table("Most frequent top tokens, with counts", header, rows, frozenset(range(1, len(header))), folded=True)


def lens_sentences(lens: Lens) -> list[str]:
    """Say what was read, and what the curves must not be taken for."""
    counts = ", ".join(f"{one.tokens} {one.kind}" for one in lens.kinds)
    read = f"{without_folders(lens.model)} on {lens.count} probes with its own answers: {counts} positions."
    return [
        read,
        "Each layer's output goes through the final norm and head, which were trained for the last layer only: the "
        "lens shows what can be read there, not what the layer does.",
    ]
