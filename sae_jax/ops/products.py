"""Products whose operands are rounded to a narrow type, and whose sums are float32.

JAX's own gradient of such a product multiplies gradients of float32 with operands of bfloat16, at
the speed of float32, and rounds the sums to bfloat16.
"""

import functools

import jax
import jax.numpy as jnp

from sae_jax.ops.sharding import P, matmul_f32, on_cpu, on_tpu


def product(a: jax.Array, b: jax.Array, compute_dtype, spec: P | None = None) -> jax.Array:
    """Returns a @ b in float32, whose gradients are float32 too.

    Args:
      a: the left operand (B, K), float32.
      b: the right operand (K, N), float32.
      compute_dtype: what operands are rounded to, those of the gradients' products too.
      spec: how the result is sharded; None leaves it to JAX.
    """
    if compute_dtype == jnp.float32:
        return matmul_f32(a, b, spec)
    return _product(a, b, compute_dtype, spec)


def rounded(a: jax.Array, dtype) -> jax.Array:
    """Returns a float32 array with the values that it has in a narrower type."""
    if dtype == jnp.float32:
        return a
    # XLA may leave out conversions to a narrow type and back.
    type_ = jnp.finfo(dtype)
    return jax.lax.reduce_precision(a, type_.nexp, type_.nmant)


def transposed_operand(a: jax.Array, dtype) -> jax.Array:
    """Returns an operand of a product that transposes one, in `dtype`.

    On a CPU it is float32 with the values of `dtype`: XLA's CPU backend (jax 0.10 to 0.12) lacks
    some such products of bfloat16.
    """
    return rounded(a, dtype) if on_cpu() else a.astype(dtype)


def encoder_operand(parameter: jax.Array, dtype) -> jax.Array:
    """Returns the encoder, or a block of it, in the dtype of a product's operands.

    For a TPU it is rounded to bfloat16 first. The values are the same. But XLA would convert a
    whole parameter before a loop over its blocks, and at half the speed of its memory; what was
    rounded it converts where the product reads it.
    """
    if on_tpu() and dtype == jnp.bfloat16:
        parameter = rounded(parameter, dtype)
    return parameter.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(a, b, compute_dtype, spec):
    return matmul_f32(a.astype(compute_dtype), b.astype(compute_dtype), spec)


def _forward(a, b, compute_dtype, spec):
    asked = tuple(() if x.perturbed else None for x in (a, b))  # as residuals can tell it
    a, b = a.value, b.value
    return _product(a, b, compute_dtype, spec), (a, b, asked)


def _backward(compute_dtype, spec, saved, d):
    a, b, (a_asked, b_asked) = saved
    specs = [jax.typeof(x).sharding.spec for x in (a, b)]
    a, b, d = (transposed_operand(x, compute_dtype) for x in (a, b, d))
    return (
        None if a_asked is None else matmul_f32(d, b.T, specs[0]),
        None if b_asked is None else matmul_f32(a.T, d, specs[1]),
    )


_product.defvjp(_forward, _backward, symbolic_zeros=True)
