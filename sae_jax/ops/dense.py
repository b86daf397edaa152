"""The two dense matmuls of an autoencoder, with operands in a chosen type and float32 sums."""

import functools

import jax
import jax.numpy as jnp

from sae_jax.ops.mesh import BATCH, CODE, DECODER, ENCODER, out_sharding


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def encode_dense(x, w_enc, compute_dtype=jnp.float32):
    """x (B, d_in) @ w_enc (d_in, d_sae): pre-activations (B, d_sae). No communication."""
    return _matmul(x, w_enc, compute_dtype, CODE)


def _encode_forward(x, w_enc, compute_dtype):
    return encode_dense(x, w_enc, compute_dtype), (x, w_enc)


def _encode_backward(compute_dtype, saved, d_pre):
    x, w_enc = saved
    d_x = _matmul(d_pre, w_enc.T, compute_dtype, BATCH)
    d_w = _matmul(x.T, d_pre, compute_dtype, ENCODER)
    return d_x.astype(x.dtype), d_w.astype(w_enc.dtype)


encode_dense.defvjp(_encode_forward, _encode_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def decode_dense(latents, w_dec, compute_dtype=jnp.float32):
    """latents (B, d_sae) @ w_dec (d_sae, d_out): (B, d_out). One all-reduce over `model`."""
    return _matmul(latents, w_dec, compute_dtype, BATCH)


def _decode_forward(latents, w_dec, compute_dtype):
    return decode_dense(latents, w_dec, compute_dtype), (latents, w_dec)


def _decode_backward(compute_dtype, saved, d_x_hat):
    latents, w_dec = saved
    d_latents = _matmul(d_x_hat, w_dec.T, compute_dtype, CODE)
    d_w = _matmul(latents.T, d_x_hat, compute_dtype, DECODER)
    return d_latents.astype(latents.dtype), d_w.astype(w_dec.dtype)


decode_dense.defvjp(_decode_forward, _decode_backward)


def _matmul(a, b, compute_dtype, spec):
    return jnp.matmul(
        a.astype(compute_dtype),
        b.astype(compute_dtype),
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding(spec),
    )
