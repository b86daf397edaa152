"""Finds the latents whose decoder rows point most nearly where a latent's own does."""

import functools

import numpy as np

from sae_jax.sae import SAE

COUNT = 8
_COLUMNS = 32_768  # latents that are compared with at once


class Neighbours:
    """The latents with the largest cosines of their decoder rows, exactly, a few latents a time."""

    def __init__(self, sae: SAE):
        """Takes the SAE's decoder, which is not looked at yet."""
        self._sae = sae

    @functools.cached_property
    def _units(self) -> np.ndarray:
        """The decoder's rows (d_sae, d_out) in the model's units, at length 1; 0 stays 0."""
        rows = np.asarray(self._sae.w_dec[...] / self._sae.target_scale, np.float32)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(norms > 0, norms, 1)

    def find(self, latents: np.ndarray, count: int = COUNT) -> list[list[tuple[int, float]]]:
        """Returns (latent, cosine) of the nearest others of each of `latents` (L,), nearest first.

        It takes 2 L d_sae d_out FLOPs, and memory for L times 32,768 numbers.
        """
        latents = np.asarray(latents)
        count = min(count, len(self._units) - 1)
        queries = self._units[latents]
        best = np.full((len(latents), count), -np.inf, np.float32)
        found = np.full((len(latents), count), -1)
        for first in range(0, len(self._units), _COLUMNS):
            cosines = queries @ self._units[first : first + _COLUMNS].T
            numbers = np.broadcast_to(first + np.arange(cosines.shape[1]), cosines.shape)
            cosines[numbers == latents[:, None]] = -np.inf  # itself
            if cosines.shape[1] > count:
                kept = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
                cosines, numbers = _taken(kept, cosines, numbers)
            best, found = np.hstack([best, cosines]), np.hstack([found, numbers])
            best, found = _taken(np.lexsort((found, -best))[:, :count], best, found)
        return [
            [(int(i), float(c)) for i, c in zip(*row, strict=True) if np.isfinite(c)]
            for row in zip(found, best, strict=True)
        ]


def _taken(places, *arrays: np.ndarray) -> list[np.ndarray]:
    return [np.take_along_axis(array, places, axis=1) for array in arrays]
