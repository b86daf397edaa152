"""Decodes every group of a dictionary by itself, at the cost of decoding once."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sae_jax.ops.sharding import DECODER, matmul_f32, per_shard, psum, shard_count, shard_index

_LATENTS = P("data", "model")
_GROUPS = P(None, "data", None)  # (G, B, d_out)
_BLOCK = 2048  # latents


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def decode_groups(latents, w_dec, ends: tuple[int, ...], compute_dtype=jnp.float32):
    """Multiplies the latents of each group of the dictionary with the group's rows of the decoder.

    A group may lie on several shards of the dictionary. Each shard decodes blocks that lie within
    one group, and one all-reduce over `model` adds up. The blocks are as large as the common
    divisor of all ends allows, so ends should be multiples of some hundreds.

    Args:
      latents: (B, d_sae).
      w_dec: the decoder (d_sae, d_out).
      ends: the end of each of the G groups; group g has the latents from ends[g - 1] to ends[g],
        and the last end is d_sae.
      compute_dtype: the dtype of the matmuls' operands. They accumulate in float32.

    Returns:
      An array (G, B, d_out).
    """
    return _forward(latents, w_dec, ends, compute_dtype)[0]


def _forward(latents, w_dec, ends, compute_dtype):
    def local(latents, w_dec):
        size, groups = _blocks(ends, w_dec.shape[0])
        empty = jnp.zeros((len(ends), latents.shape[0], w_dec.shape[1]), jnp.float32)

        def add_block(i, total):
            part = matmul_f32(
                _block(latents, i, size, axis=1).astype(compute_dtype),
                _block(w_dec, i, size).astype(compute_dtype),
            )
            return total.at[groups[i]].add(part)

        return psum(jax.lax.fori_loop(0, len(groups), add_block, empty), "model")

    decoded = per_shard(local, (_LATENTS, DECODER), _GROUPS)(latents, w_dec)
    return decoded, (latents, w_dec)


def _backward(ends, compute_dtype, saved, d_decoded):
    def local(latents, w_dec, d_decoded):
        size, groups = _blocks(ends, w_dec.shape[0])
        d_decoded = d_decoded.astype(compute_dtype)

        def add_block(i, gradients):
            d_latents, d_w_dec = gradients
            d_group = d_decoded[groups[i]]
            d_block = matmul_f32(d_group, _block(w_dec, i, size).astype(compute_dtype).T)
            d_rows = matmul_f32(_block(latents, i, size, axis=1).astype(compute_dtype).T, d_group)
            return (
                jax.lax.dynamic_update_slice_in_dim(d_latents, d_block, i * size, axis=1),
                jax.lax.dynamic_update_slice_in_dim(d_w_dec, d_rows, i * size, axis=0),
            )

        empty = jnp.zeros(latents.shape, jnp.float32), jnp.zeros(w_dec.shape, jnp.float32)
        d_latents, d_w_dec = jax.lax.fori_loop(0, len(groups), add_block, empty)
        return d_latents, psum(d_w_dec, "data")

    return per_shard(local, (_LATENTS, DECODER, _GROUPS), (_LATENTS, DECODER))(*saved, d_decoded)


decode_groups.defvjp(_forward, _backward)


def _blocks(ends: tuple[int, ...], n: int):
    """Returns the size of this shard's blocks, and the group (n / size,) int32 of each."""
    common = math.gcd(n, *ends)
    size = next(s for s in range(min(common, _BLOCK), 0, -1) if common % s == 0)
    starts = np.arange(0, n * shard_count("model"), size)
    groups = jnp.asarray(np.searchsorted(ends, starts, side="right"), jnp.int32)
    return size, jax.lax.dynamic_slice_in_dim(groups, shard_index("model") * (n // size), n // size)


def _block(array, i, size: int, axis: int = 0):
    """Returns block number i along an axis."""
    return jax.lax.dynamic_slice_in_dim(array, i * size, size, axis)
