"""Our own exchange format: sae.safetensors and sae.json, an SAE as it is, to the last bit, without
Orbax and without a run around it.

sae.json: {"format": "sae_jax", "version": 1, "config": the fields of SAEConfig, "about": where it
comes from}. The tensors are the parameters by name, and `scale` and `target_scale`.
"""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from sae_jax.config import SAEConfig, from_dict
from sae_jax.errors import UserError
from sae_jax.interop.weights import check_shapes, read_safetensors
from sae_jax.json_files import read_json
from sae_jax.sae import ARCHITECTURES, SAE
from sae_jax.sae.resolve import KINDS

EXPRESSES = {(name, kind): "sae_jax" for name in ARCHITECTURES for kind in KINDS}
WHY_NOT = ""
USAGE = """import numpy as np
import sae_jax

sae = sae_jax.load(path)
x = np.random.randn(4, $d_in).astype(np.float32)  # stands for activations at $site
latents = sae.encode(x)
x_hat = sae(x)
"""
_VERSION = 1
_SCALES = ("scale", "target_scale")


def recognises(path: pathlib.Path) -> bool:
    return (path / "sae.json").is_file() and (path / "sae.safetensors").is_file()


def write(sae: SAE, directory: pathlib.Path, about: dict) -> None:
    arrays = {name: np.asarray(value) for name, value in sae.parameters().items()}
    # Python's numbers stay numbers: float64, as the run had them.
    arrays |= {name: np.asarray(getattr(sae, name)) for name in _SCALES}
    safetensors.numpy.save_file(arrays, directory / "sae.safetensors")
    values = {
        "format": "sae_jax",
        "version": _VERSION,
        "config": dataclasses.asdict(sae.config),
        "about": about,
    }
    (directory / "sae.json").write_text(json.dumps(values, indent=1) + "\n")


def read(directory: pathlib.Path) -> SAE:
    file = directory / "sae.json"
    values = read_json(file)
    if values.get("format") != "sae_jax" or values.get("version") != _VERSION:
        raise UserError(
            f"{file}: format {values.get('format')!r}, version {values.get('version')!r}; "
            f"this sae_jax reads its own format of version {_VERSION}"
        )
    config = from_dict(values.get("config"), SAEConfig, f"{file}: ")
    if config.architecture not in ARCHITECTURES:
        raise UserError(f"{file}: unknown architecture {config.architecture!r}")
    tensors = read_safetensors(directory / "sae.safetensors")
    check_shapes(tensors, _shapes(config), directory / "sae.safetensors")
    scales = [tensors[name] if tensors[name].ndim else tensors[name].item() for name in _SCALES]
    parameters = {n: jnp.asarray(a) for n, a in tensors.items() if n not in _SCALES}
    return ARCHITECTURES[config.architecture](config, parameters, *scales)


def about(directory: pathlib.Path) -> dict:
    return read_json(directory / "sae.json").get("about", {})


def _shapes(config: SAEConfig) -> dict[str, tuple[int, ...]]:
    n, d_in, d_out = config.d_sae, config.d_in, config.d_out
    scale = (d_in,) if config.kind == "crosscoder" else ()
    shapes = {"w_enc": (d_in, n), "w_dec": (n, d_out), "b_dec": (d_out,)}
    shapes |= dict.fromkeys(ARCHITECTURES[config.architecture].fresh_latent(config), (n,))
    if config.kind == "skip_transcoder":
        shapes["w_skip"] = (d_in, d_out)
    return shapes | dict.fromkeys(_SCALES, scale)
