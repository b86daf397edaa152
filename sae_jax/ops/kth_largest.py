"""Finds the k-th largest of each token's keys by counting them, wherever they lie."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sae_jax.ops.sharding import on_cpu, shard_count


def sort_keys(values: jax.Array) -> jax.Array:
    """Returns uint32 keys below 2^32 - 1, in the order of float32 values. NaN is the largest."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    keys = jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))
    return jnp.where(jnp.isnan(values), jnp.uint32(2**32 - 2), keys)


def kth_largest(count: Callable[[jax.Array], jax.Array], k, tokens: int, bits: int) -> jax.Array:
    """Returns the k-th largest of each token's uint32 keys below 2^bits, (tokens,).

    It is found digit by digit, from the highest. A digit has 4 bits, since each costs a pass over
    the keys and an all-reduce over the shards. On a single CPU it has one, which needs the fewest
    comparisons.

    Args:
      count: a function of numbers (tokens, T). It returns how many keys of each token, over all
        shards, are not below them, (tokens, T).
      k: one number for all tokens, or (tokens,). Where it is 0 the result is above all keys.
      tokens: how many tokens there are.
      bits: the bits of a key.
    """
    size = 1 if on_cpu() and shard_count("model") == 1 else 4
    rounds = -(-bits // size)
    digits = jnp.arange(1, 2**size, dtype=jnp.uint32)

    def refine(i, found):
        shift = (size * (rounds - 1 - i)).astype(jnp.uint32)
        tried = found[:, None] | (digits << shift)
        enough = (count(tried) >= jnp.reshape(k, (-1, 1))).sum(axis=1)
        return found | enough.astype(jnp.uint32) << shift

    return jax.lax.fori_loop(0, rounds, refine, jnp.zeros(tokens, jnp.uint32))
