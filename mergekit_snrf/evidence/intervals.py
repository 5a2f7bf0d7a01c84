"""Confidence intervals of scores and of their paired differences: seeded percentile bootstraps.

    bootstrap = Bootstrap({"target": [items], "random": [items_0, items_1, items_2]}, seed=0)
    bootstrap.mean("target"), bootstrap.difference("random", "target")

Every resample takes the same items for every condition, so differences are paired. Items are resampled within their
task (``Items.groups``), tasks are not resampled. A condition of several random draws is the mean over them, and its
draws are resampled as well.

Where all items score alike an interval has no width, and intervals of few items (say 30) or few draws are too narrow:
in simulations of 400 items, 95 % intervals held in 94 % of the cases or more where draws differed by up to 5 points
(one standard deviation), but where they differed by 10 points in 88 % for 3 draws, 91 % for 5 and 94 % for 10.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Float64

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.items import Items, Scores
from mergekit_snrf.evidence.results import Interval, Measured

RESAMPLES = 10_000
LEVEL = 0.95
FEW_ITEMS = 30
"""Below this, the intervals of a bootstrap are clearly too narrow."""
FEW_DRAWS = 5
"""Below this, the draws say little about other draws."""
_BLOCK_BYTES = 64_000_000
_DRAWS_STREAM = 2**32


class Bootstrap:
    """Resampled means of one metric under several conditions, in ``means``, and their ``estimates``."""

    def __init__(
        self,
        conditions: Mapping[str, Sequence[Items]],
        *,
        seed: int = 0,
        resamples: int = RESAMPLES,
        level: float = LEVEL,
    ) -> None:
        """Resample the draws of every condition; metrics of as many items are resampled alike."""
        self.level = level
        draws = [items for several in conditions.values() for items in several]
        for name, several in conditions.items():
            if not several:
                raise SnrfError(None, f"condition {name!r} has no draws", "give at least one")
            if any((len(items), items.groups) != (len(draws[0]), draws[0].groups) for items in several):
                what = f"condition {name!r} has other items than the others"
                raise SnrfError(None, what, "score all conditions on the same items")
        scores = np.array([items.scores for items in draws])
        resampled = resampled_means(scores, draws[0].groups, seed=seed, resamples=resamples)
        observed = [items.mean for items in draws]
        self.means: dict[str, Float64[np.ndarray, " resamples"]] = {}
        self.estimates: dict[str, float] = {}
        start = 0
        for name, several in conditions.items():
            part = slice(start, start + len(several))
            start = part.stop
            weights = _draw_weights(len(several), name, seed, resamples)
            means = (resampled[:, part] * weights).sum(axis=1)
            self.means[name] = np.clip(means, scores.min(), scores.max())
            self.estimates[name] = float(np.mean(observed[part]))

    def mean(self, name: str) -> Interval:
        """Return the mean of a condition."""
        return self.interval(self.estimates[name], self.means[name])

    def difference(self, left: str, right: str) -> Interval:
        """Return the paired difference of the means, ``left - right``."""
        return self.interval(self.estimates[left] - self.estimates[right], self.means[left] - self.means[right])

    def interval(self, estimate: float, values: Float64[np.ndarray, " resamples"]) -> Interval:
        """Return an estimate with the percentiles of its resampled values."""
        tail = (1 - self.level) / 2
        low, high = np.quantile(values, [tail, 1 - tail])
        return Interval(estimate=estimate, low=float(low), high=float(high))


def measure(
    bootstraps: Mapping[str, Bootstrap], scores: Mapping[str, Sequence[Scores]], reference: str
) -> dict[str, dict[str, Measured]]:
    """Return, by condition and metric, its mean and its paired change to the reference."""

    def measured(condition: str, metric: str, draws: Sequence[Scores]) -> Measured:
        mean = bootstraps[metric].mean(condition)
        change = None if condition == reference else bootstraps[metric].difference(condition, reference)
        rates = [rate for draw in draws if (rate := draw[metric].malformed_rate) is not None]
        return Measured(mean=mean, change=change, malformed=float(np.mean(rates)) if rates else None)

    return {
        condition: {metric: measured(condition, metric, draws) for metric in bootstraps}
        for condition, draws in scores.items()
    }


def resample(scores: Mapping[str, Sequence[Scores]], *, seed: int = 0, level: float = LEVEL) -> dict[str, Bootstrap]:
    """Return a bootstrap by metric, over the draws of all conditions."""
    found = {}
    for metric in next(iter(scores.values()))[0]:
        conditions = {name: [draw[metric] for draw in draws] for name, draws in scores.items()}
        found[metric] = Bootstrap(conditions, seed=seed, level=level)
    return found


def spoken(interval: Interval, scale: float, sign: str = "") -> str:
    """Format an interval times ``scale``: ``18.2 [12.1, 24.0]``, with the sign ``+``: ``+18.2 [+12.1, +24.0]``."""
    estimate, low, high = (
        # Rounded first, so that no -0.0 is shown.
        format(round(scale * value, 1) + 0.0, f"{sign}.1f")
        for value in (interval.estimate, interval.low, interval.high)
    )
    return f"{estimate} [{low}, {high}]"


def scale_of(metric: str, measured: Mapping[str, Mapping[str, Measured]]) -> tuple[float, str]:
    """Return 100 and ``points`` for a metric whose means are shares, 1 and an empty text for any other."""
    means = [metrics[metric].mean for metrics in measured.values()]
    shares = all(mean.low >= 0 and mean.high <= 1 for mean in means)
    return (100.0, " points") if shares else (1.0, "")


def resampled_means(
    scores: Float[np.ndarray, "rows items"], groups: Sequence[str] | None, *, seed: int, resamples: int
) -> Float64[np.ndarray, "resamples rows"]:
    """Return the mean over tasks of each task's mean, for items drawn with replacement within their task.

    How often the items of a task are drawn is multinomial; all rows share the draws.
    """
    tasks = np.array(groups) if groups is not None else np.zeros(scores.shape[1], dtype=int)
    names = np.unique(tasks)
    means = np.zeros((resamples, len(scores)))
    for index, name in enumerate(names):
        members = scores[:, tasks == name].T.astype(float)
        count = len(members)
        generator = np.random.default_rng([seed, index])
        block = max(1, _BLOCK_BYTES // (8 * count))
        for start in range(0, resamples, block):
            size = min(block, resamples - start)
            drawn = generator.multinomial(count, np.full(count, 1 / count), size=size)
            means[start : start + size] += drawn @ members / (count * len(names))
    return means


def _draw_weights(draws: int, name: str, seed: int, resamples: int) -> Float64[np.ndarray, "resamples draws"]:
    """Return the weights of a condition's draws in every resample; they sum to one."""
    if draws == 1:
        return np.ones((resamples, 1))
    generator = np.random.default_rng([seed, _DRAWS_STREAM, zlib.crc32(name.encode())])
    drawn = generator.multinomial(draws, np.full(draws, 1 / draws), size=resamples) / draws
    # Resampling n draws gives (n - 1) / n of the variance of their mean, which matters for three.
    return 1 / draws + (drawn - 1 / draws) * np.sqrt(draws / (draws - 1))


def side_of(interval: Interval, scale: float) -> int:
    """Return -1 or 1 where an interval lies on one side of zero, else 0; a bound shown as 0.0 points counts as zero."""
    low, high = (round(scale * bound, 1) if scale == 100 else bound for bound in (interval.low, interval.high))
    return -1 if high < 0 else 1 if low > 0 else 0


def size_of(interval: Interval, scale: float) -> str:
    """Format a difference without its sign, the smaller bound first."""
    if interval.estimate >= 0:
        return spoken(interval, scale)
    return spoken(Interval(estimate=-interval.estimate, low=-interval.high, high=-interval.low), scale)
