"""The K largest entries of a whole (tokens x latents) array, wherever its shards lie."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sae_jax.ops.sharding import branch, per_shard, psum, shard_count, shard_index

_LATENTS = P("data", "model")  # (B, d_sae)


def batch_top_k(values_BxN: jax.Array, count) -> tuple[jax.Array, jax.Array]:
    """Which entries are the `count` largest above 0 of the whole array: (B, N) bool, and the
    smallest of them (a scalar; infinity where there is none).

    Exact and the same on every mesh: exactly `count` are picked, or all that are above 0 if
    there are fewer, and ties go to the lower token, then the lower latent. `count` may be traced.

    Nothing is gathered: the bits of a non-negative float32 order it, so the count-th largest is
    found bit by bit, 31 counts of entries each with an all-reduce of one number.
    """

    def local(values, count):
        bits = jax.lax.bitcast_convert_type(jnp.maximum(values, 0.0), jnp.int32)

        def refine(i, floor):
            raised = floor | (1 << (30 - i))
            enough = _total(bits >= raised) >= count
            return jnp.where(enough, raised, floor)

        # The largest number that `count` entries reach; 0 if fewer are above 0.
        threshold = jax.lax.fori_loop(0, 31, refine, jnp.int32(0))
        threshold = jnp.maximum(threshold, 1)
        above, level = bits > threshold, bits == threshold
        wanted = count - _total(above)
        picked = branch(
            _total(level) > wanted,
            lambda: above | _first(level, wanted),
            lambda: above | level,
        )
        smallest = jnp.min(jnp.where(picked, values, jnp.inf), initial=jnp.inf)
        return picked, _pmin(smallest)

    values = jax.lax.stop_gradient(values_BxN)
    return per_shard(local, (_LATENTS, P()), (_LATENTS, P()))(values, jnp.int32(count))


def _total(mask):
    return _over_mesh(jax.lax.psum, jnp.sum(mask, dtype=jnp.int32))


def _pmin(x):
    return _over_mesh(jax.lax.pmin, x)


def _over_mesh(collective, x):
    axes = tuple(axis for axis in ("data", "model") if shard_count(axis) > 1)
    return collective(x, axes) if axes else x


def _first(mask_BxN, wanted):
    """The first `wanted` true entries, in order of tokens, then latents over all shards."""
    per_token = jnp.sum(mask_BxN, axis=1, dtype=jnp.int32)
    whole = psum(per_token, "model")
    before_token = jnp.cumsum(whole) - whole + _before(jnp.sum(whole), "data")
    before = before_token + _before(per_token, "model")
    return mask_BxN & (before[:, None] + jnp.cumsum(mask_BxN, axis=1) <= wanted)


def _before(x, axis: str):
    """The sum of x over the shards before this one along `axis`."""
    if shard_count(axis) == 1:
        return jnp.zeros_like(x)
    everyone = jax.lax.all_gather(x, axis)
    earlier = jnp.arange(shard_count(axis)) < shard_index(axis)
    return jnp.tensordot(earlier.astype(x.dtype), everyone, axes=1)
