"""Reads and writes the format of SAELens: cfg.json and sae_weights.safetensors.

What is written is the format of version 6; those of earlier versions are read too. SAEDashboard,
Neuronpedia and SAEBench read this format. SAELens computes

    latents = f((x - b_dec) @ W_enc + b_enc)
    x_hat = latents @ W_dec + b_dec

with x - b_dec only where `apply_b_dec_to_input` is set. What is read and what is written are the
same function of x up to rounding. Three things differ from ours:

- Where our architecture never takes b_dec from x, it is folded: b_enc' = b_enc - b_dec @ W_enc.
- A top-k SAE with `rescale_acts_by_decoder_norm` ranks pre-activations times the norms of the
  decoder's rows, and divides the kept ones by the norms again. Here the norms are multiplied into
  W_enc and b_enc, and the decoder's rows get norm 1.
- BatchTopK has no inference form of its own. It is written as SAELens writes it, as a JumpReLU with
  the estimated threshold.
"""

import dataclasses
import pathlib
import re
from typing import Annotated, Any

import msgspec
import numpy as np
import safetensors.numpy

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.interop.weights import (
    check_shapes,
    float32,
    make_sae,
    parameters_for,
)
from sae_jax.json_files import checked, read_json
from sae_jax.numpy_files import Arrays
from sae_jax.paths import as_json
from sae_jax.sae import ARCHITECTURES, SAE, SAEConfig
from sae_jax.sae.files import naming, read_safetensors

_AUTOENCODERS = {
    "relu": "standard",
    "relu_l1_unit": "standard",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "gated": "gated",
}
_JUMPING = ("jumprelu", "batchtopk", "matryoshka")
EXPRESSES = {(name, "autoencoder"): theirs for name, theirs in _AUTOENCODERS.items()}
for _kind in ("transcoder", "skip_transcoder"):
    EXPRESSES |= {(name, _kind): _kind for name in ("relu", "relu_l1_unit")}
    EXPRESSES |= {(name, _kind): f"jumprelu_{_kind}" for name in _JUMPING}
WHY_NOT = "it has transcoders with ReLU or thresholds only, and no crosscoders"

USAGE = """import torch
from sae_lens import SAE

sae = SAE.load_from_disk(path)
x = torch.randn(4, $d_in)  # stands for activations at $site
with torch.no_grad():
    latents = sae.encode(x)
    x_hat = sae(x)
"""

