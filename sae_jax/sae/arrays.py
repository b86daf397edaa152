"""Turns activations of any type into float32 arrays of JAX, and results back into that type."""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.errors import UserError

Restore = Callable[[jax.Array], "jax.Array"]
"""A function that turns a result into a tensor of torch, on the input's device, where the input was
one, and leaves it as it is otherwise."""


def float32(values, width: int, what: str, axis: str) -> tuple[jax.Array, Restore]:
    """Returns `values` (..., width) as a float32 array, and the `Restore` for results of it.

    The cast is done before anything is computed, so values of half precision give what the same
    values in float32 give. Tensors of torch pass through DLPack, and no gradient of torch's flows
    through.

    Raises UserError for a last axis of another width, for ragged lists, and for values that are not
    real numbers.

    Args:
      values: an array of JAX (it may be traced) or NumPy, a tensor of torch, or nested lists of
        numbers, of any float or integer type.
      width: the width of the last axis.
      what: what the values are called in an error.
      axis: what the last axis is called in an error.
    """
    torch = sys.modules.get("torch")  # a tensor of torch's cannot be here without it
    if torch is not None and isinstance(values, torch.Tensor):
        array, restore = _from_torch(values, torch, what), _to_torch(values.device, torch)
    else:
        array, restore = _from_numbers(values, what), _unchanged
    if array.ndim == 0 or array.shape[-1] != width:
        shape = tuple(array.shape)
        got = f"width {shape[-1]} and shape {shape}" if shape else "shape ()"
        raise UserError(
            f"{what} of {got} given to an SAE with {axis} {width}; it takes (..., {width})"
        )
    return array, restore


def _from_numbers(values, what: str) -> jax.Array:
    if not isinstance(values, jax.Array | np.ndarray):
        try:
            values = np.asarray(values)
        except (ValueError, TypeError) as error:
            raise UserError(f"{what} are no array of numbers: {_one_line(error)}") from None
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    if not any(jnp.issubdtype(values.dtype, kind) for kind in kinds):
        raise UserError(f"{what} are of type {values.dtype}; they must be real numbers")
    if isinstance(values, np.ndarray):  # float64 is rounded here, where nothing warns
        values = values.astype(np.float32)
    return jnp.asarray(values, jnp.float32)


def _from_torch(tensor, torch, what: str) -> jax.Array:
    if tensor.is_complex():
        raise UserError(f"{what} are of type {tensor.dtype}; they must be real numbers")
    tensor = tensor.detach().to(torch.float32).contiguous()
    if tensor.numel() == 0:
        return jnp.zeros(tuple(tensor.shape), jnp.float32)
    try:
        # A copy: the caller may write to the tensor while JAX still computes with it.
        return jnp.from_dlpack(tensor, copy=True)
    except (RuntimeError, ValueError, TypeError):  # a device that this JAX does not have
        return jnp.asarray(tensor.cpu().numpy().copy())


def _to_torch(device, torch) -> Restore:
    def restore(array: jax.Array):
        if array.size == 0 or array.dtype == bool:
            return torch.from_numpy(np.array(array)).to(device)
        return torch.from_dlpack(array).to(device, copy=True)  # its memory is not JAX's

    return restore


def _unchanged(array: jax.Array) -> jax.Array:
    return array


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0]
