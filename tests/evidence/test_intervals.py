"""Intervals against scipy's bootstrap, the analytic normal interval, and simulations of known truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence import intervals
from mergekit_snrf.evidence.evaluation import Items
from mergekit_snrf.evidence.intervals import Bootstrap, measure, resample, scale_of, spoken
from mergekit_snrf.evidence.results import Interval


def items(scores: np.ndarray, groups: tuple[str, ...] | None = None) -> Items:
    return Items(tuple(float(score) for score in scores), groups=groups)


def mean_interval(draws: Sequence[Items], **options: Any) -> Interval:
    return Bootstrap({"all": draws}, **options).mean("all")


def difference_interval(left: Sequence[Items], right: Sequence[Items], **options: Any) -> Interval:
    return Bootstrap({"left": left, "right": right}, **options).difference("left", "right")


def width(interval: Interval) -> float:
    return interval.high - interval.low


def close(interval: Interval, low: float, high: float, share: float = 0.03) -> bool:
    """Whether both bounds lie within a share of the expected width of where they should."""
    room = share * (high - low)
    return abs(interval.low - low) < room and abs(interval.high - high) < room


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_of_a_mean_is_that_of_scipys_percentile_bootstrap(level: float) -> None:
    scores = np.random.default_rng(0).gamma(0.7, size=80)
    expected = stats.bootstrap(
        (scores,), np.mean, method="percentile", n_resamples=20_000, confidence_level=level, rng=1
    ).confidence_interval
    found = mean_interval([items(scores)], level=level)
    assert found.estimate == pytest.approx(scores.mean())
    assert close(found, *expected)


def test_the_interval_of_a_difference_is_that_of_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(1)
    right = rng.random(300)
    left = np.clip(right - 0.2 + 0.1 * rng.standard_normal(300), 0, 1)
    expected = stats.bootstrap(
        (left, right),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=1,
    ).confidence_interval
    found = difference_interval([items(left)], [items(right)])
    assert found.estimate == pytest.approx(left.mean() - right.mean())
    assert close(found, *expected)
    # The pairing is what makes it narrow.
    assert width(found) < 0.4 * width(mean_interval([items(left)]))


def test_tasks_count_alike_whatever_their_sizes_and_are_resampled_by_themselves() -> None:
    rng = np.random.default_rng(2)
    small, large = rng.random(50) < 0.9, rng.random(2000) < 0.2
    scores = items(np.concatenate([small, large]), ("small",) * 50 + ("large",) * 2000)
    bootstrap = Bootstrap({"all": [scores]}, resamples=40_000)
    assert bootstrap.estimates["all"] == scores.mean == pytest.approx((small.mean() + large.mean()) / 2)
    # Resampled as one task, the difference between the tasks would add a multiple of this.
    deviation = np.sqrt(small.var() / 50 + large.var() / 2000) / 2
    assert bootstrap.means["all"].std() == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize("draws", [3, 8])
def test_the_variance_of_a_condition_of_several_draws_is_that_of_items_plus_that_of_draws(draws: int) -> None:
    rng = np.random.default_rng(3)
    item, draw = rng.standard_normal(400), rng.standard_normal(draws)
    bootstrap = Bootstrap({"random": [items(item + one) for one in draw]}, resamples=40_000)
    expected = np.sqrt(item.var() / 400 + draw.var(ddof=1) / draws)
    assert bootstrap.means["random"].std() == pytest.approx(expected, rel=0.02)
    assert bootstrap.estimates["random"] == pytest.approx(item.mean() + draw.mean())


def test_the_draws_of_two_conditions_are_resampled_independently() -> None:
    draws = [items(np.full(10, float(number))) for number in range(4)]
    bootstrap = Bootstrap({"one": draws, "other": draws}, resamples=40_000)
    assert abs(np.corrcoef(bootstrap.means["one"], bootstrap.means["other"])[0, 1]) < 0.03


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(4)
    hits = []
    for trial in range(500):
        right = rng.random(150) < 0.6
        left = np.where(rng.random(150) < 0.3, rng.random(150) < 0.2, right)
        # left keeps right's score with probability 0.7: the true difference is 0.3 * (0.2 - 0.6).
        interval = difference_interval([items(left)], [items(right)], seed=trial, resamples=400)
        hits.append(interval.low <= -0.12 <= interval.high)
    assert 0.92 <= np.mean(hits) <= 0.975


def test_the_seed_decides_and_memory_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = items(np.random.default_rng(6).random(40), ("a", "b") * 20)
    first = mean_interval([scores, scores], seed=7)
    assert mean_interval([scores, scores], seed=7) == first
    assert mean_interval([scores, scores], seed=8) != first
    monkeypatch.setattr(intervals, "_BLOCK_BYTES", 1000)
    assert mean_interval([scores, scores], seed=7).model_dump() == pytest.approx(first.model_dump())


def test_equal_scores_have_an_interval_without_width() -> None:
    right = [items(np.ones(20))]
    assert mean_interval(right) == Interval(estimate=1.0, low=1.0, high=1.0)
    assert difference_interval(right, right) == Interval(estimate=0.0, low=0.0, high=0.0)


@pytest.mark.parametrize("draws", [[items(np.ones(4))], [items(np.ones(3), ("x", "y", "y"))], []])
def test_conditions_of_other_items_and_without_draws_are_refused(draws: list[Items]) -> None:
    with pytest.raises(SnrfError, match="condition 'b' has "):
        Bootstrap({"a": [items(np.ones(3))], "b": draws})


def test_measured_metrics_are_means_changes_and_malformed_answers_over_draws() -> None:
    base = {"R": Items((1.0, 1.0, 0.0, 0.0), malformed=(False, False, True, False)), "P": Items((1.0, 0.5))}
    worse = {"R": Items((0.0, 1.0, 0.0, 0.0), malformed=(True, False, True, False)), "P": Items((1.0, 0.5))}
    scores = {"as it is": [base], "random": [base, worse]}
    measured = measure(resample(scores, seed=1), scores, "as it is")
    reference, random = measured["as it is"], measured["random"]
    assert (reference["R"].mean.estimate, reference["R"].change, reference["R"].malformed) == (0.5, None, 0.25)
    assert (random["R"].mean.estimate, random["R"].malformed) == (0.375, 0.375)
    assert random["R"].change is not None
    assert random["R"].change.estimate == -0.125
    assert random["P"].malformed is None
    assert scale_of("R", measured) == (100.0, " points")
    unbounded = {"x": [{"M": Items((3.0, -1.0))}]}
    assert scale_of("M", measure(resample(unbounded), unbounded, "x")) == (1.0, "")


def test_numbers_are_written_with_their_bounds() -> None:
    interval = Interval(estimate=0.1234, low=-0.0001, high=0.2)
    assert spoken(interval, 100) == "12.3 [0.0, 20.0]"
    assert spoken(interval, 100, "+") == "+12.3 [+0.0, +20.0]"
