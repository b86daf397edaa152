"""Reads and writes the format of EleutherAI's sparsify: cfg.json and sae.safetensors.

Its SAEs compute latents = TopK(ReLU((x - b_dec) @ encoder.weight.T + encoder.bias)). A transcoder
takes no b_dec from x, and adds x @ W_skip.T to its output if it has a skip.
"""

import pathlib

import numpy as np
import safetensors.numpy

from sae_jax.errors import UserError
from sae_jax.interop.weights import (
    check_shapes,
    float32,
    make_sae,
    matrix_shape,
    parameters_for,
)
from sae_jax.json_files import read_json
from sae_jax.paths import as_json
from sae_jax.sae import SAE, TopKConfig
from sae_jax.sae.files import read_safetensors

EXPRESSES = {("topk", kind): "topk" for kind in ("autoencoder", "transcoder", "skip_transcoder")}
WHY_NOT = "it has TopK only, with inputs and outputs of one width"
USAGE = """import torch
from sparsify import SparseCoder

sae = SparseCoder.load_from_disk(path)
x = torch.randn(4, $d_in)  # stands for activations at $site
with torch.no_grad():
    picked = sae.encode(x)
    latents = torch.zeros(len(x), sae.num_latents)
    latents.scatter_(1, picked.top_indices, picked.top_acts)
    x_hat = sae(x).sae_out
"""
_FILE = "sae.safetensors"
FILES = ("cfg.json", _FILE)


def recognises(path: pathlib.Path) -> bool:
    """Returns whether `path` is a folder of sparsify's."""
    return all((path / name).is_file() for name in FILES)


def write(sae: SAE, directory: pathlib.Path, provenance: dict) -> None:
    """Writes a folded SAE to an existing folder. The format has no place for its provenance.

    Raises UserError if inputs and outputs differ in width.
    """
    del provenance
    config = sae.config
    if config.d_in != config.d_out:
        raise UserError(
            f"sparsify has no SAE whose inputs ({config.d_in}) and outputs ({config.d_out}) differ "
            "in width"
        )
    transcodes = config.kind != "autoencoder"
    arrays = float32(parameters_for(sae, subtracts_b_dec=not transcodes))
    tensors = {
        "encoder.weight": np.ascontiguousarray(arrays["w_enc"].T),
        "encoder.bias": arrays["b_enc"],
        "W_dec": arrays["w_dec"],
        "b_dec": arrays["b_dec"],
    }
    if "w_skip" in arrays:
        tensors["W_skip"] = np.ascontiguousarray(arrays["w_skip"].T)
    safetensors.numpy.save_file(tensors, directory / _FILE)
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, config.d_sae // config.d_in),
        "normalize_decoder": bool(config.unit_norm_decoder),
        "num_latents": config.d_sae,
        "k": config.k,
        "multi_topk": bool(config.multi_topk),
        "skip_connection": "w_skip" in arrays,
        "transcode": transcodes,
        "d_in": config.d_in,
    }
    (directory / "cfg.json").write_text(as_json(cfg))


def read(directory: pathlib.Path) -> SAE:
    """Returns the SAE in a folder of sparsify's, in float32.

    Raises UserError for an activation other than topk, for a k or widths that are wrong, and for
    tensors that are missing, additional or of another shape.
    """
    file = directory / "cfg.json"
    cfg = read_json(file)
    if cfg.get("activation", "topk") != "topk":
        raise UserError(f"{file}: activation {cfg['activation']!r} is not known here; only 'topk'")
    if not isinstance(cfg.get("k"), int) or cfg["k"] < 1:
        raise UserError(f"{file}: k is {cfg.get('k')!r}; it must be a whole number above 0")
    tensors = read_safetensors(directory / _FILE)
    n, d = matrix_shape(tensors, "encoder.weight", directory / _FILE)
    if cfg.get("d_in", d) != d or cfg.get("num_latents") not in (None, 0, n):
        raise UserError(
            f"{file} says d_in {cfg.get('d_in')}, num_latents {cfg.get('num_latents')}, but "
            f"encoder.weight is {(n, d)}"
        )
    shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "W_dec": (n, d), "b_dec": (d,)}
    kind = "transcoder" if cfg.get("transcode") else "autoencoder"
    if cfg.get("skip_connection"):
        shapes["W_skip"], kind = (d, d), "skip_transcoder"
    arrays = check_shapes(tensors, shapes, directory / _FILE)
    parameters = {
        "w_enc": arrays["encoder.weight"].T,
        "b_enc": arrays["encoder.bias"],
        "w_dec": arrays["W_dec"],
        "b_dec": arrays["b_dec"],
    }
    if "W_skip" in arrays:
        parameters["w_skip"] = arrays["W_skip"].T
    config = TopKConfig(
        kind=kind,
        d_sae=n,
        k=cfg["k"],
        multi_topk=bool(cfg.get("multi_topk")),
        unit_norm_decoder=bool(cfg.get("normalize_decoder", True)),
        normalize="none",
    )
    return make_sae(config, d, d, parameters)
