"""Picks the K largest entries of a whole (tokens x latents) array, wherever its shards lie."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sae_jax.ops.sharding import (
    branch,
    in_any_run,
    per_shard,
    psum,
    shard_count,
    shard_index,
)

_LATENTS = P("data", "model")  # (B, d_sae)
_MOST = 2**31 - 1  # the largest int32; counts that may be above are kept at it
_PLAINLY_COUNTED = _MOST  # entries of an array whose counts cannot be above


def batch_top_k(values_BxN: jax.Array, count) -> tuple[jax.Array, jax.Array]:
    """Picks the `count` largest entries above 0 of a whole array.

    The result is exact and the same on every mesh. Exactly `count` entries are picked, or all that
    are above 0 if there are fewer. Ties go to the lower token, then to the lower latent.

    Nothing is gathered. The bits of a non-negative float32 order it, so the count-th largest is
    found bit by bit: 31 counts of entries, each with an all-reduce of one number.

    Args:
      values_BxN: the array (B, d_sae), sharded over `data` and `model`. It may have more than 2^31
        entries.
      count: how many to pick, below 2^31; it may be traced.

    Returns:
      Which entries are picked, (B, N) bool, and the smallest of them, a scalar. It is infinity
      where there is none.
    """

    def local(values, count):
        bits = jax.lax.bitcast_convert_type(jnp.maximum(values, 0.0), jnp.int32)

        def refine(i, floor):
            raised = floor | (1 << (30 - i))
            enough = _count(bits >= raised) >= count
            return jnp.where(enough, raised, floor)

        # The largest number that `count` entries reach; 0 if fewer are above 0.
        threshold = jax.lax.fori_loop(0, 31, refine, jnp.int32(0))
        threshold = jnp.maximum(threshold, 1)
        above, level = bits > threshold, bits == threshold
        wanted = count - _count(above)
        picked = branch(
            in_any_run(_count(level) > wanted),
            lambda: above | _first_true(level, wanted),
            lambda: above | level,
        )
        smallest = jnp.min(jnp.where(picked, values, jnp.inf), initial=jnp.inf)
        return picked, _min_over_mesh(smallest)

    values = jax.lax.stop_gradient(values_BxN)
    return per_shard(local, (_LATENTS, P()), (_LATENTS, P()))(values, jnp.int32(count))


def _count(mask_BxN):
    """Counts the true entries of a mask over the whole mesh, up to `_MOST`."""
    entries = mask_BxN.size * shard_count("data") * shard_count("model")
    if entries <= _PLAINLY_COUNTED:
        return _over_mesh(jax.lax.psum, jnp.sum(mask_BxN, dtype=jnp.int32))
    return capped_total(jnp.sum(mask_BxN, axis=1, dtype=jnp.int32))


def capped_total(counts_B: jax.Array) -> jax.Array:
    """Returns the sum over the whole mesh of int32 counts from 0 on, or `_MOST` if it is above.

    It is exact, and still one all-reduce: of the two halves of each shard's sum, whose own sums are
    exact on up to 32,768 devices.
    """
    here = jax.lax.reduce(counts_B, jnp.int32(0), _capped_sum, (0,))
    high, low = _over_mesh(jax.lax.psum, jnp.stack([here >> 16, here & 0xFFFF]))
    high += low >> 16
    return jnp.where(high >= 1 << 15, _MOST, high << 16 | low & 0xFFFF)


def _capped_sum(a, b):
    """Returns a + b of int32 numbers from 0 on, or `_MOST` if it is above."""
    return a + jnp.minimum(b, _MOST - a)


def _min_over_mesh(x):
    """Returns the least of a number over the whole mesh."""
    return _over_mesh(jax.lax.pmin, x)


def _over_mesh(collective, x):
    """Applies a collective over those of the mesh's axes that have several shards."""
    axes = tuple(axis for axis in ("data", "model") if shard_count(axis) > 1)
    return collective(x, axes) if axes else x


def _first_true(mask_BxN, wanted):
    """Keeps the first `wanted` true entries, in order of tokens, then of latents over all
    shards.
    """
    before = ties_before(jnp.sum(mask_BxN, axis=1, dtype=jnp.int32))
    return mask_BxN & (jnp.cumsum(mask_BxN, axis=1, dtype=jnp.int32) <= (wanted - before)[:, None])


def ties_before(counts_B: jax.Array) -> jax.Array:
    """Returns how many ties precede those that this shard has of each token, (B,), up to `_MOST`.

    `counts_B` are this shard's own. The order is that of tokens, then of latents over all shards.
    """
    until = jax.lax.associative_scan(_capped_sum, psum(counts_B, "model"))
    of_earlier_tokens = jnp.concatenate([jnp.zeros_like(until[:1]), until[:-1]])
    before = _capped_sum(of_earlier_tokens, _sum_of_earlier_shards(until[-1:], "data"))
    return _capped_sum(before, _sum_of_earlier_shards(counts_B, "model"))


def _sum_of_earlier_shards(counts_C, axis: str):
    """Returns the sums (C,), up to `_MOST`, of counts over the shards before this one."""
    if shard_count(axis) == 1:
        return jnp.zeros_like(counts_C)
    everyone = jax.lax.all_gather(counts_C, axis)
    earlier = jnp.arange(shard_count(axis)) < shard_index(axis)
    return jax.lax.reduce(jnp.where(earlier[:, None], everyone, 0), jnp.int32(0), _capped_sum, (0,))
