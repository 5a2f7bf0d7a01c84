"""Figures: what they show is compared with the results, and what they say with what they show."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from made_results import ablation, amplification, comparison, measured_ranks, profile_of, tuning
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.text import Text

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence import curves, drawing, figures, wording
from mergekit_snrf.evidence.items import Items
from mergekit_snrf.evidence.overlap import overlap_of, overlaps, total
from mergekit_snrf.evidence.results import AmplifiedNeuron, Overlap, SiteOverlap, Study, TokenOdds
from mergekit_snrf.evidence.study import Row, Setup, build_study
from mergekit_snrf.evidence.sweep import BASE, LINEAR, REGMEAN
from mergekit_snrf.neurons.sets import PROJECTIONS, NeuronSet, Site

PLACES = [(layer, place, name) for layer in range(4) for place, name in enumerate(PROJECTIONS)]
MASK = NeuronSet({Site(layer, name): torch.arange(20) < 3 * layer + place for layer, place, name in PLACES})


def made_overlap() -> Overlap:
    profiles = [profile_of(measured_ranks(seed), name) for seed, name in ((1, "target"), (2, "source"))]
    return overlaps(profiles, top_ratio=0.2, curve=True)[0]


OVERLAP = made_overlap()
PROMOTED = amplification().neurons[0]
DRAWN: dict[str, tuple[Callable[[], Figure], str]] = {
    "diagram": (lambda: figures.overlap_diagram(OVERLAP), wording.overlap_text(OVERLAP)),
    "overlap map": (lambda: figures.overlap_map(OVERLAP), wording.overlap_map_text(OVERLAP)),
    "mask map": (lambda: figures.mask_map(MASK), wording.mask_map_text(MASK)),
    "curve": (lambda: figures.overlap_curve(OVERLAP), wording.curve_text(OVERLAP)),
    "study": (lambda: figures.study_intervals(ablation(), "reasoning"), wording.study_text(ablation(), "reasoning")),
    "bars": (lambda: figures.token_bars(PROMOTED), wording.token_bars_text(PROMOTED)),
}


POINTS: dict[str, tuple[Any, float | None, float, float]] = {
    # curve, strength, R, P
    "target": (None, None, 0.3, 0.97),
    "regmean, keep 3": (REGMEAN, 3.0, 0.6, 0.96),
    "linear, beta 0.5": (LINEAR, 0.5, 0.7, 0.83),
    "linear, beta 1": (LINEAR, 1.0, 0.9, 0.67),
    "regmean, keep 30": (REGMEAN, 30.0, 0.43, 0.97),
    "regmean, keep 1": (REGMEAN, 1.0, 0.75, 0.92),
    "regmean from base, keep 1": (BASE, 1.0, 0.64, 0.92),
    "DARE, drop rate 0.5": (None, None, 0.91, 0.66),
}


def made_tradeoff() -> Study:
    roles = {"target": "reference", "regmean, keep 3": "claim"}
    rows: list[Any] = []
    scores = {}
    for name, (curve, strength, *means) in POINTS.items():
        settings = {} if curve is None else {curve.key: strength}
        role: Any = roles.get(name, "control")
        rows.append(Row(name, role, curve=curve, strength=strength, settings=settings))
        scores[name] = [
            {m: Items(tuple(float(n < 100 * mean) for n in range(100))) for m, mean in zip("RP", means, strict=True)}
        ]
    return build_study(Setup("comparison", "m", "e"), rows, scores, {"R": "gain", "P": "keep"})


TRADED = made_tradeoff()


def texts(drawing: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(drawing).iter() if element.tag.endswith("}text")]


@pytest.mark.parametrize("name", DRAWN)
def test_svg(name: str) -> None:
    draw, text = DRAWN[name]
    drawn = drawing.svg(draw(), "A <title>", text, "p7")
    root = ElementTree.fromstring(drawn)
    tags = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert not {"script", "style", "image", "foreignObject", "metadata", "a"} & set(tags)
    assert root.get("role") == "img"
    assert root.get("aria-label") == f"A <title>. {text}"
    assert [child.tag.rpartition("}")[2] for child in root[:2]] == ["title", "desc"]
    assert [child.text for child in root[:2]] == ["A <title>", text]
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(one.startswith("p7-") for one in ids)
    references = re.findall(r'(?:href="|url\()#([^")]+)', drawn)
    assert set(references) <= set(ids)
    assert "http" not in drawn.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"20\d\d-\d\d-\d\d", drawn)
    assert drawn == drawing.svg(draw(), "A <title>", text, "p7")
    colored = drawing.svg(draw(), "title", "text", ink="currentColor")
    assert drawing.INK not in colored
    assert "currentColor" in colored


def test_state_of_matplotlib_is_left_alone() -> None:
    from matplotlib import pyplot

    with mpl.rc_context({"font.size": 31, "text.parse_math": True, "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        drawings = [drawing.svg(draw(), name, text) for name, (draw, text) in DRAWN.items()]
        assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == []
    assert drawings == [drawing.svg(draw(), name, text) for name, (draw, text) in DRAWN.items()]


@pytest.mark.parametrize(("package", "name"), [("matplotlib_venn", "diagram"), ("matplotlib.figure", "bars")])
def test_missing_packages_are_named(package: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SnrfError, match=rf"need the package {package}; .*mergekit-snrf\[analysis\]"):
        DRAWN[name][0]()


def contrast(first: str, second: str) -> float:
    """WCAG 2 contrast ratio of two colours."""

    def luminance(color: str) -> float:
        channels = [
            value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4
            for value in mpl.colors.to_rgb(color)
        ]
        return float(np.dot((0.2126, 0.7152, 0.0722), channels))

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#15181c"])
def test_colors_are_seen_on_light_and_dark(page: str) -> None:
    assert min(contrast(color, page) for color in (drawing.INK, drawing.CHANCE, *drawing.COLORS)) >= 3


@pytest.mark.parametrize("name", ["overlap map", "mask map"])
def test_cell_texts_are_readable(name: str) -> None:
    panel = DRAWN[name][0]().axes[0]
    mesh = panel.collections[0]
    values = mesh.get_array()
    ratios = []
    for text in panel.texts:
        column, row = (int(coordinate) for coordinate in text.get_position())
        cell = mpl.colors.to_hex(mesh.to_rgba(values[row, column]))
        ratios.append(contrast(text.get_color(), cell))
    assert min(ratios) >= 4


def lens(r: float, s: float, distance: float) -> float:
    """Area that two circles have in common, by integrating numerically over vertical slices."""
    x = np.linspace(-r, r, 40_001)
    first = np.sqrt(np.maximum(r**2 - x**2, 0))
    second = np.sqrt(np.maximum(s**2 - (x - distance) ** 2, 0))
    return float(2 * np.minimum(first, second).sum() * (x[1] - x[0]))


sizes = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60)).filter(any)


@settings(max_examples=10, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(sizes)
def test_areas_are_true(counts: tuple[int, int, int]) -> None:
    only_first, shared, only_second = counts
    place = torch.arange(200)
    first = place < only_first + shared
    second = (place >= only_first) & (place < sum(counts))
    overlap = overlap_of(NeuronSet({Site(0, "attn.q"): first}), NeuronSet({Site(0, "attn.q"): second}), ("a", "b"), {})
    measured, chance = figures.overlap_diagram(overlap).axes
    scales = []
    for panel, common in ((measured, shared), (chance, (only_first + shared) * (only_second + shared) / 200)):
        circles = [patch for patch in panel.patches if isinstance(patch, Circle)][-2:]
        (r, s), (a, b) = [one.radius for one in circles], [one.center for one in circles]
        areas = [math.pi * r**2, math.pi * s**2, lens(r, s, math.dist(a, b))]
        numbers = [only_first + shared, only_second + shared, common]
        scale = sum(areas[:2]) / sum(numbers[:2])
        assert areas == pytest.approx([scale * number for number in numbers], abs=2e-3 * scale * sum(counts))
        assert panel.get_aspect() == 1
        scales.append(scale)
        assert panel.get_xlim() == measured.get_xlim()
        assert panel.get_ylim() == measured.get_ylim()
    assert scales[0] == pytest.approx(scales[1])


def test_diagram_says_the_counts() -> None:
    counts = total(OVERLAP.sites)
    shown = texts(drawing.svg(figures.overlap_diagram(OVERLAP), "title", "text"))
    expected = round(counts.chance)
    measured = [str(count) for count in (counts.only[0], counts.shared, counts.only[1])]
    by_chance = [str(counts.shared + only - expected) for only in counts.only]
    numbers = [text for text in shown if text.isdigit()]
    assert numbers == [*measured, by_chance[0], str(expected), by_chance[1]]
    assert {"target", "source"} <= set(shown)
    text = wording.overlap_text(OVERLAP)
    assert f"{counts.only[0]} neurons of target only, {counts.shared} shared, {counts.only[1]} of source only" in text
    assert f"would share {counts.chance:.1f}" in text


def test_map_of_a_mask() -> None:
    panel = figures.mask_map(MASK).axes[0]
    grid = panel.collections[0].get_array()
    expected = [[MASK.count(Site(layer, name)) for name in PROJECTIONS] for layer in range(4)]
    assert np.allclose(grid * 20, expected)
    written = {tuple(int(c) for c in text.get_position()): int(text.get_text()) for text in panel.texts}
    assert written == {(x, y): expected[y][x] for x in range(5) for y in range(4)}
    assert [label.get_text() for label in panel.get_xticklabels()] == list(PROJECTIONS)
    assert panel.yaxis_inverted()
    assert "attn.k 22 of 80 (27.5 %)" in wording.mask_map_text(MASK)


def test_map_of_an_overlap() -> None:
    panel = figures.overlap_map(OVERLAP).axes[0]
    grid = panel.collections[0].get_array()
    names = list(PROJECTIONS)
    for site in OVERLAP.sites:
        union = site.shared + sum(site.only)
        value = grid[site.layer, names.index(site.projection)]
        assert np.ma.is_masked(value) if union == 0 else value == pytest.approx(site.shared / union)


def test_curve_is_the_points() -> None:
    lines = {line.get_label(): line for line in figures.overlap_curve(OVERLAP).axes[0].lines}
    assert list(lines) == ["attn.q", "attn.k", "attn.v", "fwd.up, fwd.down", "all", "all, by chance"]
    for row, point in enumerate(OVERLAP.curve):
        shared, a, b = point.projections["attn.k"]
        if shared + a + b:
            assert lines["attn.k"].get_ydata()[row] == shared / (shared + a + b)
        assert lines["all"].get_xdata()[row] == point.rule["top_ratio"]
        if point.union:
            assert lines["all"].get_ydata()[row] == point.shared / point.union
            expected = point.chance / (2 * point.shared + sum(point.only) - point.chance)
            assert lines["all, by chance"].get_ydata()[row] == pytest.approx(expected)
    assert lines["all, by chance"].get_color() not in {
        line.get_color() for name, line in lines.items() if "chance" not in name
    }
    styles = {(line.get_linestyle(), line.get_marker(), line.get_linewidth()) for line in lines.values()}
    assert len(styles) >= 5


def test_axes_of_the_curve_fit_what_is_no_noise() -> None:
    """Ratios with a projection of fewer than ten neurons are shaded; what the others show is inside the axes."""
    panel = figures.overlap_curve(OVERLAP).axes[0]
    points = {point.rule["top_ratio"]: point for point in OVERLAP.curve}
    noisy = [ratio for ratio, point in points.items() if min(map(sum, point.projections.values())) < 10]
    (shade,) = panel.patches
    assert 0 < len(noisy) < len(points)
    assert shade.get_extents().transformed(panel.transData.inverted()).intervalx == pytest.approx(
        [min(points), max(noisy)]
    )
    shares = [
        shared / (shared + a + b)
        for point in points.values()
        for shared, a, b in (*point.projections.values(), (point.shared, *point.only))
        if shared + a + b >= 10
    ]
    assert max(shares) < panel.get_ylim()[1] < 1.1 * max(shares)
    assert panel.get_xlim() == (min(points), max(points))


def test_intervals_in_per_cent_have_one_axis() -> None:
    limits = [figures.study_intervals(ablation(), metric).axes[0].get_xlim() for metric in ("reasoning", "perception")]
    assert limits[0] == limits[1]
    assert limits[0][0] < 100 * 0.012
    assert limits[0][1] > 98


@pytest.mark.parametrize("metric", ["reasoning", "perception"])
def test_intervals_of_a_study(metric: str) -> None:
    study = ablation()
    panel = figures.study_intervals(study, metric).axes[0]
    means = [condition.metrics[metric].mean for condition in study.conditions]
    bars = [line for line in panel.lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]]
    assert [tuple(bar.get_xdata()) for bar in bars] == [(100 * mean.low, 100 * mean.high) for mean in means]
    points = [line for line in panel.lines if len(line.get_xdata()) == 1]
    assert [point.get_xdata()[0] for point in points] == [100 * mean.estimate for mean in means]
    assert len({point.get_marker() for point in points}) == 3
    labels = [label.get_text().replace("\n", " ") for label in panel.get_yticklabels()]
    assert labels == [condition.name for condition in study.conditions]
    text = wording.study_text(study, metric)
    assert all(f"{c.name} {100 * c.metrics[metric].mean.estimate:.1f} [" in text for c in study.conditions)


def test_conditions_without_the_metric_are_left_out() -> None:
    study = comparison()
    shortened = study.conditions[1].model_copy(update={"metrics": {}})
    study = study.model_copy(update={"conditions": [study.conditions[0], shortened, *study.conditions[2:]]})
    labels = [label.get_text() for label in figures.study_intervals(study, "reasoning").axes[0].get_yticklabels()]
    assert "SNRF" not in labels
    assert len(labels) == len(study.conditions) - 1
    assert "SNRF" not in wording.study_text(study, "reasoning")


def test_bars_of_tokens() -> None:
    panel, right = figures.token_bars(PROMOTED).axes
    rising = [token for token in PROMOTED.tokens if token.log_odds > 0]
    assert [bar.get_width() for bar in panel.patches] == [token.log_odds for token in rising]
    assert [label.get_text() for label in panel.get_yticklabels()] == [repr(token.token) for token in rising]
    assert [label.get_text() for label in right.get_yticklabels()] == [f"{one.amplified}:{one.plain}" for one in rising]
    text = wording.token_bars_text(PROMOTED)
    assert "' sum' 3.10 (41:2)" in text
    assert "'\\n' 1.35 (40:21)" in text


def test_trade_off_is_the_points_of_the_study() -> None:
    (drawn_one,) = curves.tradeoff_drawings(TRADED).values()
    (panel,) = drawn_one.figure.axes
    lines = {str(line.get_label()): np.array(line.get_xydata()) for line in panel.get_lines()}
    expected = {
        "regmean: keep 30 to 1": ["target", "regmean, keep 30", "regmean, keep 3", "regmean, keep 1"],
        "linear: beta 0.5 to 1": ["target", "linear, beta 0.5", "linear, beta 1"],
        "regmean from base: keep 1 to 1": ["target", "regmean from base, keep 1"],
        "target": ["target"],
        "regmean, keep 3 (the recipe)": ["regmean, keep 3"],
    }
    for label, names in expected.items():
        places = [[100 * POINTS[name][3], 100 * POINTS[name][2]] for name in names]
        np.testing.assert_allclose(lines[label], places, atol=1e-9)
    drawn = {tuple(np.round(place, 9)) for line in lines.values() for place in line}
    assert (66.0, 91.0) in drawn
    # Every point but the target has the paired intervals of its changes.
    bars = [container for container in panel.containers if len(container) == 3]
    assert len(bars) == len(POINTS) - 1
    for name in POINTS:
        assert name in drawn_one.text
    no_curve = TRADED.model_copy(update={"conditions": [c for c in TRADED.conditions if c.curve is None]})
    assert curves.tradeoff_drawings(no_curve) == {}


@pytest.mark.parametrize("scores", [False, True])
def test_choice_of_keep_is_drawn(scores: bool) -> None:
    made = curves.tuning_drawing(tuning(scores))
    panels = made.figure.axes
    assert len(panels) == 1 + scores
    lines = {str(line.get_label()): np.array(line.get_xydata()) for line in panels[0].get_lines()}
    assert lines["mean of the kinds"][:, 1] == pytest.approx([0.03 / keep for keep in lines["color"][:, 0]])
    assert "chosen keep 3" in made.text
    assert "mathdefault" not in drawing.svg(made.figure, made.caption, made.text)


BIG = 1_234_567
LONG = "a name of a model that is as long as names of models get, with its revision"
FULL = {
    **{name: draw for name, (draw, _) in DRAWN.items()},
    "equal sets": lambda: figures.overlap_diagram(of_sizes(BIG, 0, 0)),
    "one neuron": lambda: figures.overlap_diagram(of_sizes(1, BIG, 0)),
    "apart": lambda: figures.overlap_diagram(of_sizes(0, BIG, 3)),
    "long tokens": lambda: figures.token_bars(promoted(["token" * 9 + str(place) for place in range(30)])),
    "long names": lambda: figures.study_intervals(renamed(comparison()), "reasoning"),
    "trade-off": lambda: next(iter(curves.tradeoff_drawings(TRADED).values())).figure,
    "keep": lambda: curves.tuning_curve(tuning(False)),
    "keep with scores": lambda: curves.tuning_curve(tuning(True)),
    "many layers": lambda: figures.mask_map(NeuronSet({Site(n, "attn.k"): torch.arange(9999) > 0 for n in range(80)})),
}


def of_sizes(shared: int, first: int, second: int) -> Overlap:
    site = SiteOverlap(
        layer=0, projection="attn.q", neurons=9 * BIG, shared=shared, only=(first, second), chance=shared / 2
    )
    return OVERLAP.model_copy(update={"sites": [site], "names": (LONG, LONG[::-1])})


def promoted(tokens: list[str]) -> AmplifiedNeuron:
    odds = [TokenOdds(token=token, log_odds=3.0, amplified=BIG, plain=BIG) for token in tokens]
    return AmplifiedNeuron(neuron="attn.q.L0.N1", totals=(9, 9), tokens=odds)


def renamed(study: Study) -> Study:
    conditions = [one.model_copy(update={"name": f"{LONG} {place}"}) for place, one in enumerate(study.conditions)]
    return study.model_copy(update={"conditions": conditions})


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", FULL)
def test_no_texts_overlap_and_all_are_inside(name: str) -> None:
    figure = FULL[name]()
    figure.canvas.draw()
    inside = figure.bbox.padded(1)
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    hidden = {text for panel in figure.axes for text in hidden_ticks(panel)}
    shown = [text for text in shown if text not in hidden]
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    assert len(boxes) > 3
    assert [word for word, box in boxes if not (inside.contains(*box.min) and inside.contains(*box.max))] == []
    pairs = [(a, b) for place, (a, first) in enumerate(boxes) for b, second in boxes[:place] if first.overlaps(second)]
    assert pairs == []


def hidden_ticks(panel: Axes) -> set[Text]:
    """Labels of ticks beyond the limits of an axis, which matplotlib does not draw."""
    return {
        tick.label1
        for axis, (low, high) in ((panel.xaxis, sorted(panel.get_xlim())), (panel.yaxis, sorted(panel.get_ylim())))
        for tick in axis.get_major_ticks()
        if not low <= tick.get_loc() <= high or not panel.axison
    }


def test_nothing_to_draw() -> None:
    empty = NeuronSet({Site(0, "attn.q"): torch.zeros(4, dtype=torch.bool)})
    nothing = overlap_of(empty, empty, ("a", "b"), {"top_ratio": 0.0})
    odds = TokenOdds(token="a", log_odds=-1, amplified=1, plain=3)
    falling = AmplifiedNeuron(neuron="attn.q.L0.N1", totals=(9, 9), tokens=[odds])
    for figure, text, said in (
        (figures.overlap_diagram(nothing), wording.overlap_text(nothing), "no neurons"),
        (figures.overlap_map(nothing), wording.overlap_map_text(nothing), "no neurons"),
        (figures.mask_map(NeuronSet({})), wording.mask_map_text(NeuronSet({})), "no neurons"),
        (figures.token_bars(falling), wording.token_bars_text(falling), "no token is more frequent"),
    ):
        assert said in texts(drawing.svg(figure, "title", text))


def test_strange_names_and_tokens_are_drawn_as_they_are() -> None:
    names = ("$\\frac{1}{$ <b>&amp;", "a\x00\x1b[0m\u202eb")
    overlap = OVERLAP.model_copy(update={"names": names})
    shown = texts(drawing.svg(figures.overlap_diagram(overlap), names[0], wording.overlap_text(overlap)))
    assert {"$\\frac{1}{$ <b>&amp;", "a\\x00\\x1b[0m\\u202eb"} <= set(shown)
    tokens = [TokenOdds(token=text, log_odds=1, amplified=1, plain=0) for text in ("$x^{$", "y" * 5000, "\ud7ff\uffff")]
    neuron = AmplifiedNeuron(neuron="attn.q.L0.N1", totals=(9, 9), tokens=tokens)
    shown = texts(drawing.svg(figures.token_bars(neuron), "title", wording.token_bars_text(neuron)))
    assert {"'$x^{$'", f"'{'y' * 29}…'", "'\\ud7ff\\uffff'"} <= set(shown)


def test_deep_models_stay_drawable(tmp_path: Path) -> None:
    deep = NeuronSet({Site(layer, "attn.k"): torch.arange(8) < layer % 8 for layer in range(2000)})
    saved = drawing.save(figures.mask_map(deep), tmp_path, "deep", "title", "text")
    assert [path.name for path in saved] == ["deep.svg", "deep.png"]
