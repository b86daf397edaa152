"""Cuts the rows and sequences of an evaluation into batches of one shape."""

import numpy as np

_LATENTS = 2**25  # elements of one batch's dense latents
_LOGITS = 2**25  # elements of one batch's logits, of which four or so exist at once


def pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """Returns `x` with zero rows added until it has `rows` rows.

    So the last batch, which may be short, compiles no new program.
    """
    return np.pad(x, [(0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)]) if len(x) < rows else x


def rows_at_once(d_sae: int) -> int:
    """Returns of how many rows the dense latents of an SAE fit in memory."""
    return min(max(128, _LATENTS // d_sae), 8192)


def evenly_spaced(items: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` of the items, evenly spaced, or all of them where there are fewer."""
    if count >= len(items):
        return items
    return items[np.arange(count) * len(items) // count]


def sequences_at_once(vocab_size: int, sequences: int, context_length: int) -> int:
    """Returns how many of the `sequences` a language model runs on at once.

    It is chosen so that the logits fit in memory.
    """
    return min(sequences, max(1, _LOGITS // (context_length * vocab_size)))
