"""Writes a store from activations that someone already has, as numpy arrays."""

import numpy as np

from sae_jax.activations.files import Folder
from sae_jax.activations.meta import read_meta
from sae_jax.activations.store import Store
from sae_jax.activations.writer import SHARD_BYTES, StoreWriter
from sae_jax.errors import UserError

_UNKNOWN_LENGTH = 1 << 40  # sequences; the store is shortened when the batches end


def write_store(
    path,
    batches,
    site: str = "activations",
    dtype: str = "float32",
    context_length: int = 1,
    tokens: np.ndarray | None = None,
    special_tokens=(),
    provenance: dict | None = None,
) -> Store:
    """Writes a new store from arrays of activations.

        store = write_store("my_store", [activations])

    One shard, about 256 MiB a site, is in memory at a time.

    Args:
      path: the store's directory.
      batches: an iterable of arrays (n, width), n of any size, or of dicts {site: array (n,
        width)}. A single array or dict will do too.
      site: the name of the site, where batches are arrays.
      dtype: how activations are stored: "float32", "bfloat16" or "float16".
      context_length: how many rows make one text, where rows are tokens of texts. Each text must be
        whole.
      tokens: the ids (num_sequences, context_length) of the tokens, which are stored too.
      special_tokens: ids whose rows are stored but never trained on.
      provenance: JSON values that say where the activations come from.

    Returns:
      The store.

    Raises UserError if the directory already holds a store, or on batches of different widths.
    """
    if read_meta(Folder(path)) is not None:
        raise UserError(f"{path} already holds a store; choose another directory or remove it")
    if isinstance(batches, dict) or getattr(batches, "ndim", None) == 2:
        batches = [batches]
    rows = _RowQueue(batches, site)
    rows.fill(until_bytes=SHARD_BYTES)
    if not rows.count:
        raise UserError("write_store got no rows")
    if tokens is not None:
        num_sequences = len(tokens)
    elif rows.ended:
        num_sequences = _count_sequences(rows.count, context_length)
    else:
        num_sequences = _UNKNOWN_LENGTH
    writer = StoreWriter.create_or_resume(
        path,
        sites=rows.widths,
        num_sequences=num_sequences,
        context_length=context_length,
        dtype=dtype,
        tokens=tokens,
        special_tokens=special_tokens,
        provenance=provenance,
    )
    shard_rows, shard = writer.meta.shard_sequences * context_length, 0
    while rows.fill(until_rows=shard_rows):
        writer.write_shard(shard, rows.take(shard_rows))
        shard += 1
    total = shard * shard_rows + rows.count
    if num_sequences == _UNKNOWN_LENGTH:
        writer.set_num_sequences(_count_sequences(total, context_length))
    elif total != num_sequences * context_length:
        raise UserError(
            f"the batches hold {total} rows, but {num_sequences} sequences of {context_length} "
            f"tokens were given; {path} stays incomplete, remove it"
        )
    if rows.count:
        writer.write_shard(shard, rows.take(rows.count))
    writer.finish()
    return Store.open(path)


class _RowQueue:
    """Queues the rows of batches, site by site."""

    def __init__(self, batches, site: str):
        self._batches = iter(batches)
        self._site = site
        self._parts = []  # dicts {site: (n, width)}
        self.widths = {}
        self.count = self.bytes = 0
        self.ended = False

    def fill(self, until_rows: int | None = None, until_bytes: int | None = None) -> bool:
        """Takes batches until so many rows or bytes are queued.

        Returns False if the batches ended before there were so many rows.
        """
        while not self.ended and (
            self.count < until_rows if until_rows is not None else self.bytes < until_bytes
        ):
            batch = next(self._batches, None)
            if batch is None:
                self.ended = True
            else:
                self._add(batch if isinstance(batch, dict) else {self._site: batch})
        return until_rows is None or self.count >= until_rows

    def take(self, rows: int) -> dict[str, np.ndarray]:
        """Removes and returns the first rows, by site."""
        joined = {name: np.concatenate([p[name] for p in self._parts]) for name in self.widths}
        self._parts = [{name: x[rows:] for name, x in joined.items()}]
        self.count -= rows
        return {name: x[:rows] for name, x in joined.items()}

    def _add(self, batch: dict) -> None:
        """Queues one batch."""
        batch = {name: np.asarray(x) for name, x in batch.items()}
        shapes = {name: x.shape for name, x in batch.items()}
        if any(len(shape) != 2 for shape in shapes.values()):
            raise UserError(f"a batch must be an array (n, width); got {shapes}")
        widths = {name: shape[1] for name, shape in shapes.items()}
        self.widths = self.widths or widths
        if widths != self.widths or len({shape[0] for shape in shapes.values()}) != 1:
            raise UserError(
                f"after {self.count} rows a batch has shapes {shapes}, the first had widths "
                f"{self.widths}; every batch needs the same sites, widths and one number of rows"
            )
        self._parts.append(batch)
        self.count += len(next(iter(batch.values())))
        self.bytes += max(x.nbytes for x in batch.values())


def _count_sequences(rows: int, context_length: int) -> int:
    """Returns the number of sequences that rows make.

    Raises UserError where they are not whole sequences.
    """
    if rows % context_length:
        raise UserError(
            f"{rows} rows are not whole sequences of {context_length} tokens; "
            "leave context_length at 1 where rows are not tokens of texts"
        )
    return rows // context_length
