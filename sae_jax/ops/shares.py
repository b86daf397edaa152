"""Packs a shard's slots of a code into about as many as the shard's share of the code.

Every shard of the dictionary has k slots a token, but of a token's k latents only k / shards are
the shard's own on average. They are in its first slots. A row of w_dec for each of the k slots
would cost every shard as much as a device that has the whole dictionary.

So a shard takes k / shards slots of each token. What a token has beyond these goes to spare rows of
slots, which are bounded over the whole batch, because few tokens need many. A code that does not
fit, which is rare, is taken as a whole.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sae_jax.ops.sharding import CODE, in_any_run, per_shard, psum, shard_count

_ROW_MULTIPLE = 16  # spare rows are a multiple of it, so that they can be taken in blocks


class Code(NamedTuple):
    """The latents that were picked for each token, in slots (B, shards * k).

    Attributes:
      values: the picked values, float32.
      indices: the picked latents, int32, counted within the slot's shard.
      counts: how many slots of a token and shard, from its first, may have another value than 0,
        (B, shards) int32. None stands for all k.
    """

    values: jax.Array
    indices: jax.Array
    counts: jax.Array | None = None


class Part(NamedTuple):
    """Some of a shard's slots, in rows that are each of one token.

    Attributes:
      values: the slots' values (rows, c).
      indices: their latents (rows, c).
      tokens: the token (rows,) of each row, ascending. None stands for every token in turn.
      columns: which of the token's k slots these are, (rows, c), or k for none. None stands for the
        first c.
    """

    values: jax.Array
    indices: jax.Array
    tokens: jax.Array | None = None
    columns: jax.Array | None = None

    def of_tokens(self, vectors_Bxd: jax.Array) -> jax.Array:
        """Returns the vector (rows, d) of each row's token."""
        return vectors_Bxd if self.tokens is None else vectors_Bxd[self.tokens]

    def sum_by_token(self, rows_Rxd: jax.Array, tokens: int) -> jax.Array:
        """Returns for each token the sum (tokens, d) of its rows."""
        if self.tokens is None:
            return rows_Rxd
        total = jnp.zeros((tokens, rows_Rxd.shape[1]), rows_Rxd.dtype)
        return total.at[self.tokens].add(
            rows_Rxd, indices_are_sorted=True, mode="promise_in_bounds"
        )

    def set_slots(self, slots_Bxk: jax.Array, values: jax.Array) -> jax.Array:
        """Returns `slots` (B, k) with the values (rows, c) of this part's slots in their places."""
        if values.shape == slots_Bxk.shape and self.tokens is None:
            return values
        if self.tokens is None:
            return slots_Bxk.at[:, : values.shape[1]].set(values)
        return slots_Bxk.at[self.tokens[:, None], self.columns].set(values, mode="drop")


def used_slots(kept_Bxk: jax.Array) -> jax.Array | None:
    """Returns a shard's column (B, 1) of `Code.counts`.

    Where packing would save too little it is None.

    Args:
      kept_Bxk: which of the shard's slots are in the code.
    """
    k = kept_Bxk.shape[1]
    first, spare = _widths(k)
    # A spare row costs its slots, and about as much again as one and a half.
    if 4 * first + 3 * (spare + 1.5) > 3 * k:
        return None
    return jnp.max(jnp.where(kept_Bxk, jnp.arange(1, k + 1), 0), axis=1, keepdims=True)


def fits(code: Code) -> jax.Array | None:
    """Whether the code fits into its shares on every shard, for `in_parts`.

    It is a scalar, the same on all devices and for all runs of a pack. It is None for a code
    without counts.
    """
    if code.counts is None:
        return None
    k = code.values.shape[1] // code.counts.shape[1]

    def overflows(counts):
        rows = _spare_rows(counts[:, 0], k).sum()
        here = (rows > _most_spare_rows(len(counts))).astype(jnp.int32)
        return psum(psum(here, "data"), "model")

    return ~in_any_run(per_shard(overflows, (CODE,), P())(code.counts) > 0)


def in_parts(code: Code, fits: jax.Array | None, compute: Callable):
    """Returns `compute(parts)` of a list of Part that together hold a shard's slots.

    `compute` is to depend on the parts by sums over slots alone. It must not communicate.

    Args:
      code: the shard's own code, (B, k).
      fits: what the function `fits` returns of the whole code.
      compute: the function. It is traced for a packed code and for a whole one.
    """

    def whole():
        return compute([Part(code.values, code.indices)])

    return whole() if fits is None else jax.lax.cond(fits, lambda: compute(pack(code)), whole)


def pack(code: Code) -> list[Part]:
    """Returns the first slots of every token, and the spare rows."""
    B, k = code.values.shape
    first, spare = _widths(k)
    counts = code.counts[:, 0]
    needed, most = _spare_rows(counts, k), _most_spare_rows(B)
    tokens = jnp.repeat(jnp.arange(B, dtype=jnp.int32), needed, total_repeat_length=most)
    # The rows of a token follow each other. Those after the last row in use are the last token's.
    within = jnp.arange(most) - (jnp.cumsum(needed) - needed)[tokens]
    columns = first + within[:, None] * spare + jnp.arange(spare)
    used = columns < counts[tokens, None]
    places = tokens[:, None], jnp.minimum(columns, k - 1)
    rows = Part(
        values=jnp.where(used, code.values[places], 0.0),
        indices=code.indices[places],
        tokens=tokens,
        columns=jnp.where(used, columns, k),
    )
    return [Part(code.values[:, :first], code.indices[:, :first]), rows]


def _widths(k: int) -> tuple[int, int]:
    """Returns how many slots every token has, and how many a spare row has."""
    first = -(-k // shard_count("model"))
    return first, -(-first // 2)


def _spare_rows(counts_B, k: int):
    """Returns how many spare rows each token needs, (B,)."""
    first, spare = _widths(k)
    return -(-jnp.maximum(counts_B - first, 0) // spare)


def _most_spare_rows(tokens: int) -> int:
    """Returns how many spare rows there are.

    Tokens whose latents fall on shards by chance need half as many as there are tokens.
    """
    return -(-3 * tokens // 4 // _ROW_MULTIPLE) * _ROW_MULTIPLE
