"""The sites of a live store: rows that are computed when they are read.

A store on disk keeps what its model made of its tokens; a live one keeps the tokens, the masks and
the statistics, and which model it was. Reading some chunks, or rows, runs the model on their
sequences, in batches of the size that the statistics were taken with, and rounds to the store's
dtype: the rows are those of the harvested store, bit for bit on the machine that harvested it. What
is in memory is what was asked for, so a stream's two windows are all that it holds.

Each process runs the model on devices of its own and talks to no other, so that processes may read
different rows, and different numbers of them.
"""

import dataclasses
import functools
import math
import threading
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import logging

from sae_jax.activations import statistics
from sae_jax.errors import UserError

_DISPATCH = threading.Lock()  # a stream's thread and the trainer's may read at the same time


@dataclasses.dataclass(frozen=True)
class LiveMeta:
    """What computes the rows. batch_size: contexts that the model always runs on; mesh_model:
    devices that share it; statistics_tokens: of so many at least are the statistics, None: of
    all."""

    model: str  # what `lm.open_model` takes, with an absolute path
    model_fingerprint: str
    model_dtype: str
    batch_size: int
    mesh_model: int = 1
    statistics_tokens: int | None = None


class LiveRows:
    """Reads the sites of a live store."""

    def __init__(self, store):
        self._store = store

    def check_model(self) -> None:
        """UserError unless the model is where it was, and the same."""
        meta, path = self._store.meta.live, self._store.path
        try:
            fingerprint = _lm().open_model(meta.model).fingerprint
        except UserError as error:
            raise UserError(
                f"{path} is live and needs its model: {error}; put it back, or name its place as "
                f"live.model in {path}/meta.json"
            ) from None
        if fingerprint != meta.model_fingerprint:
            raise UserError(
                f"{path} is live, and {meta.model} is no longer the model that it was made with; "
                "put that one back, or make the store again"
            )

    def read_chunks(self, sites: Sequence[str], chunks, outs: Sequence[np.ndarray]) -> None:
        meta = self._store.meta
        logging.log_every_n_seconds(
            logging.INFO, "computing %d chunks of %s of %s, as a live store's are", 10,
            len(chunks), ",".join(sites), self._store.path,
        )  # fmt: skip
        numbers = np.asarray(chunks)[:, None] * meta.chunk_sequences
        numbers = (numbers + np.arange(meta.chunk_sequences)).reshape(-1)
        places = np.flatnonzero(numbers < meta.num_sequences)
        shape = (len(chunks), meta.chunk_sequences, meta.context_length, -1)
        outs = [out.reshape(shape) for out in outs]  # views: an axis is split
        for start, batch in self._computed(sites, numbers[places]):
            for site, out in zip(sites, outs, strict=True):
                for place, x_TxW in zip(places[start:], batch[site], strict=False):
                    out[divmod(place, meta.chunk_sequences)] = x_TxW

    def read_rows(self, sites: Sequence[str], ids: np.ndarray, outs: Sequence[np.ndarray]) -> None:
        numbers, sequence_of_row = np.unique(
            ids // self._store.meta.context_length, return_inverse=True
        )
        position = ids % self._store.meta.context_length
        for start, batch in self._computed(sites, numbers):
            slot = sequence_of_row - start
            mine = (slot >= 0) & (slot < len(batch[sites[0]]))
            for site, out in zip(sites, outs, strict=True):
                out[mine] = batch[site][slot[mine], position[mine]]

    def _computed(self, sites, numbers: np.ndarray) -> Iterator[tuple[int, dict]]:
        """(start, {site: (n, T, width) of the sequences numbers[start : start + n]}), all sites by
        one pass of the model."""
        if not len(numbers):
            return
        store, live = self._store, self._store.meta.live
        tokens = store.tokens()[numbers].read().result()

        def run(batch):
            with _DISPATCH:
                runner = _runner(live, tuple(sites), store.meta.sites[sites[0]].numpy_dtype)
                return runner(batch)

        for start, arrays in _lm().in_batches(run, tokens, live.batch_size):
            batch = numbers[start : start + live.batch_size]
            values = {site: np.asarray(arrays[site])[: len(batch)] for site in sites}
            for site, x in values.items():
                self._check_finite(site, x, batch)
            yield start, values

    def _check_finite(self, site: str, x_BxTxW: np.ndarray, numbers: np.ndarray) -> None:
        """Rows that are not finite must be those that were found when the store was made."""
        finite = statistics.finite_rows(x_BxTxW.reshape(-1, x_BxTxW.shape[-1]))
        if finite.all():
            return
        length = self._store.meta.context_length
        for place in np.flatnonzero(~finite):
            row = int(numbers[place // length]) * length + int(place % length)
            if not self._store.is_nonfinite(row):
                raise UserError(
                    f"row {row} of site {site} (token {row % length} of sequence {row // length} "
                    f"of {self._store.path}) came out as NaN or infinity, and the store does not "
                    "say so; make it again without --statistics_tokens, so that such rows are "
                    "known and can be left out"
                )


@functools.lru_cache(maxsize=8)
def _runner(live: LiveMeta, sites: tuple[str, ...], dtype):
    return _model(live).runner(sites, dtype)


@functools.lru_cache(maxsize=1)
def _model(live: LiveMeta):
    """The model, once for all the streams of a process, on as many of its devices as its batch can
    be shared by."""
    devices = jax.local_devices()
    if live.mesh_model > len(devices):
        raise UserError(
            f"{live.model} is to be shared by {live.mesh_model} devices, but this process has "
            f"{len(devices)}"
        )
    data = math.gcd(live.batch_size, len(devices) // live.mesh_model)
    shape = (data, live.mesh_model)
    mesh = jax.make_mesh(shape, ("data", "model"), devices=devices[: math.prod(shape)])
    return _lm().open_model(live.model, live.model_dtype, mesh)


def _lm():
    """The neighbour that runs models. It imports this room, so this one looks for it when it is
    needed, and only here."""
    from sae_jax import lm

    return lm
