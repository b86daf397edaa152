"""Gemma Scope (Lieberum et al. 2024): JumpReLU SAEs and transcoders as params.npz.

latents = z 1[z > threshold], z = x W_enc + b_enc: b_dec is never taken from x, so for our SAEs that
do, b_enc' = b_enc - b_dec @ W_enc. A ReLU is a threshold of 0. The file says nothing of the
language model; its place in the folders of a release does.
"""

import pathlib
import zipfile

import numpy as np

from sae_jax.errors import UserError
from sae_jax.interop.weights import (
    Arrays,
    check_shapes,
    float32,
    make_sae,
    matrix_shape,
    without_shift,
)
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
    return all((path / name).is_file() for name in FILES)


def write(sae: SAE, directory: pathlib.Path, about: dict) -> None:
    del about
    arrays = parameters(sae)
    ours = {name: name for name in arrays} | {ours: theirs for theirs, ours in _NAMES.items()}
    np.savez(directory / _FILE, **{ours[name]: array for name, array in arrays.items()})


def read(directory: pathlib.Path) -> SAE:
    file = directory / _FILE
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            tensors = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is damaged or truncated: {error}") from None
    return jump_relu({_NAMES.get(name, name): array for name, array in tensors.items()}, file)


def parameters(sae: SAE) -> Arrays:
    """Of a folded SAE, as JumpReLU's, in float32 and by our names."""
    arrays = without_shift(sae, subtracts=False)
    arrays.setdefault("threshold", np.zeros(sae.config.d_sae))
    return float32(arrays)


def jump_relu(tensors: Arrays, file: pathlib.Path, kind: str | None = None) -> SAE:
    """From arrays by our names. kind: by default what the widths say."""
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
