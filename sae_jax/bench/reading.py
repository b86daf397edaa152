"""Reading batches: GB/s of the stream, beside plain sequential reads of the same bytes."""

import contextlib
import os
import pathlib
import statistics
import tempfile
import time

import ml_dtypes
import numpy as np

from sae_jax.activations import Store, Stream, write_store
from sae_jax.config import UserError

_BLOCK_BYTES = 6 << 20
_DROP_CACHES = pathlib.Path("/proc/sys/vm/drop_caches")


def measure_reading(
    store_path=None,
    site: str = "",
    *,
    width: int = 768,
    rows: int = 786_432,
    batch_size: int = 2048,
    rounds: int = 5,
) -> dict:
    """Median GB/s over `rounds` of one epoch of shuffled batches and of a plain sequential read
    of the site's files, taken in turn, with the files in the page cache ("warm") and not
    ("cold"; only where this process may drop the system's caches, which slows others down).
    Without `store_path` it makes a bfloat16 store (rows, width) in a temporary directory.

    A stream is timed from its first batch on: its buffers are touched then and its first window
    is read, as in all but the first second of training. Of the last window only the part that
    is delivered counts. Ratios are medians of the rounds' own ratios."""
    with contextlib.ExitStack() as stack:
        if store_path is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            store = _make_store(pathlib.Path(directory) / "store", rows, width)
        else:
            store = Store.open(store_path)
        if store.folder.remote:
            raise UserError(f"{store.path} is not local; measure a store on this machine's disk")
        stream = Stream(store, site, batch_size=batch_size, holdout_fraction=0.0, epochs=rounds + 2)
        figures = {
            "bytes": stream.width * store.num_rows * store.site(site).dtype.numpy_dtype.itemsize,
            "chunk_rows": store.meta.chunk_rows,
            "batch_size": batch_size,
            "rounds": rounds,
        }
        for state, drop in (("warm", lambda: None), ("cold", _drop_caches)):
            if state == "warm" or os.access(_DROP_CACHES, os.W_OK):
                figures[state] = _measure(store, stream, rounds, drop)
        return figures


def _measure(store: Store, stream: Stream, rounds: int, drop) -> dict:
    plain_rates, stream_rates = [], []
    steps = stream.order.steps_per_epoch
    files = sorted(pathlib.Path(store.path, "sites", stream.site).glob("c/*/*"))
    batches = stream.batches()
    for _ in range(steps):  # touches the buffers, and the files
        next(batches)
    for _ in range(rounds):
        drop()
        plain_rates.append(_rate(_read_plainly(files)))
        drop()
        stream_rates.append(_rate(next(batches).nbytes for _ in range(steps)))
    ratios = [a / b for a, b in zip(stream_rates, plain_rates, strict=True)]
    return {
        "plain_gb_per_second": statistics.median(plain_rates),
        "stream_gb_per_second": statistics.median(stream_rates),
        "stream_over_plain": statistics.median(ratios),
    }


def _rate(sizes) -> float:
    """GB/s of taking everything from `sizes`, an iterator that works and says how many bytes."""
    begin = time.perf_counter()
    return sum(sizes) / 1e9 / (time.perf_counter() - begin)


def _read_plainly(files):
    block = bytearray(_BLOCK_BYTES)
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while count := opened.readinto(block):
                yield count


def _drop_caches() -> None:
    os.sync()
    _DROP_CACHES.write_text("1")


def _make_store(path: pathlib.Path, rows: int, width: int) -> Store:
    block = np.random.default_rng(0).normal(size=(16_384, width)).astype(ml_dtypes.bfloat16)
    blocks = (block[: min(len(block), rows - i)] for i in range(0, rows, len(block)))
    return write_store(path, blocks, dtype="bfloat16")
