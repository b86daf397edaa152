"""Checks the shapes of tensors, and turns them into SAEs and SAEs into arrays, for all formats."""

import jax.numpy as jnp
import numpy as np

from sae_jax.errors import UserError
from sae_jax.numpy_files import Arrays
from sae_jax.sae import SAE, SAEConfig, architecture, resolve
from sae_jax.sae.files import check_weights


def import_torch(file):
    """Returns the module torch, which `file` needs. Raises UserError if it is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError(f'{file} is in PyTorch\'s format: pip install "sae-jax[torch]"') from None
    return torch


def check_shapes(tensors: Arrays, shapes: dict[str, tuple[int, ...]], file) -> Arrays:
    """Returns the tensors named in `shapes` in float64, so that folding rounds only once.

    Raises UserError for a tensor that is missing, has another shape, is not finite or is not of a
    floating-point type, and for one that `shapes` does not name.

    Args:
      tensors: arrays by name.
      shapes: the shape that each must have, by name.
      file: the file that they are from, for errors.
    """
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise UserError(f"{file} has no tensor {missing[0]}")
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise UserError(f"{file} has a tensor {extra[0]} that its config does not explain")
    for name, shape in shapes.items():
        found = tuple(np.shape(tensors[name]))
        if found != shape:
            turned = ", transposed" if found == shape[::-1] else ""
            raise UserError(f"{file}: {name} has shape {found}{turned}; it must be {shape}")
    check_weights(tensors, file)
    return {name: np.asarray(tensors[name], np.float64) for name in shapes}


def matrix_shape(tensors: Arrays, name: str, file) -> tuple[int, int]:
    """Returns the shape of the matrix of this name.

    Raises UserError, which names `file`, if it is missing, has not two dimensions or is empty.
    """
    if name not in tensors:
        raise UserError(f"{file} has no tensor {name}")
    shape = np.shape(tensors[name])
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{file}: {name} has shape {shape}; it must have two dimensions above 0")
    return shape


def make_sae(config: SAEConfig, d_in: int, d_out: int, parameters: Arrays) -> SAE:
    """Returns an SAE with scales 1, whose parameters are rounded to float32.

    Args:
      config: a config whose widths are not filled in.
      d_in: the width of the inputs.
      d_out: the width of the targets.
      parameters: arrays by our names.
    """
    target = None if config.kind == "autoencoder" else d_out
    config = resolve(config, d_in, target)
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in parameters.items()}
    return architecture(config).from_parameters(config, arrays)


def float64_parameters(sae: SAE) -> Arrays:
    """Returns the parameters of an SAE by name, in float64."""
    return {name: np.asarray(value, np.float64) for name, value in sae.parameters().items()}


def parameters_for(sae: SAE, subtracts_b_dec: bool) -> Arrays:
    """Returns the parameters by which a format computes the pre-activations of a folded SAE.

    If only one of the two subtracts b_dec from x, b_enc (and b_mag of a gated SAE) is changed by
    what the difference adds to the pre-activations. The arrays are float64, by our names.

    Args:
      sae: the folded SAE.
      subtracts_b_dec: whether the format subtracts b_dec from x before it encodes.
    """
    arrays = float64_parameters(sae)
    ours = bool(sae.config.apply_b_dec_to_input)
    if ours != subtracts_b_dec:
        shift = (1 if subtracts_b_dec else -1) * (arrays["b_dec"] @ arrays["w_enc"])
        arrays["b_enc"] = arrays["b_enc"] + shift
        if "b_mag" in arrays:
            arrays["b_mag"] = arrays["b_mag"] + np.exp(arrays["r_mag"]) * shift
    return arrays


def float32(arrays: Arrays) -> Arrays:
    """Returns contiguous float32 copies of the arrays."""
    return {name: np.ascontiguousarray(a, np.float32) for name, a in arrays.items()}
