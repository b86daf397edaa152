"""Random numbers, directions and firings of synthetic worlds.

Everything comes from the words of Philox, keyed by the world and counted by the block of rows, so
that any process makes any block alone. NumPy fixes only these words for ever (see
`order.permutation`), so uniform and normal numbers are made of them here.
"""

import numpy as np
import scipy.special

_VERSION = 1  # raise it when the same seed would give another world
DICTIONARY, OFFSET, MAGNITUDES, LOADINGS, ROWS = range(5)  # purposes of random numbers


class Numbers:
    """The random numbers of a world's seed, a purpose and an index, drawn in order."""

    def __init__(self, seed: int, purpose: int, index: int):
        """Starts the sequence of numbers.

        Args:
          seed: the world's seed.
          purpose: one of DICTIONARY, OFFSET, MAGNITUDES, LOADINGS, ROWS.
          index: the number of the site or of the block of rows.
        """
        key = np.array([seed, _VERSION], np.uint64)
        counter = np.array([0, 0, purpose, index], np.uint64)
        self._philox = np.random.Philox(key=key, counter=counter)

    def uniform(self, count: int) -> np.ndarray:
        """Draws numbers (count,) float64 uniformly, above 0 and below 1."""
        words = self._philox.random_raw(count)
        return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, count: int) -> np.ndarray:
        """Draws standard normal numbers (count,) float64, by the method of Box and Muller."""
        half = (count + 1) // 2
        radius = np.sqrt(-2 * np.log(self.uniform(half)))
        angle = 2 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def bernoulli(numbers: Numbers, rates: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws firings that are independent of each other.

    It draws the gaps between firings, which are geometric, so that the work is that of the firings
    and not of rows times features.

    Args:
      numbers: the random numbers.
      rates: the probability (G,) that each feature fires on a row, 0 < rate <= 1.
      rows: the number of rows.

    Returns:
      The row and the feature of every firing.
    """
    expected = rows * rates
    draws = np.ceil(expected + 4 * np.sqrt(expected) + 2).astype(np.int64)  # rarely too few
    with np.errstate(divide="ignore"):
        log_silent = np.log1p(-rates)
    found_rows, found_features = [], []
    features, last = np.arange(len(rates)), np.full(len(rates), -1)
    while len(features):
        count = draws[features]
        feature = np.repeat(features, count)
        gap = np.log(numbers.uniform(len(feature))) / log_silent[feature]
        row = np.cumsum(1 + np.minimum(gap, rows).astype(np.int64))
        ends = np.cumsum(count)
        before = np.concatenate([[0], row[ends[:-1] - 1]])  # the sum over features before
        row += np.repeat(last - before, count)
        inside = row < rows
        found_rows.append(row[inside])
        found_features.append(feature[inside])
        unfinished = inside[ends - 1]
        features, last = features[unfinished], row[ends - 1][unfinished]
    return np.concatenate(found_rows), np.concatenate(found_features)


def unit_rows(numbers: Numbers, rows: int, width: int) -> np.ndarray:
    """Draws rows (rows, width) float64 of norm 1, in directions uniform over the sphere."""
    x = numbers.normal(rows * width).reshape(rows, width)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def nearly_orthogonal(numbers: Numbers, rows: int, width: int) -> np.ndarray:
    """Draws rows (rows, width) float64 of norm 1 that are as orthogonal as possible.

    The sum of squared cosines between rows is within 0.1% of the least: that of orthonormal rows,
    or of a tight frame where rows > width. SynthSAEBench's orthogonalisation (arXiv:2602.14687)
    descends to it by gradient. Here each iteration goes to the nearest such matrix and back to rows
    of norm 1 (Tropp et al. 2005, "Designing structured tight frames via an alternating projection
    method").
    """
    x = unit_rows(numbers, rows, width)
    least = max(rows, rows**2 / width)  # the least squared norm of the Gram matrix
    while True:
        tall = rows > width
        gram = x.T @ x if tall else x @ x.T
        if np.sum(gram**2) < 1.001 * least:
            return x
        values, vectors = np.linalg.eigh(gram)
        root = (vectors / np.sqrt(values)) @ vectors.T
        x = x @ root if tall else root @ x
        x /= np.linalg.norm(x, axis=1, keepdims=True)


def correlated_bernoulli(
    numbers: Numbers, rates: np.ndarray, loadings: np.ndarray, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws firings that are correlated by a Gaussian copula of low rank.

    Feature i fires on a row where loadings[i] . factors + noise is below the normal quantile of
    rates[i]. The factors (rank,) are standard normal and shared by the row's features; the noise is
    such that the sum is standard normal. Firings are proposed at each feature's highest rate over
    the rows, then thinned to the row's rate.

    Args:
      numbers: the random numbers.
      rates: the probability (G,) that each feature fires on a row.
      loadings: the loadings (G, rank) of the factors.
      rows: the number of rows.

    Returns:
      The row and the feature of every firing.
    """
    factors = numbers.normal(rows * loadings.shape[1]).reshape(rows, -1)
    noise = np.sqrt(1 - np.sum(loadings**2, axis=1))
    quantile = scipy.special.ndtri(rates) / noise
    shifts = (factors @ (loadings / noise[:, None]).T).astype(np.float32)  # (rows, features)
    highest = scipy.special.ndtr(quantile - shifts.min(axis=0))
    row, feature = bernoulli(numbers, highest, rows)
    rate = scipy.special.ndtr(quantile[feature] - shifts[row, feature])
    kept = numbers.uniform(len(row)) * highest[feature] < rate
    return row[kept], feature[kept]
