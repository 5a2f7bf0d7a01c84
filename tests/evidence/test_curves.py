"""The figures of trade-offs and of the choice of keep show the numbers of their results, and no text covers another."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from made_results import tuning
from matplotlib.figure import Figure
from matplotlib.text import Text

from mergekit_snrf.evidence import curves
from mergekit_snrf.evidence.drawing import svg
from mergekit_snrf.evidence.items import Items
from mergekit_snrf.evidence.results import Study
from mergekit_snrf.evidence.study import Row, Setup, build_study
from mergekit_snrf.evidence.sweep import BASE, LINEAR, REGMEAN

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


@pytest.fixture(scope="module")
def study() -> Study:
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


def test_trade_off_is_the_points_of_the_study(study: Study) -> None:
    (drawing,) = curves.tradeoff_drawings(study).values()
    (panel,) = drawing.figure.axes
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
        assert name in drawing.text
    no_curve = study.model_copy(update={"conditions": [c for c in study.conditions if c.curve is None]})
    assert curves.tradeoff_drawings(no_curve) == {}


@pytest.mark.parametrize("scores", [False, True])
def test_choice_of_keep_is_drawn(scores: bool) -> None:
    drawing = curves.tuning_drawing(tuning(scores))
    panels = drawing.figure.axes
    assert len(panels) == 1 + scores
    lines = {str(line.get_label()): np.array(line.get_xydata()) for line in panels[0].get_lines()}
    assert lines["mean of the kinds"][:, 1] == pytest.approx([0.03 / keep for keep in lines["color"][:, 0]])
    assert "chosen keep 3" in drawing.text
    assert "mathdefault" not in svg(drawing.figure, drawing.caption, drawing.text)


def texts_of(figure: Figure) -> list[Text]:
    """Every text that is inside the figure's panels or legends, without those of ticks out of view."""
    figure.canvas.draw()
    shown = []
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if text.get_visible() and text.get_text().strip():
            shown.append(text)
    ticks = {
        label
        for panel in figure.axes
        for axis, (low, high) in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim()))
        for place, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
        if not min(low, high) <= place <= max(low, high)
    }
    return [text for text in shown if text not in ticks]


@pytest.mark.parametrize("which", ["trade-off", "keep", "keep with scores"])
def test_no_text_covers_another(which: str, study: Study) -> None:
    if which == "trade-off":
        figure = next(iter(curves.tradeoff_drawings(study).values())).figure
    else:
        figure = curves.tuning_curve(tuning(which == "keep with scores"))
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]
    assert len(boxes) > 8
    width, height = figure.canvas.get_width_height()
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), (one, other)
    for text, box in boxes:
        assert box.x0 >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y0 >= -1, text
        assert box.y1 <= height + 1, text
