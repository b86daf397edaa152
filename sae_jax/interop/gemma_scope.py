"""Reads and writes the format of Gemma Scope (Lieberum et al. 2024): params.npz.

It has JumpReLU SAEs and transcoders: latents = z 1[z > threshold], with z = x W_enc + b_enc. As
b_dec is never taken from x, an SAE of ours that takes it is written with b_enc' = b_enc - b_dec @
W_enc. A ReLU is written with thresholds of 0. The file says nothing of the language model; its
place in the folders of a release does.
"""

import pathlib

import numpy as np

from sae_jax.interop.weights import (
    check_shapes,
    float32,
    make_sae,
    matrix_shape,
    parameters_for,
)
from sae_jax.numpy_files import Arrays, read_npz
from sae_jax.sae import SAE, JumpReLUConfig

EXPRESSES = {
    (name, kind): "JumpReLU"
    for name in ("relu", "relu_l1_unit", "jumprelu", "batchtopk", "matryoshka")
    for kind in ("autoencoder", "transcoder")
}
WHY_NOT = "its SAEs have one threshold for each latent, and nothing else"
USAGE = """import numpy as np

p = np.load(f"{path}/params.npz")
x = np.random.randn(4, $d_in).astype(np.float32)  # stands for activations at $site
pre = x @ p["W_enc"] + p["b_enc"]
latents = np.where(pre > p["threshold"], np.maximum(pre, 0), 0)
x_hat = latents @ p["W_dec"] + p["b_dec"]
"""
_FILE = "params.npz"
FILES = (_FILE,)
_NAMES = {"W_enc": "w_enc", "W_dec": "w_dec"}  # where they are not ours


def recognises(path: pathlib.Path) -> bool:
    """Returns whether `path` is a folder of Gemma Scope's."""
    return all((path / name).is_file() for name in FILES)


def write(sae: SAE, directory: pathlib.Path, provenance: dict) -> None:
    """Writes a folded SAE to an existing folder. The format has no place for its provenance."""
    del provenance
    arrays = parameters(sae)
    ours = {name: name for name in arrays} | {ours: theirs for theirs, ours in _NAMES.items()}
    np.savez(directory / _FILE, **{ours[name]: array for name, array in arrays.items()})


def read(directory: pathlib.Path, kind: str | None = None) -> SAE:
    """Returns the SAE in a folder of Gemma Scope's, in float32.

    Raises UserError if the file is damaged, or for tensors that are missing, additional or of
    another shape.

    Args:
      directory: the folder.
      kind: the SAE's kind, which the file does not say. None stands for an autoencoder where
        d_in is d_out, else for a transcoder.
    """
    file = directory / _FILE
    tensors = read_npz(file)
    return jump_relu({_NAMES.get(name, name): a for name, a in tensors.items()}, file, kind)


def parameters(sae: SAE) -> Arrays:
    """Returns the parameters of a folded SAE as those of a JumpReLU, float32 arrays by name.

    b_dec is not to be taken from x with them. Where the SAE has no thresholds they are 0.
    """
    arrays = parameters_for(sae, subtracts_b_dec=False)
    arrays.setdefault("threshold", np.zeros(sae.config.d_sae))
    return float32(arrays)


def jump_relu(tensors: Arrays, file: pathlib.Path, kind: str | None = None) -> SAE:
    """Returns the JumpReLU SAE that has the given parameters, in float32.

    Raises UserError for arrays that are missing, additional or of another shape.

    Args:
      tensors: arrays by our names of the parameters.
      file: the file that they are from, for errors.
      kind: the SAE's kind. None stands for an autoencoder where d_in is d_out, else a transcoder.
    """
    d_in, d_sae = matrix_shape(tensors, "w_enc", file)
    d_out = matrix_shape(tensors, "w_dec", file)[1]
    shapes = {
        "w_enc": (d_in, d_sae),
        "w_dec": (d_sae, d_out),
        "b_enc": (d_sae,),
        "b_dec": (d_out,),
        "threshold": (d_sae,),
    }
    kind = kind or ("autoencoder" if d_in == d_out else "transcoder")
    if kind == "skip_transcoder":
        shapes["w_skip"] = (d_in, d_out)
    arrays = check_shapes(tensors, shapes, file)
    config = JumpReLUConfig(
        kind=kind,
        d_sae=d_sae,
        apply_b_dec_to_input=False,
        unit_norm_decoder=False,
        normalize="none",
    )
    return make_sae(config, d_in, d_out, arrays)
