"""The stream: batches of rows, in an order that is a pure function of (store, seed, step).

The order is `order.Order`; this file reads it fast. The chunks of a window are read whole, all at
the same time, into one of two buffers, while batches are gathered from the other. To read rows one
by one, or to permute chunks one by one, is 10 to 100 times slower.
"""

import concurrent.futures
from collections.abc import Sequence

import grain
import numpy as np

from sae_jax.activations.meta import NONFINITE
from sae_jax.activations.order import Order, split_chunks
from sae_jax.activations.sites import Sites
from sae_jax.activations.store import Store
from sae_jax.errors import UserError, choose

SPLITS = ("train", "heldout")


class Stream:
    """Batches (batch_size, width) of rows of a store, in the store's dtype.

    Of several sites a batch has the columns of each, side by side. The rows and their order are the
    same whatever the sites. Step s is the same batch, bit for bit, however many processes read it,
    each its own rows.

    Rows with any bit of `Store.excluded` are left out, and so are the sequences of the other split.
    Reading holds two windows of about `window_rows` rows in memory, in whole chunks.

    Attributes:
      store: the store.
      sites: the sites, as one matrix of columns.
      batch_size: rows of a batch.
      site_names: the names of the sites.
      site_widths: their widths.
      width: the sum of their widths.
      mean: the mean (width,) of the rows, as the store has it.
      site_mean_squared_norms: the mean squared norm of the rows at each site, as the store has it.
      order: the order of the rows.
      rows_per_epoch: the rows of the split.
      steps_per_epoch: the steps in which they are used once.
      num_steps: the steps of all epochs.
    """

    def __init__(
        self,
        store: Store,
        sites: str | Sequence[str] = "",
        *,
        batch_size: int,
        seed: int = 0,
        split: str = "train",
        holdout_fraction: float = 0.05,
        epochs: int = 1,
        virtual_shards: int = 64,
        window_rows: int = 262_144,
        include_excluded: bool = False,
        drop_nonfinite: bool = False,
    ):
        """Opens the stream of some sites of a store.

        Args:
          store: the store.
          sites: "a", or "a,b" for several side by side, or a sequence of names; "" stands for the
            only site.
          batch_size: rows of a batch.
          seed: chooses the order.
          split: "train" or "heldout".
          holdout_fraction: the fraction of the chunks that is held out.
          epochs: how often every row is used.
          virtual_shards: the number of equal parts of a batch, which processes share out.
          window_rows: the rows among which rows are shuffled.
          include_excluded: keeps the excluded rows, except those that are not finite in some site.
          drop_nonfinite: allows sites with rows that hold NaN or infinity; these rows are left out.

        Raises UserError if the batch cannot be cut into `virtual_shards`, if the split is smaller
        than a batch, and if a site is unknown, is named twice, or holds NaN or infinity.
        """
        self.store = store
        self.sites = Sites(store, sites)
        self.batch_size = batch_size
        choose(split, SPLITS, "the split of a stream")
        _check_numbers(batch_size, virtual_shards, window_rows, epochs, seed, holdout_fraction)
        for name in self.sites.names:
            nonfinite = store.meta.sites[name].nonfinite_rows
            if nonfinite and not drop_nonfinite:
                raise UserError(
                    f"{nonfinite} rows of site {name} in {store.path} hold NaN or infinity; "
                    "set data.drop_nonfinite=true to leave them out"
                )
        self.site_names = self.sites.names
        self.site_widths = self.sites.widths
        self.site_mean_squared_norms = self.sites.mean_squared_norms
        self.width = self.sites.width
        self.mean = self.sites.mean
        self._excluding = np.uint8(NONFINITE if include_excluded else 0xFF)
        chunks = split_chunks(store.meta.num_chunks, holdout_fraction, split)
        self._usable_column = 1 if include_excluded else 0
        usable = store.usable_rows[chunks, self._usable_column]
        self.rows_per_epoch = int(usable.sum())
        if self.rows_per_epoch < batch_size:
            raise UserError(
                f"{store.path} has {self.rows_per_epoch} {split} rows to use, fewer than one batch "
                f"of {batch_size}; make data.batch_size smaller or the store larger"
            )
        self.order = Order(
            chunks,
            usable,
            self._usable_mask,
            batch_size=batch_size,
            virtual_shards=virtual_shards,
            window_rows=window_rows,
            seed=seed,
        )
        self.steps_per_epoch = self.order.steps_per_epoch
        self.num_steps = epochs * self.steps_per_epoch

    def batch_rows(self, step: int) -> np.ndarray:
        """Returns the store rows (batch_size,) int64 of a step."""
        if not 0 <= step < self.num_steps:
            raise UserError(f"step {step} is not one of the stream's {self.num_steps} steps")
        window, offset = self.order.locate(step)
        return self.order.rows(window, np.arange(self.batch_size))[offset]

    def read(self, step: int) -> np.ndarray:
        """Returns the batch (batch_size, width) of a step.

        It is read row by row, which is slow and needs no window.
        """
        return self.read_rows(self.batch_rows(step))

    def read_rows(self, ids) -> np.ndarray:
        """Returns the rows (n, width) with the store rows `ids` (n,), as `batch_rows` gives them,
        in any order.
        """
        return self.sites.read_rows(ids)

    def dataset(self, start_step: int = 0, rows=slice(None)) -> grain.IterDataset:
        """Returns the batches from `start_step` to the last as a grain dataset.

        Only chunks with the rows that are asked for are read. The state of its iterator is the
        step.

        Args:
          start_step: the first step.
          rows: the slice of the batch, or a list of slices, that this process needs. An element has
            these rows alone.
        """
        return _BatchDataset(self, start_step, rows)

    def batches(self, start_step: int = 0, rows=slice(None), prefetch: int = 2):
        """Returns an iterator over `dataset(start_step, rows)` with `prefetch` batches ready in
        advance.
        """
        dataset = self.dataset(start_step, rows)
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch)
            if prefetch
            else dataset
        )

    @property
    def fingerprint(self) -> str:
        """A hash of the store's rows, which is the same wherever the store is."""
        return self.store.fingerprint

    def check_step(self, step: int) -> None:
        """Raises UserError if the store is damaged where it holds the rows of a step.

        It reads their chunks and compares them with their checksums. Whoever finds that a step gave
        NaN calls it, before anything else is blamed.
        """
        self.store.check_chunks(np.unique(self.batch_rows(step) // self.store.meta.chunk_rows))

    def _usable_mask(self, chunks: np.ndarray) -> np.ndarray:
        """Returns which rows (len(chunks), chunk_rows) of some chunks are used."""
        mask = self.store.read_excluded(chunks) & self._excluding == 0
        counts = self.store.usable_rows[chunks, self._usable_column]
        if wrong := np.flatnonzero(mask.sum(axis=1) != counts).tolist():
            raise UserError(
                f"{self.store.path}/excluded and {self.store.path}/usable_rows disagree about "
                f"chunk {chunks[wrong[0]]}: the store is damaged; make it again"
            )
        return mask


class _BatchDataset(grain.IterDataset):
    def __init__(self, stream: Stream, start_step: int, rows):
        super().__init__()
        if not 0 <= start_step <= stream.num_steps:
            raise UserError(f"step {start_step} is beyond the stream's {stream.num_steps} steps")
        self._stream = stream
        self._start_step = start_step
        slices = [rows] if isinstance(rows, slice) else rows
        places = np.arange(stream.batch_size)
        self._columns = np.concatenate([places[s] for s in slices])

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self._stream, self._start_step, self._columns)


class _BatchIterator(grain.DatasetIterator):
    """Gathers batches from one window while the next one is read."""

    def __init__(self, stream: Stream, step: int, columns: np.ndarray):
        super().__init__()
        self._stream = stream
        self._step = step
        self._windows = _WindowReader(stream, columns)

    def __next__(self) -> np.ndarray:
        if self._step >= self._stream.num_steps:
            raise StopIteration
        batch = self._windows.batch(self._step)
        self._step += 1
        return batch

    def get_state(self) -> dict:
        return {"step": self._step}

    def set_state(self, state: dict) -> None:
        self._step = int(state["step"])


class _WindowReader:
    """Holds two windows: one to gather from, and the next one, which a thread reads meanwhile."""

    def __init__(self, stream: Stream, columns: np.ndarray):
        self._stream = stream
        self._columns = columns
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "sae-jax-window")
        self._buffers = [None, None]
        self._current = None  # (window, first step in it, buffer, places (steps, columns))
        self._next = None  # (window, Future of what _load returns)

    def batch(self, step: int) -> np.ndarray:
        """Returns the rows (len(columns), width) of a step."""
        window, offset = self._stream.order.locate(step)
        if self._current is None or self._current[0] != window or offset < self._current[1]:
            self._move_to(window, offset, step)
        _, first, buffer, places = self._current
        # Gathered as integers: NumPy's take has no fast path for bfloat16. "clip" spares a copy
        # that "raise" makes; every place is valid by construction.
        bits = buffer.view(f"uint{8 * buffer.itemsize}")
        return np.take(bits, places[offset - first], axis=0, mode="clip").view(buffer.dtype)

    def _move_to(self, window: int, offset: int, step: int) -> None:
        """Makes `window` current, from its step `offset` on, and starts reading the next one."""
        ahead, self._next = self._next, None
        loaded = ahead[1].result() if ahead else None
        if ahead is None or ahead[0] != window or offset:
            loaded = self._load(window, offset)
        self._current = (window, *loaded)
        stream = self._stream
        following = step - offset + stream.order.steps(window)
        if following < stream.num_steps:
            self._next = (window + 1, self._thread.submit(self._load, window + 1, 0))

    def _load(self, window: int, first: int):
        """Returns (first, buffer (rows, width), places (steps - first, columns) of the rows in
        it).
        """
        stream, store = self._stream, self._stream.store
        rows = stream.order.rows(window, self._columns)[first:]
        chunk = rows // store.meta.chunk_rows
        needed = np.zeros(store.meta.num_chunks, bool)
        needed[chunk] = True
        chunks = np.flatnonzero(needed)
        buffer = self._buffer(len(chunks))
        stream.sites.read_chunks(chunks, buffer)
        moved = (np.cumsum(needed) - 1 - np.arange(len(needed))) * store.meta.chunk_rows
        return first, buffer.reshape(-1, stream.width), rows + moved[chunk]

    def _buffer(self, chunks: int) -> np.ndarray:
        """Returns the buffer that is not in use, (chunks, chunk_rows, width), grown where it is too
        small.

        Memory that was touched before is filled several times faster than new pages.
        """
        free, in_use = self._buffers
        if free is None or len(free) < chunks:
            stream = self._stream
            shape = (chunks, stream.store.meta.chunk_rows, stream.width)
            free = np.empty(shape, stream.sites.dtype)
        self._buffers = [in_use, free]
        return free[:chunks]


def _check_numbers(batch_size, virtual_shards, window_rows, epochs, seed, holdout_fraction):
    """Raises UserError for numbers that a stream cannot have."""
    for name, value in [
        ("batch_size", batch_size),
        ("virtual_shards", virtual_shards),
        ("window_rows", window_rows),
        ("epochs", epochs),
    ]:
        if value < 1:
            raise UserError(f"data.{name} is {value}; it must be at least 1")
    if seed < 0:
        raise UserError(f"data.seed is {seed}; it must not be negative")
    if not 0 <= holdout_fraction < 1:
        raise UserError(f"data.holdout_fraction is {holdout_fraction}; it must be in [0, 1)")
    if batch_size % virtual_shards:
        below = batch_size // virtual_shards * virtual_shards
        smaller = f"{below} or " if below else ""
        raise UserError(
            f"data.batch_size is {batch_size}, which data.virtual_shards={virtual_shards} does not "
            f"divide; use {smaller}{below + virtual_shards}"
        )
