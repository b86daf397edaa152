"""Measures reading: GB/s of the stream of batches, beside plain reads of the same bytes."""

import contextlib
import os
import pathlib
import statistics
import tempfile
import time

import ml_dtypes
import numpy as np

from sae_jax.activations import Store, Stream, write_store
from sae_jax.errors import UserError

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
    """Measures shuffled batches and a plain sequential read of the site's files, in turn.

    Args:
      store_path: the store to read. Without it a bfloat16 store is made in a temporary directory.
      site: the site to read, by default the only one.
      width: the width of the store that is made.
      rows: how many rows it has.
      batch_size: rows of a batch.
      rounds: how many rounds are timed.

    Returns medians in GB/s, with the files in the page cache ("warm") and not ("cold"). Cold reads
    are measured only where this process may drop the system's caches, which slows others down for a
    while.

    A warm pass is four epochs. A cold pass is one epoch that starts with nothing read, so that its
    first window is read before the first batch comes. The window buffers were touched before, as
    they are in all but the first second of training.

    Raises UserError if the store is not on this machine.
    """
    with contextlib.ExitStack() as stack:
        if store_path is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            store = _make_store(pathlib.Path(directory) / "store", rows, width)
        else:
            store = Store.open(store_path)
        if store.folder.remote:
            raise UserError(f"{store.path} is not local; measure a store on this machine's disk")
        itemsize = store.site(site).dtype.numpy_dtype.itemsize
        figures = {
            "bytes": store.num_rows * store.site(site).shape[1] * itemsize,
            "chunk_rows": store.meta.chunk_rows,
            "batch_size": batch_size,
            "rounds": rounds,
        }
        for state, epochs in (("warm", 4), ("cold", 1)):
            if state == "warm" or os.access(_DROP_CACHES, os.W_OK):
                stream = Stream(
                    store,
                    site,
                    batch_size=batch_size,
                    holdout_fraction=0.0,
                    epochs=epochs,
                    window_rows=min(262_144, store.num_rows // 3),
                )
                figures[state] = _measure(stream, rounds, cold=state == "cold")
        return figures


def table(figures: dict) -> str:
    """Returns the figures of `measure_reading` as a table for people."""
    lines = [
        f"{figures['bytes'] / 1e9:.2f} GB in chunks of {figures['chunk_rows']} rows; GB/s, medians",
        f"{'':12}{'plain read':>12}{'stream':>10}{'ratio':>8}",
    ]
    for state in ("warm", "cold"):
        if state not in figures:
            lines.append(f"{state:12}only as root, who may drop the page cache")
            continue
        rates = figures[state]
        plain, stream = rates["plain_gb_per_second"], rates["stream_gb_per_second"]
        lines.append(f"{state:12}{plain:12.2f}{stream:10.2f}{rates['stream_over_plain']:7.0%}")
    return "\n".join(lines)


def _measure(stream: Stream, rounds: int, cold: bool) -> dict:
    files = sorted(pathlib.Path(stream.store.path, "sites", *stream.site_names).glob("c/*/*"))
    batches = stream.batches()
    passes = {
        "stream": lambda: (batch.nbytes for batch in batches),
        "plain": lambda: _read_plainly(files),
    }
    rates = {name: [] for name in passes}
    for i in range(rounds + 1):  # the first round touches the buffers, and is not counted
        # Each goes first in turn, because what one leaves in caches and queues helps or harms the
        # other.
        for name in sorted(passes, reverse=i % 2 == 1):
            batches.set_state({"step": 0})
            if cold:
                _drop_caches()
            rates[name].append(_rate(passes[name]()))
    plain, stream_rate = (statistics.median(rates[name][1:]) for name in ("plain", "stream"))
    return {
        "plain_gb_per_second": plain,
        "stream_gb_per_second": stream_rate,
        "stream_over_plain": stream_rate / plain,
    }


def _rate(sizes) -> float:
    """Returns GB/s of an iterator that does the work and yields how many bytes it read."""
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
