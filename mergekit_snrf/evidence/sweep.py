"""The linear merge that keeps as much of a metric as the claim: a point between the betas of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from mergekit_snrf.evidence.intervals import Bootstrap, scale_of
from mergekit_snrf.evidence.results import Measured
from mergekit_snrf.evidence.verdict import Words


@dataclass(frozen=True)
class AtEqual:
    """The point of a sweep that keeps as much of a metric as the claim does."""

    name: str
    words: Words
    settings: Mapping[str, Any]


def at_equal(
    metric: str,
    ends: tuple[str, str],
    sweep: Mapping[str, float],
    bootstraps: Mapping[str, Bootstrap],
    measured: dict[str, dict[str, Measured]],
) -> AtEqual:
    """Find the point of a linear sweep at the claim's level of a metric; add it to bootstraps and measurements.

    Its beta is found, and all metrics are interpolated at it, in every resample anew.

    Args:
        metric: the one to keep.
        ends: names of the reference, which is the linear merge of beta 0, and of the claim.
        sweep: betas by name of the row, rising.
        bootstraps: by metric.
        measured: by condition and metric.
    """
    reference, claim = ends
    curve = [reference, *sweep]
    betas = np.array([0.0, *sweep.values()])
    name = f"linear at equal {metric}"
    kept = bootstraps[metric]
    below, share = crossing(_stack(kept, curve), kept.means[claim])
    below_0, share_0 = crossing(
        np.array([[kept.estimates[point] for point in curve]]), np.array([kept.estimates[claim]])
    )
    measured[name] = {}
    for other, bootstrap in bootstraps.items():
        bootstrap.means[name] = interpolated(_stack(bootstrap, curve), below, share)
        estimates = np.array([[bootstrap.estimates[point] for point in curve]])
        bootstrap.estimates[name] = float(interpolated(estimates, below_0, share_0)[0])
        measured[name][other] = Measured(mean=bootstrap.mean(name), change=bootstrap.difference(name, reference))
    at = kept.interval(
        float(interpolated(betas[None], below_0, share_0)[0]),
        interpolated(np.broadcast_to(betas, (len(below), len(betas))), below, share),
    )
    scale, unit = scale_of(metric, measured)
    exact = abs(kept.estimates[name] - kept.estimates[claim]) < 1e-9
    strength = f"the linear merge of beta {at.estimate:.2f} [{at.low:.2f}, {at.high:.2f}]"
    if exact:
        subject = f"{strength} (interpolated), which keeps as much {metric} as {claim},"
    else:
        ours, theirs = (f"{scale * kept.estimates[one]:.1f}" for one in (name, claim))
        subject = f"{strength}, which comes closest to the {metric} of {claim} ({ours} against {theirs}{unit}),"
    words = Words(subject, f"the masked update at equal {metric}" if exact else "")
    return AtEqual(name, words, {"beta": at.model_dump(), "metric": metric, "reached": exact})


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
