"""Tells which units are active on a single token: they are easy to explain, and counted apart."""

import numpy as np

from sae_jax.interpret.activity import Activity, peaks
from sae_jax.interpret.hashes import WindowHashes
from sae_jax.progress_bar import progress


def single_token(activity: Activity, latents=None, top: int = 20) -> np.ndarray:
    """Returns whether a latent's strongest windows all peak on one and the same token, (n,) bool.

    A sequence has one window, around the latent's peak there, and sequences whose windows have the
    same tokens count once. Of a latent that has fewer than `top` all are looked at, which must be
    two at least.

    Args:
      activity: where the latents are active.
      latents: which, (n,). None: all.
      top: how many windows are looked at.
    """
    tokens, length = np.array(activity.tokens).reshape(-1), activity.tokens.shape[1]
    windows = WindowHashes(activity.tokens, 4, 4)
    latents = range(activity.d_sae) if latents is None else latents
    found = np.zeros(len(latents), bool)
    for i, latent in enumerate(progress(latents, "single tokens", len(latents), "latent")):
        rows, values = activity.of(latent)
        rows = rows[peaks(rows, values, length)]
        _, first = np.unique(windows(rows // length, rows % length), return_index=True)
        of_peaks = tokens[rows[np.sort(first)[:top]]]
        found[i] = len(of_peaks) > 1 and (of_peaks == of_peaks[0]).all()
    return found
