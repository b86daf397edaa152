"""The dense autoencoder: all latents of every token, in blocks of the dictionary.

The (B, d_sae) latents are by far the largest array of a dense step. A block of them is encoded,
activated, decoded and counted while it is in cache, and used up in one go in the backward pass;
in between it lies in memory once, in the operands' type.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sae_jax.ops.mesh import BATCH, DECODER, ENCODER, PER_LATENT, per_shard, product, psum

_CPU_BLOCK = 2048  # latents; a block of them for 2,048 tokens is 16 MiB
_BLOCK = 16_384  # elsewhere, where the matmuls must be large
_BLOCKS = P(None, "data", "model")  # (blocks, B, block): each device's own latents


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def relu_autoencode(x, w_enc, b_enc, w_dec, compute_dtype=jnp.float32):
    """latents = ReLU(x @ w_enc + b_enc), and latents @ w_dec.

    Args:
      x: (B, d_in), data: it gets no gradient. w_enc: (d_in, d_sae). b_enc: (d_sae,).
      w_dec: (d_sae, d_out).
      compute_dtype: of the matmuls' operands; they accumulate in float32.

    Returns:
      latents @ w_dec (B, d_out); the sum of each latent over the batch (d_sae,); and on how many
      tokens it fired (d_sae,), which has no gradient.

    One all-reduce of the reconstruction over `model`; of the sums, and in the backward pass of
    the gradients, over `data`.
    """
    return _forward(x, w_enc, b_enc, w_dec, compute_dtype)[0]


def _forward(x, w_enc, b_enc, w_dec, compute_dtype):
    def local(x, w_enc, b_enc, w_dec):
        n = len(b_enc)
        size = _block_size(n)
        x = x.astype(compute_dtype)

        def add_block(x_hat, start):
            pre = product(x, _slice(w_enc, start, size, axis=1).astype(compute_dtype))
            latents = jax.nn.relu(pre + _slice(b_enc, start, size))
            sums = latents.sum(axis=0)
            counts = (latents > 0).astype(jnp.float32).sum(axis=0)
            latents = latents.astype(compute_dtype)
            x_hat += product(latents, _slice(w_dec, start, size).astype(compute_dtype))
            return x_hat, (latents, sums, counts)

        x_hat = jnp.zeros((x.shape[0], w_dec.shape[1]), jnp.float32)
        x_hat, (latents, sums, counts) = jax.lax.scan(add_block, x_hat, jnp.arange(0, n, size))
        totals = psum((sums.reshape(n), counts.reshape(n)), "data")
        return (psum(x_hat, "model"), *totals), latents

    out_specs = ((BATCH, PER_LATENT, PER_LATENT), _BLOCKS)
    out, latents = per_shard(local, (BATCH, ENCODER, PER_LATENT, DECODER), out_specs)(
        x, w_enc, b_enc, w_dec
    )
    return out, (x, w_enc, w_dec, latents)


def _backward(compute_dtype, saved, cotangents):
    d_x_hat, d_sums, _ = cotangents

    def local(x, w_enc, w_dec, latents, d_x_hat, d_sums):
        size = latents.shape[2]
        x_t = x.astype(compute_dtype).T
        d_x_hat = d_x_hat.astype(compute_dtype)

        def add_block(i, gradients):
            d_w_enc, d_b_enc, d_w_dec = gradients
            start = i * size
            w_block = _slice(w_dec, start, size).astype(compute_dtype)
            d_latents = product(d_x_hat, w_block.T) + _slice(d_sums, start, size)
            d_pre = jnp.where(latents[i] > 0, d_latents, 0.0)
            parts = (
                product(x_t, d_pre.astype(compute_dtype)),
                d_pre.sum(axis=0),
                product(latents[i].T, d_x_hat),
            )
            return (
                jax.lax.dynamic_update_slice_in_dim(d_w_enc, parts[0], start, axis=1),
                jax.lax.dynamic_update_slice_in_dim(d_b_enc, parts[1], start, axis=0),
                jax.lax.dynamic_update_slice_in_dim(d_w_dec, parts[2], start, axis=0),
            )

        empty = (w_enc.shape, w_enc.shape[1:], w_dec.shape)
        gradients = tuple(jnp.zeros(shape, jnp.float32) for shape in empty)
        return psum(jax.lax.fori_loop(0, len(latents), add_block, gradients), "data")

    in_specs = (BATCH, ENCODER, DECODER, _BLOCKS, BATCH, PER_LATENT)
    gradients = per_shard(local, in_specs, (ENCODER, PER_LATENT, DECODER))(*saved, d_x_hat, d_sums)
    return None, *gradients


relu_autoencode.defvjp(_forward, _backward)


def _block_size(n: int) -> int:
    """The largest divisor of n that is not above the device's block; n itself where only small
    ones are left."""
    limit = _CPU_BLOCK if jax.default_backend() == "cpu" else _BLOCK
    size = next(size for size in range(min(limit, n), 0, -1) if n % size == 0)
    return size if size >= limit // 8 else n


def _slice(array, start, size: int, axis: int = 0):
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)
