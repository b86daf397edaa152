"""The dense autoencoder: all latents of every token, in blocks of the dictionary.

The (B, d_sae) arrays are by far the largest of a dense step. A block of them is encoded, activated,
decoded and summed up while it is in cache, and the backward pass uses it up in one go. In between
only the encoder's products lie in memory, once.

A batch in which few latents act is worked on by these alone (`ops.active`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sae_jax.ops.active import (
    autoencode_active,
    find_active,
    gradients_of_active,
    worth_finding,
)
from sae_jax.ops.products import encoder_operand, transposed_operand
from sae_jax.ops.sharding import (
    BATCH,
    DECODER,
    ENCODER,
    PER_LATENT,
    PER_TOKEN,
    matmul_f32,
    on_cpu,
    per_shard,
    psum,
)

_CPU_BLOCK = 2048  # latents; a block of them for 2,048 tokens is 16 MiB
_BLOCK = 16_384  # elsewhere, where the matmuls must be large
_BLOCKS = P(None, "data", "model")  # (blocks, B, block): each device's own latents
_OWN = P(("data", "model"))  # what each device has by itself


class Activated(NamedTuple):
    """What an architecture computes from a block of M latents, for B tokens.

    Attributes:
      latents: arrays (B, M), each of which will be decoded.
      latent_sums: sums (M,) over the block's tokens, by name.
      token_sums: sums (B,) over the block's latents, by name.
    """

    latents: tuple[jax.Array, ...]
    latent_sums: dict[str, jax.Array]
    token_sums: dict[str, jax.Array]


class Autoencoded(NamedTuple):
    """What `dense_autoencode` returns, for B tokens.

    Attributes:
      decoded: `latents @ w_dec` (B, d_out), for each of the latents.
      latent_sums: sums (d_sae,) over the batch, by name.
      token_sums: sums (B,) over the dictionary, by name.
    """

    decoded: tuple[jax.Array, ...]
    latent_sums: dict[str, jax.Array]
    token_sums: dict[str, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6, 7))
def dense_autoencode(
    activation: Callable[[jax.Array, dict], Activated],
    x: jax.Array,
    w_enc: jax.Array,
    per_latent: dict[str, jax.Array],
    w_dec: jax.Array,
    compute_dtype=jnp.float32,
    kept_dtype=jnp.float32,
    support: Callable[[jax.Array, dict], jax.Array] | None = None,
) -> Autoencoded:
    """Encodes, activates and decodes every token, block by block of the dictionary.

    Only the first of several latents sends a gradient to w_dec. The others are decoded by w_dec as
    a constant (the gated SAE's auxiliary reconstruction).

    One all-reduce over `model` sums decoded and token_sums. One over `data` sums latent_sums and,
    in the backward pass, the gradients.

    Args:
      activation: a function of products (B, M) and of `per_latent` cut to the block's M latents. It
        works on each latent by itself, and JAX differentiates it.
      x: the inputs (B, d_in). They are data and get no gradient.
      w_enc: the encoder (d_in, d_sae).
      per_latent: arrays (d_sae,) by name: biases, thresholds, weights of penalties.
      w_dec: the decoder (d_sae, d_out).
      compute_dtype: the dtype of the matmuls' operands. They accumulate in float32.
      kept_dtype: the dtype of the products (B, d_sae) that are kept for the backward pass.
      support: a function of the arguments of `activation` that returns where latents act, (B, M)
        bool. Elsewhere all that `activation` returns is 0, and so are its derivatives. Where few
        latents act the rest of the work is left out, to rounding with the same result; each device
        decides this for its own tokens and latents. Rows of w_dec whose latents do not act are not
        read then. With None latents act everywhere.
    """
    return _forward(activation, x, w_enc, per_latent, w_dec, compute_dtype, kept_dtype, support)[0]


def _forward(activation, x, w_enc, per_latent, w_dec, compute_dtype, kept_dtype, support):
    def local(x, w_enc, per_latent, w_dec):
        n = w_enc.shape[1]
        size = _block_size(n)
        totals = _empty_totals(activation, x, per_latent, w_dec, size)

        def dense():
            return _autoencode_all(
                activation, x, w_enc, per_latent, w_dec, totals, size, compute_dtype, kept_dtype
            )

        def sparse():
            empty = totals[0], _empty_sums(activation, per_latent, n), totals[1]
            out = autoencode_active(activation, active, per_latent, w_dec, empty)
            return *out, jnp.zeros((n // size, len(x), size), kept_dtype)

        if support is None or not worth_finding(n):
            active, (decoded, sums, token_sums, kept) = None, dense()
        else:
            active = find_active(support, x, w_enc, per_latent, compute_dtype)
            decoded, sums, token_sums, kept = jax.lax.cond(active.complete[0], sparse, dense)
        decoded, token_sums = psum((decoded, token_sums), "model")
        return Autoencoded(decoded, psum(sums, "data"), token_sums), kept, active

    out_specs = (Autoencoded(BATCH, PER_LATENT, PER_TOKEN), _BLOCKS, _OWN)
    out, kept, active = per_shard(local, (BATCH, ENCODER, PER_LATENT, DECODER), out_specs)(
        x, w_enc, per_latent, w_dec
    )
    return out, (x, per_latent, w_dec, kept, active)


def _autoencode_all(
    activation, x, w_enc, per_latent, w_dec, totals, size, compute_dtype, kept_dtype
):
    """Returns this device's (decoded, latent_sums, token_sums), and the products that are kept."""
    n = w_enc.shape[1]
    x = x.astype(compute_dtype)

    def run_block(totals, start):
        pre = matmul_f32(x, encoder_operand(_slice(w_enc, start, size, axis=1), compute_dtype))
        w_block = _slice(w_dec, start, size).astype(compute_dtype)
        out = activation(pre, _slices(per_latent, start, size))
        decoded = tuple(matmul_f32(f.astype(compute_dtype), w_block) for f in out.latents)
        totals = jax.tree.map(jnp.add, totals, (decoded, out.token_sums))
        return totals, (pre.astype(kept_dtype), out.latent_sums)

    totals, (kept, sums) = jax.lax.scan(run_block, totals, jnp.arange(0, n, size))
    decoded, token_sums = totals
    return decoded, jax.tree.map(lambda a: a.reshape(n), sums), token_sums, kept


def _empty_totals(activation, x, per_latent, w_dec, size: int):
    """Returns zeros (decoded, token_sums) to add up blocks in."""
    out = _shapes(activation, x.shape[0], per_latent, size)
    decoded = tuple(jnp.zeros((x.shape[0], w_dec.shape[1]), jnp.float32) for _ in out.latents)
    return decoded, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), out.token_sums)


