"""Rows and sequences of an evaluation cut into batches of one shape."""

import numpy as np

_LOGITS = 2**25  # elements of one batch's logits, of which four or so exist at once


def pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """`x` with zero rows added up to `rows`, so that a last short batch compiles nothing new."""
    return np.pad(x, [(0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)]) if len(x) < rows else x


def evenly_spaced(items: np.ndarray, count: int) -> np.ndarray:
    """`count` of the items, evenly spaced; all where there are no more."""
    if count >= len(items):
        return items
    return items[np.arange(count) * len(items) // count]


def sequences_at_once(vocab_size: int, sequences: int, context_length: int) -> int:
    """How many of the `sequences` a language model runs on at once, so that its logits fit."""
    return min(sequences, max(1, _LOGITS // (context_length * vocab_size)))
