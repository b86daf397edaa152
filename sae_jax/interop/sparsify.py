"""Reads and writes the format of EleutherAI's sparsify: cfg.json and sae.safetensors.

Its SAEs compute latents = TopK(ReLU((x - b_dec) @ encoder.weight.T + encoder.bias)). A transcoder
takes no b_dec from x, and adds x @ W_skip.T to its output if it has a skip.
"""

import dataclasses
import pathlib
from typing import Annotated, Literal

import msgspec
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
from sae_jax.json_files import checked, read_json
from sae_jax.paths import as_json
from sae_jax.sae import SAE, TopKConfig
from sae_jax.sae.files import naming, read_safetensors

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


@dataclasses.dataclass(frozen=True)
class _Cfg:
    """Describes cfg.json. A field that is left out has sparsify's default, but k is needed."""

    k: Annotated[int, msgspec.Meta(ge=1)]
    d_in: int | None = None
    num_latents: int = 0  # however many there are
    activation: Literal["topk"] = "topk"
    normalize_decoder: bool = True
    multi_topk: bool = False
    skip_connection: bool = False
    transcode: bool = False


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
    cfg = checked(read_json(file), _Cfg, file)
    tensors = read_safetensors(directory / _FILE)
    n, d = matrix_shape(tensors, "encoder.weight", directory / _FILE)
    if cfg.d_in not in (None, d) or cfg.num_latents not in (0, n):
        raise UserError(
            f"{file} says d_in {cfg.d_in}, num_latents {cfg.num_latents}, but encoder.weight is "
            f"{(n, d)}"
        )
    shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "W_dec": (n, d), "b_dec": (d,)}
    kind = "transcoder" if cfg.transcode else "autoencoder"
    if cfg.skip_connection:
        shapes["W_skip"], kind = (d, d), "skip_transcoder"
    arrays = check_shapes(tensors, shapes, directory / _FILE)
    parameters = {
        "w_enc": arrays["encoder.weight"].T,
        "b_enc": arrays["encoder.bias"],
        "w_dec": arrays["W_dec"],
        "b_dec": arrays["b_dec"],
    }
    if cfg.skip_connection:
        parameters["w_skip"] = arrays["W_skip"].T
        if not cfg.transcode:  # b_dec is taken from x, but not before the skip
            parameters["b_enc"] = parameters["b_enc"] - arrays["b_dec"] @ parameters["w_enc"]
    with naming(file):
        config = TopKConfig(
            kind=kind,
            d_sae=n,
            k=cfg.k,
            multi_topk=cfg.multi_topk,
            unit_norm_decoder=cfg.normalize_decoder,
            normalize="none",
        )
    return make_sae(config, d, d, parameters)
