"""Studies built from scores: the point of equal perception against exact and resampled oracles, and the verdicts."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_snrf.evidence.compare import CLAIM, TARGET
from mergekit_snrf.evidence.items import Items
from mergekit_snrf.evidence.results import Study
from mergekit_snrf.evidence.study import Row, Setup, build_study
from mergekit_snrf.evidence.sweep import BASE, LINEAR, REGMEAN, Curve, crossing, interpolated
from mergekit_snrf.evidence.verdict import Words, format_losses

small = st.integers(0, 6).map(float)


@given(st.lists(st.lists(small, min_size=4, max_size=4), min_size=1, max_size=5), small, st.lists(small, min_size=4))
def test_crossing_is_the_last_one_of_the_broken_line(
    curves: list[list[float]], level: float, other: list[float]
) -> None:
    """Against exact fractions, segment by segment from the right."""
    curve = np.array(curves)
    below, share = crossing(curve, np.full(len(curve), level))
    values = interpolated(np.broadcast_to(np.array(other[:4]), curve.shape), below, share)
    for line, point, part, value in zip(curves, below, share, values, strict=True):
        expected = Fraction(line.index(max(line)))
        if max(line) >= level:
            expected = Fraction(3) if line[3] >= level else None
            segment = 2
            while expected is None:
                if line[segment] >= level:
                    a, b = Fraction(line[segment]), Fraction(line[segment + 1])
                    expected = segment + (a - Fraction(level)) / (a - b)
                segment -= 1
        assert point + part == pytest.approx(float(expected), abs=1e-9)
        assert value == pytest.approx(np.interp(float(expected), range(4), other[:4]), abs=1e-9)


def items(*scores: float) -> Items:
    return Items(tuple(scores))


def study_of(
    scores: dict[str, list[dict[str, Items]]],
    betas: dict[str, float],
    *,
    ablation: bool = False,
    seed: int = 0,
    curves: dict[str, Curve] | None = None,
) -> Study:
    changes: dict[str, dict[str, Any]] = {
        TARGET: {"role": "reference"},
        CLAIM: {"role": "claim", "words": Words("deactivating N" if ablation else "")},
        "random": {"words": Words("", "the choice"), "settings": {"seeds": []}},
    }
    for name, beta in betas.items():
        changes[name] = {**changes.get(name, {}), "curve": (curves or {}).get(name, LINEAR), "strength": beta}
    rows = [replace(Row(name, "control"), **changes.get(name, {})) for name in scores]
    setup = Setup("ablation" if ablation else "comparison", "m", "e", seed=seed)
    return build_study(setup, rows, scores, {"R": "gain", "P": "keep"})


def coin(count: int, *heads: int) -> list[dict[str, Items]]:
    """R and P with the given numbers of right answers out of `count`."""
    r, p = ([1.0] * n + [0.0] * (count - n) for n in heads)
    return [{"R": items(*r), "P": items(*p)}]


def test_equal_perception_by_hand_and_against_a_plain_bootstrap() -> None:
    generator = np.random.default_rng(5)
    chances = {TARGET: (0.2, 0.95), CLAIM: (0.5, 0.8), "half": (0.4, 0.85), "full": (0.7, 0.5)}
    table, scores = nested(120, 5, chances)
    study = study_of(scores, {"half": 0.5, "full": 1.0}, seed=3)
    row = next(condition for condition in study.conditions if condition.name == "linear at equal P")

    def at_equal(index: Any) -> tuple[float, float]:
        p = [table[name][1][index[1]].mean() for name in (TARGET, "half", "full")]
        r = [table[name][0][index[0]].mean() for name in (TARGET, "half", "full")]
        beta = np.interp(-table[CLAIM][1][index[1]].mean(), [-one for one in p], [0.0, 0.5, 1.0])
        return beta, table[CLAIM][0][index[0]].mean() - np.interp(beta, [0.0, 0.5, 1.0], r)

    everything = np.arange(120)
    beta, difference = at_equal((everything, everything))
    resampled = []
    for _ in range(4000):
        index = generator.integers(0, 120, 120)
        resampled.append(at_equal((index, index)))
    contrast = next(c for c in study.contrasts if c.right == row.name and c.metric == "R").difference
    assert row.settings["reached"] is True
    for found, estimate, column in ((row.settings["beta"], beta, 0), (contrast.model_dump(), difference, 1)):
        low, high = np.quantile([pair[column] for pair in resampled], [0.025, 0.975])
        assert found["estimate"] == pytest.approx(estimate, abs=1e-9)
        assert (found["low"], found["high"]) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    same = next(c for c in study.contrasts if c.right == row.name and c.metric == "P").difference
    assert (same.estimate, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-12)


def test_equal_perception_that_linear_does_not_reach_is_said() -> None:
    scores = {TARGET: coin(100, 30, 80), CLAIM: coin(100, 50, 100), "full": coin(100, 70, 60)}
    study = study_of(scores, {"full": 1.0})
    row = next(condition for condition in study.conditions if condition.name == "linear at equal P")
    assert row.settings["reached"] is False
    assert row.settings["beta"]["estimate"] == 0.0
    assert row.metrics["R"].mean.estimate == pytest.approx(0.3)
    assert any("comes closest to the P of SNRF (80.0 against 100.0 points)" in text for text in study.verdict)


def nested(count: int, seed: int, chances: dict[str, tuple[float, float]]) -> tuple[Any, Any]:
    """R and P by name as arrays, and as scores: what is right at a low chance is right at a higher one, too."""
    uniform = np.random.default_rng(seed).random((2, count))
    table = {
        name: [(uniform[k] < chance).astype(float) for k, chance in enumerate(two)] for name, two in chances.items()
    }
    return table, {name: [{"R": items(*two[0]), "P": items(*two[1])}] for name, two in table.items()}


def test_equal_perception_of_a_sweep_of_keep_is_found_on_a_log_scale() -> None:
    chances = {TARGET: (0.2, 0.95), CLAIM: (0.5, 0.8), "k10": (0.4, 0.9), "k1": (0.7, 0.6)}
    table, scores = nested(150, 6, chances)
    study = study_of(scores, {"k10": 10.0, "k1": 1.0}, curves={"k10": REGMEAN, "k1": REGMEAN})
    row = next(condition for condition in study.conditions if condition.name == "regmean at equal P")
    p, r = ([table[name][k].mean() for name in ("k10", "k1")] for k in (1, 0))
    share = (p[0] - table[CLAIM][1].mean()) / (p[0] - p[1])
    assert 0 < share < 1
    assert row.settings["keep"]["estimate"] == pytest.approx(10 ** (1 - share))
    assert row.settings["keep"]["low"] < row.settings["keep"]["estimate"] < row.settings["keep"]["high"]
    assert row.metrics["R"].mean.estimate == pytest.approx(r[0] + share * (r[1] - r[0]))
    assert any(text.startswith("RegMean of keep ") and "keeps as much P as SNRF" in text for text in study.verdict)
    points = {one.name: (one.curve, one.strength) for one in study.conditions if one.curve is not None}
    assert points == {"k10": ("regmean", 10.0), "k1": ("regmean", 1.0)}


def test_a_claim_on_a_curve_is_compared_with_the_other_curves_only() -> None:
    chances = {TARGET: (0.2, 0.95), CLAIM: (0.6, 0.9), "k1": (0.7, 0.7), "half": (0.4, 0.9), "full": (0.8, 0.5)}
    chances |= {"b9": (0.35, 0.94), "b1": (0.55, 0.8)}
    table, scores = nested(400, 7, chances)
    strengths = {CLAIM: 3.0, "k1": 1.0, "half": 0.5, "full": 1.0, "b9": 9.0, "b1": 1.0}
    curves = {CLAIM: REGMEAN, "k1": REGMEAN, "b9": BASE, "b1": BASE}
    study = study_of(scores, strengths, curves=curves)
    assert {contrast.right for contrast in study.contrasts} == {"linear at equal P", "regmean from base at equal P"}
    assert not any("k1" in sentence for sentence in study.verdict)
    target, base = (
        next(c for c in study.conditions if c.name == one) for one in (TARGET, "regmean from base at equal P")
    )
    gained = table[CLAIM][0].mean() - target.metrics["R"].mean.estimate
    share = (base.metrics["R"].mean.estimate - target.metrics["R"].mean.estimate) / gained
    assert study.verdict[-1].startswith(
        "Restoration: at equal P, RegMean with the common base as source changes R by +"
    )
    assert f"which is {100 * share:.1f} [" in study.verdict[-1]


def test_the_verdict_says_what_the_intervals_support() -> None:
    scores = {
        TARGET: coin(100, 30, 90),
        CLAIM: coin(100, 60, 89),
        "random": [*coin(100, 32, 90), *coin(100, 36, 90)],
        "rival": coin(100, 80, 40),
        "twin": coin(100, 60, 89),
    }
    traded, gain, random, rival, twin, keep, rival_keep, many, draws = study_of(scores, {}).verdict
    assert traded.startswith("Better than SNRF on some metrics and worse on others: rival (R 20.0 [")
    assert re.search(r" points higher, P 49\.0 \[[^]]*\] points lower\)\.$", traded)
    assert gain == "SNRF raises R by 30.0 [21.0, 39.0] points."
    assert random.startswith("random (mean of 2 draws, +2.0 to +6.0) changes R by +4.0 [")
    assert "; R is 26.0 [" in random
    assert random.endswith("points higher with SNRF, so the choice helps.")
    assert "; R is 20.0 [" in rival
    assert rival.endswith("points lower with SNRF.")
    assert twin.endswith("; no evidence of a difference (SNRF minus it: +0.0 [+0.0, +0.0] points).")
    assert keep.startswith("No evidence that SNRF changes P: -1.0 [")
    assert "changes P by -50.0 [" in rival_keep
    assert many.startswith("These are 8 differences")
    assert draws.startswith("2 draws do not show")


def test_the_verdict_of_an_ablation_says_what_the_intervals_support() -> None:
    scores = {
        TARGET: coin(100, 60, 90),
        CLAIM: coin(100, 20, 89),
        "random": [*coin(100, 52, 90), *coin(100, 56, 90)],
        "least": coin(100, 20, 90),
    }
    claim, random, least, keep, *_ = study_of(scores, {}, ablation=True).verdict
    assert claim == "Deactivating N lowers R by 40.0 [31.0, 49.0] points."
    assert random.startswith("random (mean of 2 draws, -8.0 to -4.0) changes R by -6.0 [")
    assert random.endswith("points lower after deactivating N, so the choice matters.")
    assert "; no evidence of a difference (deactivating N minus it: +0.0" in least
    assert keep.startswith("No evidence that deactivating N changes P: -1.0 [")


@pytest.mark.parametrize(
    ("rival", "ablation", "named"),
    [
        (coin(100, 80, 89), False, "R 20.0 ["),  # Better on R, equal on P.
        (coin(100, 60, 99), False, "P 10.0 ["),  # Better on P, equal on R.
        (coin(100, 80, 60), False, None),  # A trade-off.
        (coin(100, 60, 89), False, None),
        (coin(100, 30, 89), True, "R 30.0 ["),
        (coin(100, 80, 89), True, None),
        (coin(100, 60, 99), True, None),
    ],
)
@pytest.mark.parametrize("beta", [None, 1.0])
def test_the_first_sentence_names_a_simpler_rival_that_does_better(
    rival: Any, ablation: bool, named: str | None, beta: float | None
) -> None:
    scores = {TARGET: coin(100, 40, 89), CLAIM: coin(100, 60, 89), "rival": rival}
    first = study_of(scores, {} if beta is None else {"rival": beta}, ablation=ablation).verdict[0]
    opening = "Other neurons have a larger effect than" if ablation else "A simpler merge does better than SNRF"
    assert first.startswith(opening) == (named is not None)
    assert named is None or f"rival ({named}" in first


def test_rivals_are_named_where_no_point_at_equal_perception_stands_for_them() -> None:
    names = {"a": coin(99, 20, 50), "b": coin(99, 40, 50), "linear": coin(99, 70, 20)}
    rows = [Row("a", "reference"), Row("b", "claim"), Row("linear", "control", curve=LINEAR, strength=1.0)]
    only_gain = {name: [{"R": one[0]["R"]}] for name, one in names.items()}
    study = build_study(Setup("comparison", "m", "e"), rows, only_gain, {"R": "gain"})
    assert study.verdict[0].startswith("A simpler merge does better than b")
    traded = "Better than b on some metrics and worse on others: linear (R 30.3 ["
    for role, said in (("gain", True), ("keep", False)):
        study = build_study(Setup("comparison", "m", "e"), rows, names, {"R": "gain", "P": role})  # type: ignore[dict-item]
        assert study.verdict[0].startswith(traded) == said


def test_a_bound_that_is_shown_as_zero_does_not_exclude_it() -> None:
    # 7 of 5000 items change, so that the lower bound is 0.04 points.
    study = study_of({TARGET: coin(5000, 75, 225), CLAIM: coin(5000, 82, 375)}, {})
    change = study.conditions[1].metrics["R"].change
    assert change is not None
    assert 0 < change.low < 0.0005
    assert study.verdict[0] == "No evidence that SNRF changes R: +0.1 [+0.0, +0.3] points."
    assert study.verdict[1].startswith("SNRF raises P by 3.0 [")


@pytest.mark.parametrize(("count", "few"), [(29, True), (30, False)])
def test_the_verdict_warns_of_few_items_and_draws(count: int, few: bool) -> None:
    verdict = study_of({TARGET: coin(count, 3, 9), CLAIM: coin(count, 9, 9), "random": coin(count, 3, 9)}, {}).verdict
    assert any(sentence.startswith("Fewer than 30 items of R and P") for sentence in verdict) == few
    assert any(sentence.startswith("One draw does not show") for sentence in verdict)


def test_metrics_that_are_not_shares_are_not_in_points() -> None:
    scores = {TARGET: [{"R": items(*[1.0] * 40)}], CLAIM: [{"R": items(*[3.0] * 40)}]}
    assert study_of(scores, {}).verdict[0] == "SNRF raises R by 2.0 [2.0, 2.0]."


def test_lost_items_with_newly_malformed_answers_are_counted() -> None:
    before = {"R": Items((1.0, 1.0, 1.0, 0.0, 1.0), malformed=(False, False, True, False, False)), "P": Items((1.0,))}
    after = {"R": Items((0.0, 0.0, 0.0, 0.0, 1.0), malformed=(True, False, True, True, False)), "P": Items((0.0,))}
    (sentence,) = format_losses("Deactivating N", before, after)
    assert sentence.startswith("Deactivating N lowers the score of 3 items of R; 1 of these")
    assert format_losses("Deactivating N", before, before) == []