_READS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
_GATED = {"b_enc": "b_gate", "b_mag": "b_mag", "r_mag": "r_mag"}
_VERSION = "6.54.12"  # whose format this is
_WEIGHTS = "sae_weights.safetensors"
FILES = ("cfg.json", _WEIGHTS)
_RENAMED = {"hook_point": "hook_name", "hook_point_layer": "hook_layer"}
_RENAMED |= {"hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_ROUNDING = 1e-6  # of a norm of 1, in float32

_AboveZero = Annotated[int, msgspec.Meta(ge=1)]


@dataclasses.dataclass(frozen=True)
class _Metadata:
    """Describes what we use of the metadata in cfg.json: where the SAE was trained."""

    model_name: str | None = None
    hook_name: str | None = None
    hook_layer: int | None = None
    hook_head_index: int | None = None
    dataset_path: str | None = None
    context_size: int | None = None
    prepend_bos: bool | None = None
    l0: float | None = None


@dataclasses.dataclass(frozen=True)
class _Cfg:
    """Describes cfg.json of SAELens 6, of which a field that is left out has SAELens' default."""

    architecture: str
    d_in: _AboveZero
    d_sae: _AboveZero
    d_out: _AboveZero | None = None
    k: _AboveZero | None = None
    apply_b_dec_to_input: bool | None = True
    rescale_acts_by_decoder_norm: bool | None = False
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    metadata: _Metadata = _Metadata()


@dataclasses.dataclass(frozen=True)
class _AnyCfg:
    """Describes the fields by which versions differ, under the names of `_RENAMED`."""

    sae_lens_version: str | None = None
    metadata: dict[str, Any] | None = None
    activation_fn: str | None = None
    activation_fn_kwargs: dict[str, Any] | None = None
    normalize_activations: bool | str | None = None


_LAYER = r"(?:model\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)"  # of Hugging Face's decoders


def recognises(path: pathlib.Path) -> bool:
    """Returns whether `path` is a folder of SAELens'."""
    return all((path / name).is_file() for name in FILES)


def write(sae: SAE, directory: pathlib.Path, provenance: dict) -> None:
    """Writes a folded SAE to an existing folder, with its provenance as SAELens' metadata."""
    config = sae.config
    architecture = EXPRESSES[config.architecture, config.kind]
    subtracts = bool(config.apply_b_dec_to_input)
    arrays = float32(parameters_for(sae, subtracts))
    names = _parameter_names(architecture)
    if "W_skip" in names:
        arrays["w_skip"] = np.ascontiguousarray(arrays["w_skip"].T)
    tensors = {theirs: arrays[ours] for theirs, ours in names.items()}
    safetensors.numpy.save_file(tensors, directory / _WEIGHTS)
    cfg = {
        "architecture": architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": subtracts,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if _is_hook_z(provenance.get("hook_name")) else "none",
        **(_top_k_fields(config.k, arrays["w_dec"]) if architecture == "topk" else {}),
        **({"d_out": config.d_out} if "transcoder" in architecture else {}),
        "metadata": {
            "sae_lens_version": _VERSION,
            "sae_lens_training_version": None,
            "training_architecture": config.architecture,
            "trained_with": "sae_jax",
            "hook_head_index": None,
            **provenance,
        },
    }
    (directory / "cfg.json").write_text(as_json(cfg))


def _top_k_fields(k: int, w_dec: np.ndarray) -> dict:
    """Returns the fields of cfg.json that only a top-k SAE has.

    With decoder rows of norm 1 the rescaling changes nothing, but SAEDashboard refuses an SAE
    without it.
    """
    unit = bool(np.allclose(np.linalg.norm(w_dec, axis=1), 1, atol=_ROUNDING))
    return {"k": k, "rescale_acts_by_decoder_norm": unit}


def read(directory: pathlib.Path) -> SAE:
    """Returns the SAE in a folder of SAELens', in float32, as the same function of x.

    Raises UserError, which names the field or the tensor, for an architecture that is not
    implemented, for a top-k SAE without k (for which SAELens takes 100), for a normalisation of the
    inputs at run time, for an unknown reshaping, and for tensors that are missing, additional or of
    another shape.
    """
    file = directory / "cfg.json"
    cfg = _read_cfg(directory)
    name, kind = _architecture(cfg, file)
    d_out = cfg.d_in if kind == "autoencoder" else _needed(cfg, "d_out", file)
    # hook_z: the heads side by side, which is how our site z has them.
    for field, known in (
        ("normalize_activations", ("none",)),
        ("reshape_activations", ("none", "hook_z")),
    ):
        if getattr(cfg, field) not in known:
            raise UserError(
                f"{file}: {field} {getattr(cfg, field)!r} happens at run time in SAELens; fold it "
                'into the weights there, so that the field reads "none"'
            )
    names = _parameter_names(cfg.architecture)
    ours = {"w_enc": (cfg.d_in, cfg.d_sae), "w_dec": (cfg.d_sae, d_out), "b_dec": (d_out,)}
    ours |= {"w_skip": (d_out, cfg.d_in)}
    shapes = {theirs: ours.get(name, (cfg.d_sae,)) for theirs, name in names.items()}
    tensors = read_safetensors(directory / _WEIGHTS)
    if np.allclose(tensors.get("scaling_factor", 0), 1):  # of early versions; others are refused
        del tensors["scaling_factor"]
    tensors = check_shapes(tensors, shapes, directory / _WEIGHTS)
    arrays = {name: tensors[theirs] for theirs, name in names.items()}
    if "w_skip" in arrays:
        arrays["w_skip"] = arrays["w_skip"].T
    fields = _fields(name, kind, cfg, file)
    with naming(file):
        config = ARCHITECTURES[name].Config(kind=kind, d_sae=cfg.d_sae, normalize="none", **fields)
    return _equivalent_sae(config, arrays, cfg, d_out)


def read_provenance(directory: pathlib.Path) -> dict:
    """Returns what a folder's metadata says of the SAE's origin, by the names that we export.

    The names are those that `interop.read_provenance` lists. What the metadata lacks is left out.
    """
    values = dataclasses.asdict(_read_cfg(directory).metadata)
    del values["hook_head_index"]
    values |= {"site": site(directory)}
    return {name: value for name, value in values.items() if value is not None}


def site(directory: pathlib.Path) -> str | None:
    """Returns the site that the SAE was trained on, such as resid_post.3.

    It is None if cfg.json names no hook, one that `site_of` does not know, or a single head.
    """
    metadata = _read_cfg(directory).metadata
    return None if metadata.hook_head_index is not None else site_of(metadata.hook_name or "")


def site_of(hook: str) -> str | None:
    """Returns the site of a hook that SAELens names, such as blocks.3.hook_resid_post.

    It is None for a hook that is no site of sae_jax.
    """
    if layer := re.fullmatch(_LAYER, hook):
        return f"resid_post.{layer[1]}"
    return lm.site_of_hook(hook)


def _read_cfg(directory: pathlib.Path) -> _Cfg:
    """Returns cfg.json as SAELens 6 has it, also if an earlier version wrote it.

    Source: handle_config_defaulting and handle_pre_6_0_config of SAELens.
    """
    file = directory / "cfg.json"
    values = read_json(file)
    renamed = {_RENAMED.get(name, name): value for name, value in values.items()}
    old = checked(renamed, _AnyCfg, file)
    version = old.sae_lens_version or checked(old.metadata or {}, _AnyCfg, file).sae_lens_version
    if version and (major := re.match(r"\d+", version)) and int(major[0]) >= 6:
        return checked(values, _Cfg, file)
    fields = {"architecture": "standard", "apply_b_dec_to_input": True} | renamed
    k = (old.activation_fn_kwargs or {}).get("k")
    if old.activation_fn == "topk" or fields["architecture"] == "topk":
        fields |= {"architecture": "topk", "k": fields.get("k") if k is None else k}
    elif old.activation_fn not in (None, "relu"):
        fields["architecture"] = old.activation_fn  # which is then refused by this name
    if not isinstance(old.normalize_activations, str):
        fields["normalize_activations"] = (
            "expected_average_only_in" if old.normalize_activations else "none"
        )
    names = [field.name for field in dataclasses.fields(_Metadata)]
    fields["metadata"] = (old.metadata or {}) | {n: renamed[n] for n in names if n in renamed}
    return checked(fields, _Cfg, file)


def _is_hook_z(hook: str | None) -> bool:
    return bool(hook) and hook.endswith("attn.hook_z")


def _parameter_names(architecture: str) -> dict[str, str]:
    """Returns our name of each tensor of SAELens' architecture, by SAELens' name."""
    names = {"W_enc": "w_enc", "W_dec": "w_dec", "b_dec": "b_dec"}
    if architecture == "gated":
        return names | {theirs: ours for ours, theirs in _GATED.items()}
    names["b_enc"] = "b_enc"
    if architecture.startswith("jumprelu"):
        names["threshold"] = "threshold"
    if architecture.endswith("skip_transcoder"):
        names["W_skip"] = "w_skip"
    return names


def _architecture(cfg: _Cfg, file: pathlib.Path) -> tuple[str, str]:
    """Returns the name of our architecture, and the kind."""
    theirs = cfg.architecture
    if theirs in _READS:
        return _READS[theirs], "autoencoder"
    transcoders = {their: ours for ours, their in EXPRESSES.items() if "transcoder" in their}
    if theirs in transcoders:
        jumps = theirs.startswith("jumprelu")
        return "jumprelu" if jumps else "relu", transcoders[theirs][1]
    known = ", ".join([*_READS, *transcoders])
    raise UserError(f"{file}: architecture {theirs!r} cannot be read; known are {known}")


def _fields(name: str, kind: str, cfg: _Cfg, file: pathlib.Path) -> dict:
    """Returns the fields of our config that differ between SAEs of an architecture and kind."""
    fields = {}
    if name != "relu" and kind == "autoencoder":
        fields["apply_b_dec_to_input"] = bool(cfg.apply_b_dec_to_input)
    if name == "topk":
        fields["k"] = _needed(cfg, "k", file)
        # Without the rescaling SAELens ranks raw pre-activations, whatever the decoder's norms.
        fields["unit_norm_decoder"] = bool(cfg.rescale_acts_by_decoder_norm)
    if name == "jumprelu":
        fields["unit_norm_decoder"] = False
    return fields


def _equivalent_sae(config: SAEConfig, arrays: Arrays, cfg: _Cfg, d_out: int) -> SAE:
    subtracts = bool(cfg.apply_b_dec_to_input)
    if subtracts and not config.apply_b_dec_to_input and config.kind == "autoencoder":
        arrays["b_enc"] = arrays["b_enc"] - arrays["b_dec"] @ arrays["w_enc"]
    if cfg.rescale_acts_by_decoder_norm and config.architecture == "topk":
        norms = np.linalg.norm(arrays["w_dec"], axis=1)
        norms = np.where(np.abs(norms - 1) > _ROUNDING, norms, 1.0)  # what is unit stays the same
        arrays["w_enc"], arrays["b_enc"] = arrays["w_enc"] * norms, arrays["b_enc"] * norms
        arrays["w_dec"] = arrays["w_dec"] / np.where(norms > 0, norms, 1.0)[:, None]
    sae = make_sae(config, cfg.d_in, d_out, arrays)
    return sae.fold() if config.architecture == "gated" else sae  # ours has unit rows only


def _needed(cfg: _Cfg, name: str, file: pathlib.Path) -> int:
    value = getattr(cfg, name)
    if value is None:
        raise UserError(f"{file}: {name} is missing; it must be a whole number above 0")
    return value