def _empty_sums(activation, per_latent, n: int):
    """Returns zeros (d_sae,) to add up latent_sums in."""
    sums = _shapes(activation, 1, per_latent, 1).latent_sums
    return jax.tree.map(lambda a: jnp.zeros(n, a.dtype), sums)


def _shapes(activation, tokens: int, per_latent, size: int):
    """Returns the shapes of the activation of a block."""
    pre = jax.ShapeDtypeStruct((tokens, size), jnp.float32)
    return jax.eval_shape(lambda pre: activation(pre, _slices(per_latent, 0, size)), pre)


def _backward(activation, compute_dtype, kept_dtype, support, saved, cotangents):
    def local(x, per_latent, w_dec, kept, active, *d_out):
        def dense():
            return _gradients_of_all(activation, x, per_latent, w_dec, kept, d_out, compute_dtype)

        def sparse():
            return gradients_of_active(activation, active, x, per_latent, w_dec, d_out)

        gradients = dense() if active is None else jax.lax.cond(active.complete[0], sparse, dense)
        return psum(gradients, "data")

    in_specs = (BATCH, PER_LATENT, DECODER, _BLOCKS, _OWN, BATCH, PER_LATENT, PER_TOKEN)
    gradients = per_shard(local, in_specs, (ENCODER, PER_LATENT, DECODER))(*saved, *cotangents)
    return None, *gradients


def _gradients_of_all(activation, x, per_latent, w_dec, kept, d_out, compute_dtype):
    """Returns this device's gradients of w_enc, of `per_latent` and of w_dec."""
    d_decoded, d_latent_sums, d_token_sums = d_out
    size = kept.shape[2]
    n = kept.shape[0] * size

    def operand(a):
        # In a loop, which several blocks are to XLA, CPUs have these products.
        return transposed_operand(a, compute_dtype) if len(kept) == 1 else a.astype(compute_dtype)

    x_t = operand(x).T
    d_decoded = tuple(operand(d) for d in d_decoded)

    def add_block(i, gradients):
        start = i * size
        out, pull = jax.vjp(
            activation, kept[i].astype(jnp.float32), _slices(per_latent, start, size)
        )
        w_block = operand(_slice(w_dec, start, size))
        d_latents = tuple(matmul_f32(d, w_block.T) for d in d_decoded)
        d_pre, d_per_latent = pull(
            Activated(d_latents, _slices(d_latent_sums, start, size), d_token_sums)
        )
        d_w_enc, d_all_per_latent, d_w_dec = gradients
        w_enc_part = matmul_f32(x_t, operand(d_pre))
        w_dec_part = matmul_f32(operand(out.latents[0]).T, d_decoded[0])
        return (
            jax.lax.dynamic_update_slice_in_dim(d_w_enc, w_enc_part, start, axis=1),
            jax.tree.map(
                lambda total, part: jax.lax.dynamic_update_slice_in_dim(total, part, start, 0),
                d_all_per_latent,
                d_per_latent,
            ),
            jax.lax.dynamic_update_slice_in_dim(d_w_dec, w_dec_part, start, axis=0),
        )

    # The blocks fill these. An accelerator would fill them with zeros before that.
    gradients = (
        jax.lax.empty((x.shape[1], n), jnp.float32),
        jax.tree.map(lambda a: jax.lax.empty(a.shape, a.dtype), per_latent),
        jax.lax.empty(w_dec.shape, jnp.float32),
    )
    return jax.lax.fori_loop(0, len(kept), add_block, gradients)


dense_autoencode.defvjp(_forward, _backward)


def _block_size(n: int) -> int:
    """Returns the largest divisor of n that is not above the device's block size.

    It returns n itself where there are only small divisors.
    """
    limit = _CPU_BLOCK if on_cpu() else _BLOCK
    size = next(size for size in range(min(limit, n), 0, -1) if n % size == 0)
    return size if size >= limit // 8 else n


def _slice(array, start, size: int, axis: int = 0):
    """Returns `size` entries from `start` on along an axis."""
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def _slices(arrays, start, size: int):
    """Returns the slices of several arrays."""
    return jax.tree.map(lambda array: _slice(array, start, size), arrays)
