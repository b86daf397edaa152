"""Some sites of a store side by side: the columns of the first, then those of the second, and so
on.
"""

from collections.abc import Sequence

import numpy as np

from sae_jax.activations import statistics
from sae_jax.activations.store import Store
from sae_jax.errors import UserError


class Sites:
    """Sites of a store, read as one matrix of `width` columns.

    Several sites of different dtypes are read as float32.

    Attributes:
      store: the store.
      names: the names of the sites.
      widths: their widths.
      width: the sum of their widths.
      dtype: the NumPy dtype of the matrix.
      mean: the mean (width,) of the rows, as the store has it.
      mean_squared_norms: the mean squared norm of the rows at each site.
    """

    def __init__(self, store: Store, names: str | Sequence[str] = ""):
        """Finds sites in a store.

        Args:
          store: the store.
          names: "a", or "a,b" for several in this order, or a sequence of names; "" stands for the
            only site.

        Raises UserError for a site that the store does not have, or that is named twice.
        """
        self.store = store
        self.names = tuple(store.resolve_site(name) for name in split_names(names))
        check_distinct(self.names, store.path)
        metas = [store.meta.sites[name] for name in self.names]
        self.widths = tuple(meta.width for meta in metas)
        self.width = sum(self.widths)
        dtypes = {meta.numpy_dtype for meta in metas}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        self.mean = np.concatenate([np.asarray(meta.mean) for meta in metas])  # (width,)
        self.mean_squared_norms = tuple(meta.mean_squared_norm for meta in metas)

    def read_chunks(self, chunks, out: np.ndarray) -> None:
        """Reads whole chunks into out[i] (chunk_rows, width), each site straight into its own
        columns.

        Rows of `out` beyond the store's end are left as they are.
        """
        self.store.read_chunks(self.names, chunks, self._by_site(out))

    def read_rows(self, ids) -> np.ndarray:
        """Returns the rows (n, width) with the store rows `ids` (n,), in any order.

        It is slow, and for a few rows.
        """
        out = np.empty((len(ids), self.width), self.dtype)
        self.store.read_rows(self.names, np.asarray(ids), self._by_site(out))
        return out

    def check_finite(self, chunks, x: np.ndarray, used: np.ndarray) -> None:
        """Raises UserError, naming the site and the row, if the store is damaged in these chunks.

        It looks for rows that are used and not finite, and only then reads the chunks again.

        Args:
          chunks: the numbers of some chunks.
          x: their rows, (..., width).
          used: which rows are used, (...).
        """
        x = x.reshape(-1, self.width)
        if not (statistics.finite_rows(x) | ~used.reshape(-1)).all():
            self.store.check_chunks(chunks)

    def _by_site(self, x: np.ndarray) -> list[np.ndarray]:
        """Returns views of the columns of each site."""
        return np.split(x, np.cumsum(self.widths)[:-1], axis=-1)


def split_names(names: str | Sequence[str]) -> list[str]:
    """Returns ["a", "b"] for "a,b", or for a sequence of names."""
    return [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]


def check_distinct(names: Sequence[str], origin: str) -> None:
    """Raises UserError where a site is named twice; `origin` says where the sites are."""
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"site {name} of {origin} is named twice in {','.join(names)}; name each site once"
            )
