"""The order of rows: which rows of a store make step s. Pure arithmetic on (counts, seed, step).

Training and held-out rows are whole chunks, hence whole sequences. Which chunks are held out
depends on their number only, so that every seed, run and machine agrees.

Epoch e permutes the split's chunks with (seed, e). The usable rows of the chunks in that order are
the epoch's row sequence. A window is a run of whole batches of it, about `window_rows` rows. The
window is cut into G equal contiguous parts, the virtual shards, and each part is permuted with
(seed, e, window, g). Step s of the window takes the next B/G rows of every part, and its batch is
their concatenation over g. An epoch so leaves out fewer than B rows, and the only state is the
step.

Nothing here knows of processes or devices: whoever asks for some of a batch's rows gets these.
"""

import functools

import numpy as np

ORDER_VERSION = 1  # raise it when the same seed would give another order
_HOLDOUT, _CHUNKS, _ROWS = range(3)  # purposes of permutations


def permutation(length: int, purpose: int, *key: int) -> np.ndarray:
    """Returns a permutation (length,) that depends on its arguments only, on every version of
    NumPy.

    NumPy's policy fixes the words of Philox for ever, but not what `Generator.permutation` makes of
    them.
    """
    words = np.random.Philox(np.random.SeedSequence([ORDER_VERSION, purpose, *key]))
    return np.argsort(words.random_raw(length), kind="stable")


def split_chunks(num_chunks: int, holdout_fraction: float, split: str) -> np.ndarray:
    """Returns the numbers of the chunks of a split.

    At least one chunk is held out where the fraction is above 0 and there are two. A larger
    fraction holds out the same chunks and more.

    Args:
      num_chunks: the chunks of the store.
      holdout_fraction: the fraction of them that is held out.
      split: "train" or "heldout".
    """
    held_out = 0
    if holdout_fraction > 0:
        held_out = min(max(1, round(holdout_fraction * num_chunks)), num_chunks - 1)
    order = permutation(num_chunks, _HOLDOUT, num_chunks)
    return np.sort(order[:held_out] if split == "heldout" else order[held_out:])


class Order:
    """The order of the rows of one split.

    Attributes:
      batch_size: rows of a batch.
      shard_batch: rows of a batch that each virtual shard gives.
      steps_per_epoch: steps of an epoch.
      windows_per_epoch: windows of an epoch.
    """

    def __init__(
        self, chunks, usable, usable_mask, *, batch_size, virtual_shards, window_rows, seed
    ):
        """Makes the order of a split.

        Args:
          chunks: the numbers (n,) of its chunks.
          usable: how many rows (n,) of each chunk are used.
          usable_mask: a function of numbers of chunks that says which of their rows are used,
            (len(chunks), chunk_rows) bool.
          batch_size: rows of a batch.
          virtual_shards: the number of parts that a batch takes rows from.
          window_rows: about how many rows a window has.
          seed: chooses the order.
        """
        self._chunks = chunks
        self._usable = usable.astype(np.int64)
        self._usable_mask = usable_mask
        self._seed = seed
        self.batch_size = batch_size
        self.shard_batch = batch_size // virtual_shards
        self.steps_per_epoch = int(self._usable.sum()) // batch_size
        windows = min(-(-self.steps_per_epoch * batch_size // window_rows), self.steps_per_epoch)
        self.windows_per_epoch = windows
        self._epoch = functools.lru_cache(maxsize=2)(self._order_of_epoch)
        self._first_step = np.arange(windows + 1) * self.steps_per_epoch // windows

    def locate(self, step: int) -> tuple[int, int]:
        """Returns the window that a step is in, counted over all epochs, and the step within it."""
        epoch, step = divmod(step, self.steps_per_epoch)
        window = int(np.searchsorted(self._first_step, step, side="right")) - 1
        return epoch * self.windows_per_epoch + window, step - int(self._first_step[window])

    def steps(self, window: int) -> int:
        """Returns the number of steps in a window."""
        window %= self.windows_per_epoch
        return int(self._first_step[window + 1] - self._first_step[window])

    def rows(self, window: int, columns: np.ndarray) -> np.ndarray:
        """Returns the store rows (steps, len(columns)) that a window's steps have at `columns`.

        It reads the masks of the chunks that hold them, and nothing else.

        Args:
          window: the window, counted over all epochs.
          columns: places in the batch.
        """
        epoch, window = divmod(window, self.windows_per_epoch)
        chunks, starts = self._epoch(epoch)
        steps = self.steps(window)
        part_rows = steps * self.shard_batch
        parts, part_of_column = np.unique(columns // self.shard_batch, return_inverse=True)
        begin = self._first_step[window] * self.batch_size + parts * part_rows
        first = np.searchsorted(starts, begin, side="right") - 1  # chunk with the part's first row
        stop = np.searchsorted(starts, begin + part_rows, side="left")
        needed = np.unique(
            np.concatenate([np.arange(*ends) for ends in zip(first, stop, strict=True)])
        )
        mask = self._usable_mask(chunks[needed])
        out = np.empty((steps, len(parts), self.shard_batch), np.int64)
        for i, part in enumerate(parts):
            low, high = np.searchsorted(needed, [first[i], stop[i]])
            usable = np.flatnonzero(mask[low:high])[begin[i] - starts[first[i]] :][:part_rows]
            usable = usable[permutation(part_rows, _ROWS, epoch, window, int(part), self._seed)]
            slot = usable // mask.shape[1]
            moved = (chunks[needed[low:high]] - np.arange(high - low)) * mask.shape[1]
            out[:, i] = (usable + moved[slot]).reshape(steps, -1)
        return out[:, part_of_column, columns % self.shard_batch]

    def _order_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the chunks (n,) in the epoch's order, and the usable rows before each and in all,
        (n + 1,).
        """
        order = permutation(len(self._chunks), _CHUNKS, epoch, self._seed)
        return self._chunks[order], np.concatenate([[0], np.cumsum(self._usable[order])])
