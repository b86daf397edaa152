"""A stream over arrays that come one after another, such as a generator that runs a model.

Two windows of rows are in memory. The statistics and the held-out rows are taken from the first
one. Batches are drawn from the other, which moves on.
"""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from sae_jax.activations import statistics
from sae_jax.activations.arrays import ArrayStore, as_rows
from sae_jax.activations.order import permutation
from sae_jax.activations.stream import Stream
from sae_jax.config import DataConfig
from sae_jax.errors import UserError

_MIN_WINDOW_ROWS = 65_536  # enough for the statistics and the geometric median
_MOST_HELD_OUT = 65_536
_WINDOW = 3  # tells these permutations from those of `order`, which uses 0 to 2


class IterableData:
    """Rows of an iterable of arrays (rows, width), each of any number of rows.

    The first `data.window_rows` rows (at least 65,536) are read at once. If the iterable ends
    within them, its rows are an array, which is shuffled, held out and read again as one. A longer
    iterable is read once, in windows whose rows are shuffled. `data.holdout_fraction` of the first
    window's rows are held out.

    A run that is resumed reads the iterable from its beginning again and drops what was done: the
    same rows in the same order give the same run.

    Attributes:
      array: all rows as an `ArrayStore` if the iterable ended within the first window, else None.
        Only if it is None there are the other attributes.
      first_window: the shuffled rows of the first window that are not held out.
      statistics: an `ArrayStore` of these, whose statistics stand for all rows.
      path: a name that tells these rows from others.
    """

    def __init__(self, batches: Iterable, data: DataConfig, tokens: int | None):
        """Reads the first window. `tokens` is how many rows the run will train on.

        Raises UserError if the arrays do not fit together, if rows are not finite and
        `data.drop_nonfinite` is false, or if `tokens` is needed and missing.
        """
        self._rows = _Rows(batches)
        self._window_rows = max(data.window_rows, _MIN_WINDOW_ROWS)
        first = self._rows.take(self._window_rows)
        self.array = ArrayStore(first) if self._rows.ended else None
        if self.array is not None:
            return
        if tokens is None:
            raise UserError(
                f"the activations go on after {len(first):,} rows; say with tokens= on how many of "
                "them to train"
            )
        finite = statistics.finite_rows(first)
        if not finite.all() and not data.drop_nonfinite:
            raise UserError(
                f"{np.sum(~finite)} of the first {len(first):,} rows hold NaN or infinity; set "
                "data.drop_nonfinite=true to leave them out"
            )
        first = first[finite]
        held = min(round(data.holdout_fraction * len(first)), _MOST_HELD_OUT)
        order = permutation(len(first), _WINDOW, data.seed, 0)
        self._held = ArrayStore(first[np.sort(order[:held])]) if held else None
        self.first_window = first[order[held:]]
        self.statistics = ArrayStore(self.first_window)
        self._drop_nonfinite = data.drop_nonfinite
        self._seed = data.seed
        self._tokens = tokens
        self.path = self.statistics.path.replace("array:", "iterable:")

    def open_stream(self, data: DataConfig, split: str = "train", batch_size: int | None = None):
        """Returns the stream of a split, as `activations.open_stream` does for a store.

        Raises UserError if no row is held out, or if `data` asks for more than one epoch.
        """
        batch_size = batch_size or data.batch_size
        if split == "heldout":
            if self._held is None:
                raise UserError("no row of the first window is held out")
            return Stream(self._held, batch_size=batch_size, holdout_fraction=0, virtual_shards=1)
        if data.epochs != 1:
            raise UserError(
                "activations that are not kept cannot be read again: leave epochs at 1, or write "
                "them to a store first (sae_jax.write_store)"
            )
        return IterableStream(self, batch_size, self._tokens // batch_size)

    def windows(self) -> Iterator[np.ndarray]:
        """Yields shuffled windows (rows, width), from the first one on. They can be read once.

        Raises UserError if rows are not finite and `data.drop_nonfinite` was false.
        """
        yield self.first_window
        for window in itertools.count(1):
            rows = self._rows.take(self._window_rows)
            if not len(rows):
                return
            finite = statistics.finite_rows(rows)
            if not finite.all() and not self._drop_nonfinite:
                raise UserError(
                    f"window {window} of the activations holds NaN or infinity in "
                    f"{np.sum(~finite)} rows; set data.drop_nonfinite=true to leave them out"
                )
            rows = rows[finite]
            yield rows[permutation(len(rows), _WINDOW, self._seed, window)]


class IterableStream:
    """Batches (batch_size, width) of `IterableData`.

    It has the attributes of a `Stream` that training needs. The rows cannot be read again, so
    `batches` can be called once.
    """

    def __init__(self, source: IterableData, batch_size: int, num_steps: int):
        """Opens the stream of `num_steps` batches."""
        self._source, self.batch_size = source, batch_size
        self.num_steps = self.steps_per_epoch = num_steps
        self.rows_per_epoch = num_steps * batch_size
        site = source.statistics.meta.sites["activations"]
        self.site_names, self.site_widths = ("activations",), (site.width,)
        self.site_mean_squared_norms = (site.mean_squared_norm,)
        self.width, self.mean = site.width, np.asarray(site.mean)

    @property
    def fingerprint(self) -> str:
        """A hash of the rows of the first window."""
        return self._source.path

    def check_step(self, step: int) -> None:
        """Does nothing, because rows that are not finite were refused when they came."""

    def batches(self, start_step: int = 0, rows=slice(None), prefetch: int = 0):
        """Yields the batches from `start_step` on.

        Of each batch it yields the rows that this process needs: a slice of them, or several slices
        one after another. Nothing is read ahead, because the iterable may be running a model.
        """
        del prefetch
        slices = [rows] if isinstance(rows, slice) else rows
        own_rows = np.concatenate([np.arange(self.batch_size)[part] for part in slices])
        left = np.empty((0, self.width), self._source.first_window.dtype)
        step = 0
        for window in self._source.windows():
            left = np.concatenate([left, window])
            whole = len(left) // self.batch_size
            for batch in left[: whole * self.batch_size].reshape(whole, self.batch_size, -1):
                if step == self.num_steps:
                    return
                if step >= start_step:
                    yield batch[own_rows]
                step += 1
            left = left[whole * self.batch_size :]


class _Rows:
    """The rows of an iterable of arrays, to be taken one window after another."""

    def __init__(self, batches: Iterable):
        self._batches = iter(batches)
        self._left: list[np.ndarray] = []
        self._width: int | None = None
        self.ended = False

    def take(self, count: int) -> np.ndarray:
        """Returns the next `count` rows, or as many as are left.

        Raises UserError for what is not an array (rows, width), or of another width than before.
        """
        available = sum(map(len, self._left))
        while available < count and not self.ended:
            available += self._read_batch()
        if self._width is None:
            raise UserError("the iterable gave no activations")
        rows = np.concatenate(self._left) if self._left else np.empty((0, self._width))
        self._left = [rows[count:]] if available > count else []
        if not self._left and not self.ended:
            self._read_batch()  # it may end right here
        return rows[:count]

    def _read_batch(self) -> int:
        """Reads one more array, or notes the end. Returns how many rows came."""
        batch = next(self._batches, None)
        if batch is None:
            self.ended = True
            return 0
        batch = as_rows("a batch", batch)
        if self._width not in (None, batch.shape[1]):
            raise UserError(
                f"a batch of activations is {batch.shape[1]} wide, those before {self._width}"
            )
        self._width = batch.shape[1]
        self._left.append(batch)
        return len(batch)
