"""Reads and writes the format of SAELens 6: cfg.json and sae_weights.safetensors.

SAEDashboard, Neuronpedia and SAEBench read this format too. SAELens computes

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

import pathlib
import re

import numpy as np
import safetensors.numpy

from sae_jax.errors import UserError
from sae_jax.interop.weights import (
    Arrays,
    check_shapes,
    float32,
    make_sae,
    parameters_for,
)
from sae_jax.json_files import read_json
from sae_jax.paths import as_json
from sae_jax.sae import ARCHITECTURES, SAE, SAEConfig
from sae_jax.sae.files import read_safetensors

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
_RENAMED |= {"activation_fn_str": "activation_fn"}
_ROUNDING = 1e-6  # of a norm of 1, in float32

_METADATA = (
    "model_name",
    "hook_name",
    "hook_layer",
    "dataset_path",
    "context_size",
    "prepend_bos",
    "l0",
)
_SITES = {  # hook names: TransformerLens', and modules of Hugging Face's decoders
    r"blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)": r"\2.\1",
    r"blocks\.(\d+)\.mlp\.hook_post": r"mlp_act.\1",
    r"blocks\.(\d+)\.attn\.hook_z": r"z.\1",
    r"(?:model\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)": r"resid_post.\1",
}


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
    d_in, d_sae = (_whole_number(cfg, name, file) for name in ("d_in", "d_sae"))
    name, kind = _architecture(cfg, file)
    d_out = d_in if kind == "autoencoder" else _whole_number(cfg, "d_out", file)
    # hook_z: the heads side by side, which is how our site z has them.
    for field, known in (
        ("normalize_activations", ("none",)),
        ("reshape_activations", ("none", "hook_z")),
    ):
        if cfg.get(field, "none") not in known:
            raise UserError(
                f"{file}: {field} {cfg[field]!r} happens at run time in SAELens; fold it "
                'into the weights there, so that the field reads "none"'
            )
    names = _parameter_names(cfg["architecture"])
    ours = {"w_enc": (d_in, d_sae), "w_dec": (d_sae, d_out), "b_dec": (d_out,)}
    ours |= {"w_skip": (d_out, d_in)}
    shapes = {theirs: ours.get(name, (d_sae,)) for theirs, name in names.items()}
    tensors = read_safetensors(directory / _WEIGHTS)
    if np.allclose(tensors.get("scaling_factor", 0), 1):  # of early versions; others are refused
        del tensors["scaling_factor"]
    check_shapes(tensors, shapes, directory / _WEIGHTS)
    arrays = {name: tensors[theirs] for theirs, name in names.items()}
    if "w_skip" in arrays:
        arrays["w_skip"] = arrays["w_skip"].T
    config = ARCHITECTURES[name].Config(
        kind=kind, d_sae=d_sae, normalize="none", **_fields(name, kind, cfg, file)
    )
    return _equivalent_sae(config, arrays, cfg, d_in, d_out)


def read_provenance(directory: pathlib.Path) -> dict:
    """Returns what a folder's metadata says of the SAE's origin, by the names that we export.

    The names are those that `interop.read_provenance` lists. What the metadata lacks is left out.
    """
    metadata = _read_cfg(directory).get("metadata") or {}
    values = {name: metadata.get(name) for name in _METADATA} | {"site": site(directory)}
    return {name: value for name, value in values.items() if value is not None}


def site(directory: pathlib.Path) -> str | None:
    """Returns the site that the SAE was trained on, such as resid_post.3.

    It is None if cfg.json names no hook, or one that `site_of` does not know.
    """
    return site_of((_read_cfg(directory).get("metadata") or {}).get("hook_name") or "")


def site_of(hook: str) -> str | None:
    """Returns the site of a hook that SAELens names, such as blocks.3.hook_resid_post.

    It is None for a hook that is no site of sae_jax.
    """
    for pattern, ours in _SITES.items():
        if match := re.fullmatch(pattern, hook):
            return match.expand(ours)
    return None


def _read_cfg(directory: pathlib.Path) -> dict:
    """Returns cfg.json with the fields of SAELens 6, also if an earlier version wrote it.

    Source: handle_pre_6_0_config of SAELens.
    """
    cfg = read_json(directory / "cfg.json")
    if "metadata" in cfg:
        return cfg
    cfg = {_RENAMED.get(name, name): value for name, value in cfg.items()}
    chosen = cfg.get("activation_fn_kwargs") or {}
    picks = cfg.get("activation_fn") == "topk" and chosen.get("k") is not None
    if picks:
        cfg |= {"architecture": "topk", "k": chosen["k"]}
    elif cfg.get("activation_fn", "relu") != "relu":
        cfg["architecture"] = cfg["activation_fn"]  # which is then refused by this name
    normalized = cfg.get("normalize_activations")
    if normalized is None or isinstance(normalized, bool):
        cfg["normalize_activations"] = "expected_average_only_in" if normalized else "none"
    metadata = {name: cfg[name] for name in _METADATA if name in cfg}
    return {"architecture": "standard", "metadata": metadata} | cfg


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


def _architecture(cfg: dict, file: pathlib.Path) -> tuple[str, str]:
    """Returns the name of our architecture, and the kind."""
    theirs = cfg.get("architecture")
    if theirs in _READS:
        return _READS[theirs], "autoencoder"
    transcoders = {their: ours for ours, their in EXPRESSES.items() if "transcoder" in their}
    if theirs in transcoders:
        jumps = theirs.startswith("jumprelu")
        return "jumprelu" if jumps else "relu", transcoders[theirs][1]
    known = ", ".join([*_READS, *transcoders])
    raise UserError(f"{file}: architecture {theirs!r} cannot be read; known are {known}")


def _fields(name: str, kind: str, cfg: dict, file: pathlib.Path) -> dict:
    """Returns the fields of our config that differ between SAEs of an architecture and kind."""
    fields = {}
    if name != "relu" and kind == "autoencoder":
        fields["apply_b_dec_to_input"] = _subtracts_b_dec(cfg)
    if name == "topk":
        fields["k"] = _whole_number(cfg, "k", file)
        # Without the rescaling SAELens ranks raw pre-activations, whatever the decoder's norms.
        fields["unit_norm_decoder"] = bool(cfg.get("rescale_acts_by_decoder_norm", False))
    if name == "jumprelu":
        fields["unit_norm_decoder"] = False
    return fields


def _equivalent_sae(config: SAEConfig, arrays: Arrays, cfg: dict, d_in: int, d_out: int) -> SAE:
    subtracts = _subtracts_b_dec(cfg)
    if subtracts and not config.apply_b_dec_to_input and config.kind == "autoencoder":
        arrays["b_enc"] = arrays["b_enc"] - arrays["b_dec"] @ arrays["w_enc"]
    if cfg.get("rescale_acts_by_decoder_norm", False):
        norms = np.linalg.norm(arrays["w_dec"], axis=1)
        norms = np.where(np.abs(norms - 1) > _ROUNDING, norms, 1.0)  # what is unit stays the same
        arrays["w_enc"], arrays["b_enc"] = arrays["w_enc"] * norms, arrays["b_enc"] * norms
        arrays["w_dec"] = arrays["w_dec"] / np.where(norms > 0, norms, 1.0)[:, None]
    sae = make_sae(config, d_in, d_out, arrays)
    return sae.fold() if config.architecture == "gated" else sae  # ours has unit rows only


def _subtracts_b_dec(cfg: dict) -> bool:
    return bool(cfg.get("apply_b_dec_to_input", True))  # SAELens' own default


def _whole_number(cfg: dict, name: str, file: pathlib.Path) -> int:
    value = cfg.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        missing = "is missing" if value is None else f"is {value!r}"
        raise UserError(f"{file}: {name} {missing}; it must be a whole number above 0")
    return value
