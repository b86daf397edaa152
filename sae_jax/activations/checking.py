"""What the files of a store must be, one compared with another.

Activations have checksums, and tokens have a hash in meta.json. Everything else follows from them:
which rows are excluded follows from the tokens, the excluded positions and the values; the counts
of usable rows from that; the statistics from the values. So stores need no further checksums, and
those of earlier versions are checked as well.
"""

import numpy as np

from sae_jax.activations import statistics
from sae_jax.activations.meta import HIGH_NORM, NONFINITE, PADDING, SPECIAL_TOKEN, StoreMeta
from sae_jax.errors import UserError

_ROUNDING = 1e-6  # of statistics, whose sums were rounded in another order


def excluded_by_rule(meta: StoreMeta, sequences: int, tokens: np.ndarray | None) -> np.ndarray:
    """Returns which rows of some sequences are excluded for their token or their position.

    Args:
      meta: that of the store.
      sequences: how many sequences there are.
      tokens: their tokens (sequences, context_length); None where the store has none.

    The result is (sequences * context_length,) uint8, with bits as in the store.
    """
    excluded = np.zeros((sequences, meta.context_length), np.uint8)
    if tokens is not None:
        excluded[np.isin(tokens, meta.excluded_tokens)] |= SPECIAL_TOKEN
    excluded[:, meta.excluded_positions] |= HIGH_NORM
    return excluded.reshape(-1)


def check_excluded(
    path: str, chunk: int, excluded: np.ndarray, usable: np.ndarray, expected: np.ndarray
) -> None:
    """Raises UserError unless the files say of a chunk's rows what they must.

    Args:
      path: that of the store.
      chunk: the number of the chunk.
      excluded: what the array `excluded` says, (chunk_rows,).
      usable: what usable_rows says, (2,).
      expected: what `excluded` must say, (n,): the last chunk may be short.
    """
    must_be = np.append(expected, np.full(len(excluded) - len(expected), PADDING, np.uint8))
    wrong = np.flatnonzero(excluded != must_be)
    if len(wrong):
        row = chunk * len(excluded) + int(wrong[0])
        raise UserError(
            f"{path}/excluded says {excluded[wrong[0]]} of row {row}, which its token, position "
            "and values do not: the store is damaged; make it again"
        )
    counts = [int((expected == 0).sum()), int((expected & NONFINITE == 0).sum())]
    if usable.tolist() != counts:
        raise UserError(
            f"{path}/usable_rows says {usable.tolist()} of chunk {chunk}, which has {counts}: the "
            "store is damaged; make it again"
        )


def check_statistics(
    path: str, meta: StoreMeta, site: str, sums: statistics.SiteSums, count: np.ndarray
) -> None:
    """Raises UserError unless meta.json has the statistics of the site that `sums` are of.

    Args:
      path: the path of the store.
      meta: its meta.json.
      site: the name of the site.
      sums: the sums over all its rows that are finite and no special tokens.
      count: how many these are at each position, (context_length,).
    """
    said = meta.sites[site]
    mean, squared, rows = statistics.mean_and_squared_norm(sums, count, meta.excluded_positions)
    right = (
        (said.rows_used, said.nonfinite_rows) == (rows, sums.nonfinite_rows)
        and np.allclose(said.mean, mean, rtol=0, atol=_ROUNDING * squared**0.5)
        and abs(said.mean_squared_norm - squared) <= _ROUNDING * squared
    )
    if not right:
        raise UserError(
            f"{path}/meta.json has other statistics of site {site} than its rows: the store is "
            "damaged; make it again"
        )
