"""Sweeps of a merge over its strength: the points that keep as much of a metric as the claim, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from mergekit_snrf.evidence.intervals import Bootstrap, scale_of, spoken
from mergekit_snrf.evidence.results import Interval, Measured
from mergekit_snrf.evidence.verdict import Words

# The target is the limit of a rising keep. To interpolate on a log scale it gets this multiple of the largest one.
_BEYOND = 10.0


@dataclass(frozen=True)
class Curve:
    """A merge whose strength is varied.

    Attributes:
        name: the first word of its rows.
        key: the strength's name, ``beta`` (rising, the target is 0) or ``keep`` (falling, on a log scale).
        subject: inside a sentence, before the strength.
        about: the only thing in which the claim differs from it at equal perception; empty where it differs in more.
    """

    name: str
    key: str
    subject: str
    about: str = ""

    def axis(self, strengths: Sequence[float]) -> Float64[np.ndarray, " points"]:
        """Return where the target and the points of a sweep lie on the axis of interpolation."""
        if self.key == "keep":
            return np.log([_BEYOND * max(strengths), *strengths])
        return np.array([0.0, *strengths])

    def strength(self, place: float) -> float:
        """Return the strength at a place of the axis."""
        return float(np.exp(place)) if self.key == "keep" else place

    def written(self, strength: float) -> str:
        """Format a strength for a sentence."""
        return f"{strength:.3g}" if self.key == "keep" else f"{strength:.2f}"


LINEAR = Curve("linear", "beta", "the linear merge", "the masked update")
REGMEAN = Curve("regmean", "keep", "RegMean")
BASE = Curve("regmean from base", "keep", "RegMean from the common base")


def at_equal(
    metric: str,
    ends: tuple[str, str],
    curve: Curve,
    sweep: Mapping[str, float],
    bootstraps: Mapping[str, Bootstrap],
    measured: dict[str, dict[str, Measured]],
) -> tuple[str, Words, dict[str, Any]]:
    """Return name, words and settings of the point of a sweep that keeps as much of a metric as the claim does.

    Its strength is found, and all metrics are interpolated at it, in every resample anew; the point is added to
    bootstraps and measurements.

    Args:
        metric: the one to keep.
        ends: names of the reference, where the curve begins, and of the claim.
        curve: what is varied.
        sweep: strengths by name of the row, from the weakest merge to the strongest.
        bootstraps: by metric.
        measured: by condition and metric.
    """
    reference, claim = ends
    points = [reference, *sweep]
    axis = curve.axis([*sweep.values()])
    name = f"{curve.name} at equal {metric}"
    kept = bootstraps[metric]
    below, share = crossing(_stack(kept, points), kept.means[claim])
    below_0, share_0 = crossing(
        np.array([[kept.estimates[point] for point in points]]), np.array([kept.estimates[claim]])
    )
    measured[name] = {}
    for other, bootstrap in bootstraps.items():
        bootstrap.means[name] = interpolated(_stack(bootstrap, points), below, share)
        estimates = np.array([[bootstrap.estimates[point] for point in points]])
        bootstrap.estimates[name] = float(interpolated(estimates, below_0, share_0)[0])
        measured[name][other] = Measured(mean=bootstrap.mean(name), change=bootstrap.difference(name, reference))
    place = kept.interval(
        float(interpolated(axis[None], below_0, share_0)[0]),
        interpolated(np.broadcast_to(axis, (len(below), len(axis))), below, share),
    )
    at = Interval(**{bound: curve.strength(value) for bound, value in place.model_dump().items()})
    scale, unit = scale_of(metric, measured)
    exact = abs(kept.estimates[name] - kept.estimates[claim]) < 1e-9
    written = [curve.written(value) for value in (at.estimate, at.low, at.high)]
    strength = f"{curve.subject} of {curve.key} {written[0]} [{written[1]}, {written[2]}]"
    if exact:
        subject = f"{strength} (interpolated), which keeps as much {metric} as {claim},"
    else:
        ours, theirs = (f"{scale * kept.estimates[one]:.1f}" for one in (name, claim))
        subject = f"{strength}, which comes closest to the {metric} of {claim} ({ours} against {theirs}{unit}),"
    words = Words(subject, f"{curve.about} at equal {metric}" if exact and curve.about else "")
    return name, words, {curve.key: at.model_dump(), "metric": metric, "reached": exact}


def restoration(
    gain: str, keep: str, reference: str, whole: str, bootstrap: Bootstrap, measured: Mapping[str, Any]
) -> str | None:
    """Say which share of RegMean's ``gain`` the common base as source has where both have the same ``keep``.

    ``whole`` is the name of RegMean from the source, ``bootstrap`` of ``gain``, ``measured`` by condition and metric.
    None where it is not sure that there is a gain.
    """
    base = f"{BASE.name} at equal {keep}"
    gained = bootstrap.difference(whole, reference)
    if gained.low <= 0:
        return None
    ratio = [
        (values[base] - values[reference]) / np.maximum(values[whole] - values[reference], 1e-12)
        for values in (bootstrap.estimates, bootstrap.means)
    ]
    share = bootstrap.interval(float(ratio[0]), np.asarray(ratio[1]))
    scale, unit = scale_of(gain, measured)
    return (
        f"Restoration: at equal {keep}, RegMean with the common base as source changes {gain} by "
        f"{spoken(bootstrap.difference(base, reference), scale, '+')}{unit}, which is {spoken(share, 100)} % of what "
        f"{whole} gains; only the rest comes from what the source learnt beyond the base."
    )


def _stack(bootstrap: Bootstrap, names: Sequence[str]) -> Float64[np.ndarray, "resamples points"]:
    return np.stack([bootstrap.means[name] for name in names], axis=1)


def crossing(
    curve: Float64[np.ndarray, "rows points"], level: Float64[np.ndarray, " rows"]
) -> tuple[Int64[np.ndarray, " rows"], Float64[np.ndarray, " rows"]]:
    """Return where each row last keeps its level: a point, and the share of the way to the next one.

    That is the last crossing of a broken line. A row that keeps the level to its end is at its last point; one that
    lies below the level everywhere is at its highest point.
    """
    points = curve.shape[1]
    # Equal means can differ in their last digits, by the order of the sums.
    keeps = curve >= (level - 1e-12 * np.abs(level))[:, None]
    last = points - 1 - np.argmax(keeps[:, ::-1], axis=1)
    last = np.where(keeps.any(axis=1), last, np.argmax(curve, axis=1))
    rows = np.arange(len(curve))
    here, after = curve[rows, last], curve[rows, np.minimum(last + 1, points - 1)]
    falls = keeps.any(axis=1) & (here > after)
    share = np.where(falls, (here - level) / np.where(falls, here - after, 1.0), 0.0)
    return last, np.clip(share, 0.0, 1.0)


def interpolated(
    curve: Float64[np.ndarray, "rows points"], below: Int64[np.ndarray, " rows"], share: Float64[np.ndarray, " rows"]
) -> Float64[np.ndarray, " rows"]:
    """Return the value of each row's broken line at a point and a share of the way to the next one."""
    rows = np.arange(len(curve))
    after = np.minimum(below + 1, curve.shape[1] - 1)
    return (1 - share) * curve[rows, below] + share * curve[rows, after]
