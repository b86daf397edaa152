"""What the formats share: reading tensors with their shapes checked, and SAEs as plain arrays."""

import pathlib

import jax.numpy as jnp
import numpy as np

from sae_jax.errors import UserError
from sae_jax.sae import SAE, SAEConfig, architecture, resolve

Arrays = dict[str, np.ndarray]


def read_torch(file: pathlib.Path) -> dict:
    """The content of a file that torch.save wrote: tensors, numbers and text, nothing that would
    run code of the file's. UserError where torch is missing, or the file damaged or more than
    that."""
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
    try:
        import torch
    except ImportError:
        raise UserError(f'{file} is in PyTorch\'s format: pip install "sae-jax[torch]"') from None
    return torch


def check_shapes(tensors: Arrays, shapes: dict[str, tuple[int, ...]], file) -> Arrays:
    """The tensors named in `shapes`, in float64, so that folding rounds once. UserError for one
    that is missing, has another shape, is not finite, or is there besides."""
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
    if name not in tensors:
        raise UserError(f"{file} has no tensor {name}")
    shape = np.shape(tensors[name])
    if len(shape) != 2:
        raise UserError(f"{file}: {name} has shape {shape}; it must have two dimensions")
    return shape


def make_sae(config: SAEConfig, d_in: int, d_out: int, parameters: Arrays) -> SAE:
    """Returns an SAE in the model's own units, its parameters rounded to float32."""
    target = None if config.kind == "autoencoder" else d_out
    config = resolve(config, d_in, target)
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in parameters.items()}
    return architecture(config).from_parameters(config, arrays)


def parameters_of(sae: SAE) -> Arrays:
    """In float64."""
    return {name: np.asarray(value, np.float64) for name, value in sae.parameters().items()}


def without_shift(sae: SAE, subtracts: bool) -> Arrays:
    """The parameters of a folded SAE for a format that always, or never, subtracts b_dec from x
    before it encodes: the same pre-activations by other biases."""
    arrays = parameters_of(sae)
    ours = bool(sae.config.apply_b_dec_to_input)
    if ours != subtracts:
        shift = (1 if subtracts else -1) * (arrays["b_dec"] @ arrays["w_enc"])
        arrays["b_enc"] = arrays["b_enc"] + shift
        if "b_mag" in arrays:
            arrays["b_mag"] = arrays["b_mag"] + np.exp(arrays["r_mag"]) * shift
    return arrays


def float32(arrays: Arrays) -> Arrays:
    return {name: np.ascontiguousarray(a, np.float32) for name, a in arrays.items()}
