"""Reads tensors with their shapes checked, and turns SAEs into arrays, for all formats."""

import pathlib

import jax.numpy as jnp
import numpy as np

from sae_jax.errors import UserError
from sae_jax.sae import SAE, SAEConfig, architecture, resolve

Arrays = dict[str, np.ndarray]


def read_torch(file: pathlib.Path) -> dict:
    """Returns the content of a file that torch.save wrote, with tensors as float32 arrays.

    Only tensors, numbers and text are read: nothing in the file is run. Raises UserError if the
    file is damaged or holds anything else, and if torch is not installed.
    """
    torch = import_torch(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no class of its own for it
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"{file} is not a file of tensors that is safe to read, or is damaged ({reason}); "
            "nothing in it was run"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not a dictionary of tensors")
    return {
        name: value.float().numpy() if isinstance(value, torch.Tensor) else value
        for name, value in content.items()
    }


def import_torch(file):
    """Returns the module torch, which `file` needs. Raises UserError if it is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError(f'{file} is in PyTorch\'s format: pip install "sae-jax[torch]"') from None
    return torch


def check_shapes(tensors: Arrays, shapes: dict[str, tuple[int, ...]], file) -> Arrays:
    """Returns the tensors named in `shapes` in float64, so that folding rounds only once.

    Raises UserError for a tensor that is missing, has another shape or is not finite, and for one
    that `shapes` does not name.

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
        if not np.isfinite(np.asarray(tensors[name], np.float64)).all():
            raise UserError(f"{file}: {name} holds NaN or infinity")
    return {name: np.asarray(tensors[name], np.float64) for name in shapes}


def matrix_shape(tensors: Arrays, name: str, file) -> tuple[int, int]:
    """Returns the shape of the matrix of this name.

    Raises UserError, which names `file`, if it is missing or has not two dimensions.
    """
    if name not in tensors:
        raise UserError(f"{file} has no tensor {name}")
    shape = np.shape(tensors[name])
    if len(shape) != 2:
        raise UserError(f"{file}: {name} has shape {shape}; it must have two dimensions")
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
