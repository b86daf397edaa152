"""Finds latents that fire on the same tokens, by the Jaccard index of the sets of their tokens.

A sketch of a latent is the `SKETCH` smallest of the hashes of its tokens, which are the same for
all latents (Broder 1997, "On the resemblance and containment of documents": bottom-k). Of two
latents, all tokens with a hash up to the smaller of the two sketches' last ones are known, which
are a uniform sample of all. A sketch that holds all tokens of its latent has no last one. So the
index is exact where both do, and has a standard error of 1 / sqrt(SKETCH) at most otherwise.
"""

from collections.abc import Iterator

import numpy as np
import scipy.sparse

from sae_jax.interpret.collection import COACTIVE
from sae_jax.interpret.events import Events
from sae_jax.interpret.hashes import row_hashes
from sae_jax.interpret.slots import ranks

SKETCH = 64
_CANDIDATES = 4 * COACTIVE  # of a latent, by an estimate, whose index is then computed
_PAIRS = 2**22  # of latents that share a token, at most about, at once
_NO_LAST = 2**32  # above every hash


def sketches(events: Events, latents: int) -> np.ndarray:
    """Returns the sketches (latents, SKETCH) uint32 of sorted events, ascending; 0 where a latent
    has no more tokens."""
    key = (events.latents.astype(np.uint64) << np.uint64(32)) | row_hashes(events.rows)
    key.sort()
    latent, hashed = (key >> np.uint64(32)).astype(np.int64), key.astype(np.uint32)
    rank = ranks(latent)
    kept = rank < SKETCH
    out = np.zeros((latents, SKETCH), np.uint32)
    out[latent[kept], rank[kept]] = hashed[kept]
    return out


class Similarities:
    """The most similar latents of each latent."""

    def __init__(self, sketch: np.ndarray, counts: np.ndarray):
        """Takes all latents' sketches, and on how many tokens each fires, (d_sae,)."""
        self._sketch, self._counts = sketch, counts
        self._sizes = np.minimum(counts, SKETCH)
        self._last = np.where(counts > SKETCH, sketch[:, -1].astype(np.int64), _NO_LAST)
        filled = np.arange(SKETCH) < self._sizes[:, None]
        hashes, column = np.unique(sketch[filled], return_inverse=True)
        starts = np.append(0, np.cumsum(self._sizes))
        ones = np.ones(len(column), np.int32)
        shape = len(counts), len(hashes)
        self._holds = scipy.sparse.csr_array((ones, column.astype(np.int32), starts), shape)
        self._held = self._holds.T.tocsr()
        sharing = np.diff(self._held.indptr)  # latents of each hash
        self._work = np.append(0, np.cumsum(self._holds @ sharing.astype(np.int64)))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yields first and stop of the latents to compare at once, so that their pairs fit."""
        first, latents = 0, len(self._counts)
        while first < latents:
            stop = int(np.searchsorted(self._work, self._work[first] + _PAIRS, "right")) - 1
            stop = min(max(stop, first + 1), first + 2**14, latents)
            yield first, stop
            first = stop

    def of(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the most similar latents (n, COACTIVE) int32 and their indices float32.

        They are those of the latents first..stop. Among equal ones the first latents are first;
        where there are no more the latent is -1.
        """
        latents = np.full((stop - first, COACTIVE), -1, np.int32)
        similarity = np.zeros((stop - first, COACTIVE), np.float32)
        pairs = self._holds[first:stop] @ self._held
        for i, latent in enumerate(range(first, stop)):  # arrays that a CPU's cache holds
            part = slice(pairs.indptr[i], pairs.indptr[i + 1])
            found, index = self._most_similar(latent, pairs.indices[part], pairs.data[part])
            latents[i, : len(found)], similarity[i, : len(found)] = found, index
        return latents, similarity

    def _most_similar(self, latent: int, others: np.ndarray, shared: np.ndarray):
        """Returns the latents and indices of some `others`, of which the sketches share hashes."""
        apart = others != latent
        others, shared = others[apart], shared[apart]
        last = np.minimum(self._last[latent], self._last[others])
        if len(others) > _CANDIDATES:
            expected = (self._counts[latent] + self._counts[others]) * last
            estimate = (shared / expected).astype(np.float32).view(np.uint32).astype(np.uint64)
            key = (estimate << np.uint64(32)) | (_NO_LAST - 1 - others).astype(np.uint64)
            best = np.argpartition(key, -_CANDIDATES)[-_CANDIDATES:]
            others, shared, last = others[best], shared[best], last[best]
        own = np.searchsorted(self._sketch[latent, : self._sizes[latent]], last, "right")
        filled = np.arange(SKETCH) < self._sizes[others][:, None]
        their = ((self._sketch[others] <= last[:, None]) & filled).sum(axis=1)
        index = shared / (own + their - shared)
        best = np.lexsort((others, -index))[:COACTIVE]
        return others[best], index[best]
