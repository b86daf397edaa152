"""Reads and writes the format of OpenAI's sparse_autoencoder package: autoencoder.pt.

The file is a state dict that torch.save wrote, of an SAE that computes

    latents = ReLU((x - pre_bias) @ encoder.weight.T + latent_bias)
    x_hat = latents @ decoder.weight.T + pre_bias

The package's TopK always applies a LayerNorm before the encoder and undoes it behind the decoder.
No SAE of ours does that, so TopK is neither read nor written.
"""

import pathlib

import numpy as np

from sae_jax.errors import UserError
from sae_jax.interop.archives import read_torch
from sae_jax.interop.weights import (
    check_shapes,
    float32,
    import_torch,
    make_sae,
    matrix_shape,
    parameters_for,
)
from sae_jax.sae import SAE, ReLUL1UnitConfig

EXPRESSES = {(name, "autoencoder"): "ReLU" for name in ("relu", "relu_l1_unit")}
WHY_NOT = "it has ReLU, and TopK only with a LayerNorm around it"
USAGE = """import torch

# As sparse_autoencoder.Autoencoder.from_state_dict(state) computes it.
state = torch.load(f"{path}/autoencoder.pt", weights_only=True)
x = torch.randn(4, $d_in)  # stands for activations at $site
pre = (x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
latents = torch.relu(pre)
x_hat = latents @ state["decoder.weight"].T + state["pre_bias"]
"""
_FILE = "autoencoder.pt"
FILES = (_FILE,)
# Counters of training that its loader asks for.
_COUNTERS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def recognises(path: pathlib.Path) -> bool:
    """Returns whether `path` is a folder with autoencoder.pt, or a .pt file itself."""
    return (path / _FILE).is_file() or path.suffix == ".pt" and path.is_file()


def write(sae: SAE, directory: pathlib.Path, provenance: dict) -> None:
    """Writes a folded SAE to an existing folder. The format has no place for its provenance.

    Raises UserError if torch is not installed.
    """
    del provenance
    torch = import_torch(directory / _FILE)
    arrays = float32(parameters_for(sae, subtracts_b_dec=True))
    n = sae.config.d_sae
    tensors = {
        "pre_bias": arrays["b_dec"],
        "latent_bias": arrays["b_enc"],
        "encoder.weight": np.ascontiguousarray(arrays["w_enc"].T),
        "decoder.weight": np.ascontiguousarray(arrays["w_dec"].T),
        "stats_last_nonzero": np.zeros(n, np.int64),
        "latents_activation_frequency": np.ones(n, np.float32),
        "latents_mean_square": np.zeros(n, np.float32),
    }
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    torch.save(state | {"activation": "ReLU", "activation_state_dict": {}}, directory / _FILE)


def read(path: pathlib.Path) -> SAE:
    """Returns the SAE in a folder or .pt file of OpenAI's package, in float32.

    Raises UserError for an activation function other than ReLU, for tensors that are missing,
    additional or of another shape, and if the file is damaged.
    """
    file = path / _FILE if path.is_dir() else path
    state = read_torch(file)
    activation = state.pop("activation", "ReLU")
    if not isinstance(activation, str):
        raise UserError(f"{file}: activation is {type(activation).__name__}, not a name")
    if activation != "ReLU":
        raise UserError(
            f"{file}: activation {activation!r}; OpenAI's TopK has a LayerNorm around it, which no "
            "SAE here has, so only 'ReLU' can be read"
        )
    names = ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight")
    n, d = matrix_shape(state, "encoder.weight", file)
    shapes = dict(zip(names, ((d,), (n,), (n, d), (d, n)), strict=True))
    others = {*_COUNTERS, "activation_state_dict"}
    kept = {name: value for name, value in state.items() if name not in others}
    b_dec, b_enc, w_enc, w_dec = check_shapes(kept, shapes, file).values()
    config = ReLUL1UnitConfig(d_sae=n, unit_norm_decoder=False, normalize="none")
    arrays = {"w_enc": w_enc.T, "w_dec": w_dec.T, "b_enc": b_enc, "b_dec": b_dec}
    return make_sae(config, d, d, arrays)
