"""Means and medians over units, with 95% intervals by a bootstrap over these units.

A resample draws as many units as there are, with replacement, and all that is known of a unit goes
with it. An interval is from the 2.5% to the 97.5% point of the statistic over all resamples.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

RESAMPLES = 10_000
_AT_ONCE = 2**22  # draws


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A statistic over units.

    Attributes:
      n: how many units it is of.
      value: the statistic; None where there are no units.
      low: the lower end of its 95% interval; None of fewer than 2 units.
      high: the upper end.
    """

    n: int
    value: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        if self.low is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclasses.dataclass(frozen=True)
class Means:
    """Means of columns over the same units.

    Attributes:
      estimates: the mean of each column, by its name.
      resampled: the means of all resamples, (resamples,) by the column's name; NaN where a resample
        has no unit with a value.
    """

    estimates: dict[str, Estimate]
    resampled: dict[str, np.ndarray]


def means(columns: Mapping[str, np.ndarray], seed: int, resamples: int = RESAMPLES) -> Means:
    """Returns the mean of each column over the units that have a value there.

    Args:
      columns: values (units,) by the column's name; NaN where a unit has none.
      seed: the seed of the resamples.
      resamples: how many there are.
    """
    values = np.stack([np.asarray(column, np.float64) for column in columns.values()], axis=1)
    known = ~np.isnan(values)
    both = np.concatenate([np.where(known, values, 0.0), known], axis=1)
    n, random = len(values), np.random.default_rng(seed)
    sums = np.zeros((resamples, both.shape[1]))
    step = max(1, _AT_ONCE // max(n, 1))
    for first in range(0, resamples if n else 0, step):
        count = min(step, resamples - first)
        drawn = random.integers(0, n, (count, n), np.int32) + n * np.arange(count)[:, None]
        times = np.bincount(drawn.reshape(-1), minlength=count * n).reshape(count, n)
        sums[first : first + count] = times.astype(np.float64) @ both
    total, size = np.split(sums, 2, axis=1)
    with np.errstate(invalid="ignore"):
        resampled = dict(zip(columns, (total / size).T, strict=True))
    estimates = {
        name: _estimate(int(of.sum()), column[of].mean() if of.any() else None, resampled[name])
        for name, column, of in zip(columns, values.T, known.T, strict=True)
    }
    return Means(estimates, resampled)


def difference(one: Means, other: Means, name: str) -> Estimate:
    """Returns by how much the mean of a column is higher in one of two unrelated groups of units.

    Its `n` is the smaller of theirs.
    """
    ours, theirs = one.estimates[name], other.estimates[name]
    if not (n := min(ours.n, theirs.n)):
        return Estimate(0)
    return _estimate(n, ours.value - theirs.value, one.resampled[name] - other.resampled[name])


def median(values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """Returns the median of values (units,), of which NaN are left out.

    The middle of a resample's n units is drawn without drawing the others: units are drawn as
    uniform numbers, of which the m-th smallest of n has a beta distribution.
    """
    values = np.sort(np.asarray(values, np.float64))
    values = values[~np.isnan(values)]
    n, random = len(values), np.random.default_rng(seed)
    if not n:
        return Estimate(0)
    m = (n + 1) // 2
    place = random.beta(m, n - m + 1, resamples)
    places = [place]
    if n % 2 == 0:  # the next one is the smallest of the n - m that lie above
        above = 1 - random.random(resamples) ** (1 / (n - m))
        places.append(place + (1 - place) * above)
    drawn = [values[np.minimum((n * place).astype(int), n - 1)] for place in places]
    return _estimate(n, np.median(values), np.mean(drawn, axis=0))


def _estimate(n: int, statistic, resampled: np.ndarray) -> Estimate:
    if n < 2:
        return Estimate(n, None if statistic is None else float(statistic))
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Estimate(n, float(statistic), float(low), float(high))
