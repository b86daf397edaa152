"""Reads and writes the format of Gemma Scope 2: params.safetensors and config.json.

config.json says where in the model the SAE reads and writes, and whether a transcoder has an affine
skip. The SAEs compute what those of Gemma Scope compute (`gemma_scope.py`).
"""

import dataclasses
import pathlib
from typing import Literal

import safetensors.numpy

from sae_jax.interop import gemma_scope
from sae_jax.json_files import checked, read_json
from sae_jax.paths import as_json
from sae_jax.sae import SAE
from sae_jax.sae.files import read_safetensors

EXPRESSES = gemma_scope.EXPRESSES | {
    (name, "skip_transcoder"): "JumpReLU with an affine skip"
    for name, kind in gemma_scope.EXPRESSES
    if kind == "transcoder"
}
WHY_NOT = gemma_scope.WHY_NOT
USAGE = """import numpy as np
import safetensors.numpy

p = safetensors.numpy.load_file(f"{path}/params.safetensors")
x = np.random.randn(4, $d_in).astype(np.float32)  # stands for activations at $site
pre = x @ p["w_enc"] + p["b_enc"]
latents = np.where(pre > p["threshold"], np.maximum(pre, 0), 0)
x_hat = latents @ p["w_dec"] + p["b_dec"]
if "affine_skip_connection" in p:
    x_hat = x_hat + x @ p["affine_skip_connection"]
"""
_FILE = "params.safetensors"
FILES = ("config.json", _FILE)
_SKIP = "affine_skip_connection"


@dataclasses.dataclass(frozen=True)
class _Config:
    """Describes what we use of config.json."""

    architecture: Literal["jump_relu"]
    hf_hook_point_in: str | None = None
    hf_hook_point_out: str | None = None


def recognises(path: pathlib.Path) -> bool:
    """Returns whether `path` is a folder of Gemma Scope 2's."""
    return all((path / name).is_file() for name in FILES)


def write(sae: SAE, directory: pathlib.Path, provenance: dict) -> None:
    """Writes a folded SAE to an existing folder, with what its provenance says of the model."""
    arrays = gemma_scope.parameters(sae)
    if "w_skip" in arrays:
        arrays[_SKIP] = arrays.pop("w_skip")
    safetensors.numpy.save_file(arrays, directory / _FILE)
    source, target = provenance.get("hf_module"), provenance.get("hf_target_module")
    config = {
        "architecture": "jump_relu",
        "model_name": provenance.get("model_name"),
        "hf_hook_point_in": source,
        "hf_hook_point_out": target or source,
        "affine_connection": _SKIP in arrays,
        "width": sae.config.d_sae,
        "l0": provenance.get("l0"),
    }
    (directory / "config.json").write_text(as_json(config))


def read(directory: pathlib.Path, kind: str | None = None) -> SAE:
    """Returns the SAE in a folder of Gemma Scope 2's, in float32.

    Raises UserError for an architecture other than jump_relu, if a file is damaged, and for tensors
    that are missing, additional or of another shape.

    Args:
      directory: the folder.
      kind: the SAE's kind. None stands for what config.json says.
    """
    file = directory / "config.json"
    config = checked(read_json(file), _Config, file)
    tensors = read_safetensors(directory / _FILE)
    # A config of an autoencoder may leave the second out.
    if config.hf_hook_point_out not in (None, config.hf_hook_point_in):
        kind = kind or "transcoder"
    if _SKIP in tensors:
        tensors["w_skip"], kind = tensors.pop(_SKIP), kind or "skip_transcoder"
    return gemma_scope.jump_relu(tensors, directory / _FILE, kind)
