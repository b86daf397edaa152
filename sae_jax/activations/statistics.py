"""The statistics of the rows of one shard, and what follows from them for the whole store.

Rows are left out of training and of the statistics for three reasons: a special token (by id,
anywhere in the text); a position at the start of the context whose activations are far larger than
elsewhere (attention sinks; Sun et al., "Massive Activations in Large Language Models",
arXiv:2402.17762); and values that are not finite. The second is only known once all shards are
written, so the sums of the leading positions are kept apart until then.
"""

import dataclasses

import numpy as np

LEADING_POSITIONS = 16
HIGH_NORM_RATIO = 3.0
_BLOCK_ROWS = 4096


@dataclasses.dataclass
class SiteSums:
    """Float64 sums over rows that are finite in every site and not special tokens.

    T is the context length. L is min(LEADING_POSITIONS, T), or 0 where T is 1.

    Attributes:
      leading: vector sums (L, width), position by position.
      rest: the vector sum (width,) over the other positions.
      norm: sums (T,) of ||x||.
      squared_norm: sums (T,) of ||x||^2.
      nonfinite_rows: the number of rows that are not finite in this site.
    """

    leading: np.ndarray
    rest: np.ndarray
    norm: np.ndarray
    squared_norm: np.ndarray
    nonfinite_rows: int

    def __add__(self, other: "SiteSums") -> "SiteSums":
        """Returns the sums over the rows of both."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return SiteSums(*(a + b for a, b in pairs))


def leading_positions(context_length: int) -> int:
    """Returns how many leading positions are kept apart."""
    return min(LEADING_POSITIONS, context_length) if context_length > 1 else 0


def finite_rows(values: np.ndarray) -> np.ndarray:
    """Returns which rows (rows,) of `values` (rows, width) hold neither NaN nor infinity."""
    # By the bits of the exponent: ten times as fast as isfinite of bfloat16.
    exponent = np.array(np.inf, values.dtype).view(f"u{values.itemsize}")
    bits = values.view(exponent.dtype)
    finite = np.empty(len(values), bool)
    for block in _blocks(len(values), _BLOCK_ROWS):
        finite[block] = (bits[block] & exponent).max(axis=1) < exponent
    return finite


def site_sums(values: np.ndarray, used: np.ndarray, nonfinite_rows: int) -> SiteSums:
    """Returns the sums of `values` (sequences * T, width) over the rows where `used` (sequences, T)
    is true.
    """
    sequences, context_length = used.shape
    width, leading = values.shape[1], leading_positions(context_length)
    sums = SiteSums(
        np.zeros((leading, width)),
        np.zeros(width),
        np.zeros(context_length),
        np.zeros(context_length),
        nonfinite_rows,
    )
    values = values.reshape(sequences, context_length, width)
    for block in _blocks(sequences, max(1, _BLOCK_ROWS // context_length)):
        x = values[block].astype(np.float64)
        x[~used[block]] = 0.0
        squared_norm = np.einsum("std,std->st", x, x)
        sums.squared_norm += squared_norm.sum(axis=0)
        sums.norm += np.sqrt(squared_norm).sum(axis=0)
        sums.leading += x[:, :leading].sum(axis=0)
        sums.rest += x[:, leading:].sum(axis=(0, 1))
    return sums


def high_norm_positions(sums: SiteSums, count: np.ndarray) -> np.ndarray:
    """Returns the leading positions with norms far above the rest.

    Their mean norm is more than HIGH_NORM_RATIO times the median over positions.

    Args:
      sums: the sums of a site.
      count: rows (T,) that were summed at each position.
    """
    seen = count > 0
    mean_norm = np.divide(sums.norm, count, out=np.zeros_like(sums.norm), where=seen)
    leading = np.arange(len(count)) < leading_positions(len(count))
    if not leading.any() or not seen.any():
        return np.array([], int)
    return np.flatnonzero(leading & (mean_norm > HIGH_NORM_RATIO * np.median(mean_norm[seen])))


def mean_and_squared_norm(sums: SiteSums, count: np.ndarray, excluded_positions):
    """Returns the mean (width,), the mean squared norm and the number of rows, without the excluded
    positions.
    """
    kept = ~np.isin(np.arange(len(count)), excluded_positions)
    rows = int(count[kept].sum())
    total = sums.rest + sums.leading[kept[: len(sums.leading)]].sum(axis=0)
    return total / max(rows, 1), float(sums.squared_norm[kept].sum() / max(rows, 1)), rows


def _blocks(count: int, size: int):
    """Yields slices of `size` that cover `count`."""
    return (slice(start, start + size) for start in range(0, count, size))
