"""Shares the batches of an evaluation among the processes of a program.

Each process computes its own batches on its first device, independently of the others. Their sums
are added up at the end.
"""

import pickle
from collections.abc import Iterable

import jax
import numpy as np
from jax.experimental import multihost_utils


def own_share(starts: range) -> range:
    """Returns this process's share of `starts`, the numbers of the batches' first rows.

    With P processes, process p gets every P-th number, from the p-th on.
    """
    return starts[jax.process_index() :: jax.process_count()]


def from_all(value) -> list:
    """Returns the values of all processes, in the order of their numbers.

    All processes must call it. Values are pickled, because JAX would round float64.
    """
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.pad(own, (0, max(sizes) - len(own)))
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def add_up_all(totals: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Adds up sums by name, in float64 on the host. Of `max_*` it takes the maximum."""
    out: dict[str, np.ndarray] = {}
    for sums in totals:
        for name, value in sums.items():
            combine = np.maximum if name.startswith("max_") else np.add
            value = np.asarray(value, np.float64)
            out[name] = combine(out[name], value) if name in out else value
    return out
