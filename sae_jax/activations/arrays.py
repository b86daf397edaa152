"""A store whose rows are arrays in memory.

It is what `write_store` would make of the arrays, without the files.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from sae_jax.activations import statistics
from sae_jax.activations.meta import (
    FORMAT_VERSION,
    NONFINITE,
    PADDING,
    SiteMeta,
    StoreMeta,
    check_sites,
)
from sae_jax.activations.writer import layout
from sae_jax.errors import UserError, choose

_FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)


class ArrayStore:
    """Arrays (rows, width) in memory, which are read as a `Store` is.

    The rows come in the order, and with the statistics, of the store that `write_store` would make
    of the arrays. So training on either is the same, bit for bit.

    Attributes:
      path: a name that tells these arrays from others, so that a run is not resumed on others.
      meta: what meta.json of the store would say.
      num_rows: the number of rows.
      usable_rows: see `Store.usable_rows`.
    """

    def __init__(self, arrays: np.ndarray | Mapping[str, np.ndarray]):
        """Takes one array, or {site: array} with the same number of rows each.

        Arrays of float32, float16 and bfloat16 are not copied; other numbers become float32. Raises
        UserError if an array has no two axes or no rows, or if the numbers of rows differ.
        """
        if not isinstance(arrays, Mapping):
            arrays = {"activations": arrays}
        self._arrays = {name: as_rows(name, x) for name, x in arrays.items()}
        check_sites({name: x.shape[1] for name, x in self._arrays.items()})
        counts = {name: len(x) for name, x in self._arrays.items()}
        if len(set(counts.values())) > 1:
            raise UserError(f"every site needs the same number of rows; got {counts}")
        self.num_rows = next(iter(counts.values()))
        if not self.num_rows:
            raise UserError("the activations have no rows")
        self.path = f"array:{_fingerprint(self._arrays)}"
        self._excluded = np.zeros(self.num_rows, np.uint8)
        for x in self._arrays.values():
            self._excluded[~statistics.finite_rows(x)] |= NONFINITE
        self.meta = self._describe()
        chunks = np.arange(self.meta.num_chunks)
        excluded = self.read_excluded(chunks)
        counts = [(excluded == 0).sum(axis=1), (excluded & (NONFINITE | PADDING) == 0).sum(axis=1)]
        self.usable_rows = np.stack(counts, axis=1).astype(np.int32)

    def resolve_site(self, name: str = "") -> str:
        """Returns `name` if there is that site, and for "" the name of the only site.

        Raises UserError, listing the sites, if there is no such site or "" could be several.
        """
        if not name and len(self._arrays) > 1:
            raise UserError(f"there are several sites, choose one: {', '.join(self._arrays)}")
        return choose(name, self._arrays, "the site") if name else next(iter(self._arrays))

    @property
    def fingerprint(self) -> str:
        """A hash of the arrays."""
        return self.path

    def check_chunks(self, chunks) -> None:
        """Does nothing, because rows in memory that are not finite were marked."""

    def tokens(self) -> None:
        """Returns None: it is not known which texts the rows belong to."""

    def read_excluded(self, chunks) -> np.ndarray:
        """Returns (len(chunks), chunk_rows) uint8, as `Store.read_excluded` does."""
        out = np.full((len(chunks), self.meta.chunk_rows), PADDING, np.uint8)
        self._copy_chunks(self._excluded, chunks, out)
        return out

    def read_chunks(self, sites: Sequence[str], chunks, outs: Sequence[np.ndarray]) -> None:
        """Copies whole chunks of each site into its `out` (len(chunks), chunk_rows, width)."""
        for site, out in zip(sites, outs, strict=True):
            self._copy_chunks(self._arrays[site], chunks, out)

    def read_rows(self, sites: Sequence[str], ids: np.ndarray, outs: Sequence[np.ndarray]) -> None:
        """Copies rows `ids` (n,), in any order, of each site into its `out` (n, width)."""
        for site, out in zip(sites, outs, strict=True):
            out[...] = self._arrays[site][ids]

    def _copy_chunks(self, values: np.ndarray, chunks, out: np.ndarray) -> None:
        rows = self.meta.chunk_rows
        for chunk, target in zip(chunks, out, strict=True):
            found = values[chunk * rows : (chunk + 1) * rows]
            target[: len(found)] = found

    def _describe(self) -> StoreMeta:
        sites = {name: SiteMeta(x.shape[1], x.dtype.name) for name, x in self._arrays.items()}
        widest = max(sites.values(), key=lambda site: site.width)
        chunk, shard = layout(widest, self.num_rows, 1)
        used = self._excluded == 0
        for name, x in self._arrays.items():
            nonfinite = int((~statistics.finite_rows(x)).sum())
            parts = [  # the shards of a store, so that sums are rounded as in one
                statistics.site_sums(x[i : i + shard], used[i : i + shard, None], 0)
                for i in range(0, self.num_rows, shard)
            ]
            sums = sum(parts[1:], start=parts[0])
            mean, squared, rows = statistics.mean_and_squared_norm(sums, np.array([used.sum()]), [])
            sites[name] = dataclasses.replace(
                sites[name],
                mean=mean.tolist(),
                mean_squared_norm=squared,
                rows_used=rows,
                nonfinite_rows=nonfinite,
            )
        return StoreMeta(
            format_version=FORMAT_VERSION,
            complete=True,
            context_length=1,
            num_sequences=self.num_rows,
            chunk_sequences=chunk,
            shard_sequences=shard,
            sites=sites,
        )


def as_rows(name: str, x) -> np.ndarray:
    """Returns activations as an array (rows, width) of a float type that stores have.

    Arrays of such a type are not copied, and other numbers become float32. Raises UserError, which
    calls the array `name`, for anything else.
    """
    torch = sys.modules.get("torch")  # there is no torch tensor before torch is imported
    if torch is not None and isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = x.float() if x.dtype == torch.bfloat16 else x  # NumPy has no such type
    x = np.asarray(x)
    if x.ndim != 2 or not (x.dtype in _FLOATS or x.dtype.kind in "fiu"):
        raise UserError(
            f"activations must be numbers (rows, width); {name} has shape {x.shape} of {x.dtype}"
        )
    return np.ascontiguousarray(x) if x.dtype in _FLOATS else np.ascontiguousarray(x, np.float32)


def _fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns a hash of the arrays' names, shapes, types and values."""
    digest = hashlib.blake2b(digest_size=8)
    for name, x in arrays.items():
        digest.update(f"{name} {x.shape} {x.dtype.name} ".encode())
        digest.update(x.view(np.uint8))
    return digest.hexdigest()
