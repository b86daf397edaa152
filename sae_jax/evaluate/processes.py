"""The batches of an evaluation shared out among the processes of a program. Each computes its own
on its first device, knowing nothing of the others; what they added up is added up at the end."""

import pickle
from collections.abc import Iterable

import jax
import numpy as np
from jax.experimental import multihost_utils


def shared_out(starts: range) -> range:
    """Those of the batches' starts that are this process's."""
    return starts[jax.process_index() :: jax.process_count()]


def from_all(value) -> list:
    """What each process has, in their order; all must call it. Exact, whatever it is: pickled, for
    JAX would round float64."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.pad(own, (0, max(sizes) - len(own)))
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def add_up_all(totals: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Sums by name, in float64 on the host; of `max_*` the maximum."""
    out: dict[str, np.ndarray] = {}
    for sums in totals:
        for name, value in sums.items():
            combine = np.maximum if name.startswith("max_") else np.add
            value = np.asarray(value, np.float64)
            out[name] = combine(out[name], value) if name in out else value
    return out
