"""Reads live stores, whose rows a language model computes when they are read.

A store on disk keeps the activations of its tokens. A live store keeps the tokens, the masks, the
statistics and the model's name instead. Reading chunks or rows runs the model on their sequences,
in batches of the size that the statistics were taken with, and rounds to the store's dtype. The
rows equal those of the harvested store, bit for bit on the machine that harvested it. Only the rows
that are read are in memory, so a stream holds no more than its two windows.

Each process runs the model on devices of its own without talking to others, so processes may read
different rows, and different numbers of them.
"""

import functools
import math
import threading
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import tensorstore as ts
from absl import logging

from sae_jax import activations
from sae_jax.activations import LiveMeta, Store, Stream, WorldStream, statistics
from sae_jax.activations.files import Folder
from sae_jax.activations.meta import read_complete_meta
from sae_jax.config import DataConfig
from sae_jax.errors import UserError
from sae_jax.lm.language_model import LanguageModel, in_batches
from sae_jax.lm.model import open_model

_DISPATCH = threading.Lock()  # a stream's thread and the trainer's may read at the same time


def open_store(path) -> Store:
    """Opens the store at `path`, which may be harvested or live.

    Raises UserError if there is no complete store, and if the model of a live store is missing or
    has changed.
    """
    return LiveStore.open(path) if read_complete_meta(Folder(path)).live else Store.open(path)


def open_stream(
    data: DataConfig, split: str = "train", batch_size: int | None = None
) -> Stream | WorldStream:
    """Opens the stream of batches that `data` describes, from a live store too.

    Arguments, result and errors are those of `activations.open_stream`.
    """
    return activations.open_stream(data, split, batch_size, open_store)


class LiveStore(Store):
    """A live store, opened for reading by `LiveStore.open(path)` or `lm.open_store(path)`."""

    @classmethod
    def open(cls, path) -> "LiveStore":
        """Opens the live store at `path`.

        Raises UserError if there is no complete store, and if its model is missing or has changed.
        """
        folder = Folder(path)
        store = cls(folder, read_complete_meta(folder))
        store.check_files()
        store._check_model()
        return store

    def site(self, name: str = "") -> ts.TensorStore:
        """Raises UserError, because a live store has no array of a site's rows."""
        raise UserError(
            f"{self.path} is live: its rows are not there but computed when they are read; "
            "harvest without --live to have them as an array"
        )

    def read(self, site: str, rows: slice) -> np.ndarray:
        site = self.resolve_site(site)
        start, stop, step = rows.indices(self.num_rows)
        meta, ids = self.meta.sites[site], np.arange(start, max(start, stop), step)
        out = np.empty((len(ids), meta.width), meta.numpy_dtype)
        self.read_rows([site], ids, [out])
        return out

    def read_rows(self, sites: Sequence[str], ids: np.ndarray, outs: Sequence[np.ndarray]) -> None:
        length = self.meta.context_length
        numbers, sequence_of_row = np.unique(ids // length, return_inverse=True)
        position = ids % length
        for start, batch in self._computed(sites, numbers):
            slot = sequence_of_row - start
            mine = (slot >= 0) & (slot < len(batch[sites[0]]))
            for site, out in zip(sites, outs, strict=True):
                out[mine] = batch[site][slot[mine], position[mine]]

    def read_chunks(self, sites: Sequence[str], chunks, outs: Sequence[np.ndarray]) -> None:
        meta = self.meta
        logging.log_every_n_seconds(
            logging.INFO, "computing %d chunks of %s of %s, as a live store's are", 10,
            len(chunks), ",".join(sites), self.path,
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

    def check_chunks(self, chunks) -> None:
        """Raises UserError, naming the file, if a file of the store is gone.

        A live store holds no activations that could be damaged; they are checked when they come.
        """
        del chunks
        self.check_files()

    def _check_model(self) -> None:
        """Raises UserError unless the model is where it was, and the same."""
        live, path = self.meta.live, self.path
        try:
            fingerprint = open_model(live.model).fingerprint
        except UserError as error:
            raise UserError(
                f"{path} is live and needs its model: {error}; put it back, or name its place as "
                f"live.model in {path}/meta.json"
            ) from None
        if fingerprint != live.model_fingerprint:
            raise UserError(
                f"{path} is live, and {live.model} is no longer the model that it was made with; "
                "put that one back, or make the store again"
            )

    def _computed(self, sites, numbers: np.ndarray) -> Iterator[tuple[int, dict]]:
        """Yields start and {site: (n, T, width)} of the sequences numbers[start : start + n].

        One pass of the model computes all sites.
        """
        if not len(numbers):
            return
        live, dtype = self.meta.live, self.meta.sites[sites[0]].numpy_dtype
        tokens = self.read_tokens(numbers)

        def run(batch):
            with _DISPATCH:
                return _runner(live, tuple(sites), dtype)(batch)

        for start, arrays in in_batches(run, tokens, live.batch_size):
            batch = numbers[start : start + live.batch_size]
            values = {site: np.asarray(arrays[site])[: len(batch)] for site in sites}
            for site, x in values.items():
                self._check_finite(site, x, batch)
            yield start, values

    def _check_finite(self, site: str, x_BxTxW: np.ndarray, numbers: np.ndarray) -> None:
        """Raises UserError if a row is not finite that was finite when the store was made."""
        finite = statistics.finite_rows(x_BxTxW.reshape(-1, x_BxTxW.shape[-1]))
        if finite.all():
            return
        length = self.meta.context_length
        for place in np.flatnonzero(~finite):
            row = int(numbers[place // length]) * length + int(place % length)
            if not self.is_nonfinite(row):
                raise UserError(
                    f"row {row} of site {site} (token {row % length} of sequence {row // length} "
                    f"of {self.path}) came out as NaN or infinity, and the store does not say so; "
                    "make it again without --statistics_tokens, so that such rows are known and "
                    "can be left out"
                )


@functools.lru_cache(maxsize=8)
def _runner(live: LiveMeta, sites: tuple[str, ...], dtype):
    return _model(live).runner(sites, dtype)


@functools.lru_cache(maxsize=1)
def _model(live: LiveMeta) -> LanguageModel:
    """Returns the model, opened once for all the streams of a process.

    It runs on as many of the process's devices as can share its batch.
    """
    devices = jax.local_devices()
    if live.mesh_model > len(devices):
        raise UserError(
            f"{live.model} is to be shared by {live.mesh_model} devices, but this process has "
            f"{len(devices)}"
        )
    data = math.gcd(live.batch_size, len(devices) // live.mesh_model)
    shape = (data, live.mesh_model)
    mesh = jax.make_mesh(shape, ("data", "model"), devices=devices[: math.prod(shape)])
    return open_model(live.model, live.model_dtype, mesh)
