"""Picks the K largest entries of a whole (tokens x latents) array, wherever its shards lie."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sae_jax.ops.sharding import branch, per_shard, psum, shard_count, shard_index

_LATENTS = P("data", "model")  # (B, d_sae)


def batch_top_k(values_BxN: jax.Array, count) -> tuple[jax.Array, jax.Array]:
    """Picks the `count` largest entries above 0 of a whole array.

    The result is exact and the same on every mesh. Exactly `count` entries are picked, or all that
    are above 0 if there are fewer. Ties go to the lower token, then to the lower latent.

    Nothing is gathered. The bits of a non-negative float32 order it, so the count-th largest is
    found bit by bit: 31 counts of entries, each with an all-reduce of one number.

    Args:
      values_BxN: the array (B, d_sae), sharded over `data` and `model`.
      count: how many to pick; it may be traced.

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
            _count(level) > wanted,
            lambda: above | _first_true(level, wanted),
            lambda: above | level,
        )
        smallest = jnp.min(jnp.where(picked, values, jnp.inf), initial=jnp.inf)
        return picked, _min_over_mesh(smallest)

    values = jax.lax.stop_gradient(values_BxN)
    return per_shard(local, (_LATENTS, P()), (_LATENTS, P()))(values, jnp.int32(count))


def _count(mask):
    """Counts the true entries of a mask over the whole mesh."""
    return _over_mesh(jax.lax.psum, jnp.sum(mask, dtype=jnp.int32))


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
    per_token = jnp.sum(mask_BxN, axis=1, dtype=jnp.int32)
    whole = psum(per_token, "model")
    before_token = jnp.cumsum(whole) - whole + _sum_of_earlier_shards(jnp.sum(whole), "data")
    before = before_token + _sum_of_earlier_shards(per_token, "model")
    return mask_BxN & (before[:, None] + jnp.cumsum(mask_BxN, axis=1) <= wanted)


def _sum_of_earlier_shards(x, axis: str):
    """Returns the sum of x over the shards before this one along `axis`."""
    if shard_count(axis) == 1:
        return jnp.zeros_like(x)
    everyone = jax.lax.all_gather(x, axis)
    earlier = jnp.arange(shard_count(axis)) < shard_index(axis)
    return jnp.tensordot(earlier.astype(x.dtype), everyone, axes=1)
