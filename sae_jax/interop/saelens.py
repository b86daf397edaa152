"""SAELens' folders (6.x): cfg.json and sae_weights.safetensors, read without torch.

SAELens computes `latents = f((x - b_dec) @ W_enc + b_enc)`, `x_hat = latents @ W_dec + b_dec`,
with x - b_dec only where `apply_b_dec_to_input`. Our top-k SAE has that field too; for a ReLU SAE
b_dec is folded, b_enc' = b_enc - b_dec @ W_enc. A top-k SAE with `rescale_acts_by_decoder_norm`
ranks pre-activations times the norms of the decoder's rows and divides the kept ones by them
again: the norms go into W_enc and b_enc, and the decoder's rows get norm 1. Either way it is the
same function to rounding.
"""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from sae_jax import paths
from sae_jax.config import SAEConfig, UserError
from sae_jax.lm.text import read_json
from sae_jax.sae import ARCHITECTURES, SAE, resolve

ARCHITECTURE_NAMES = {"standard": "relu", "topk": "topk"}
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")

_SITES = {  # hook names: TransformerLens', and modules of Hugging Face's decoders
    r"blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)": r"\2.\1",
    r"blocks\.(\d+)\.mlp\.hook_post": r"mlp_act.\1",
    r"(?:model\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)": r"resid_post.\1",
}


def is_saelens(directory) -> bool:
    """Of local directories."""
    if paths.is_remote(directory):
        return False
    directory = pathlib.Path(directory)
    return (directory / "cfg.json").is_file() and (directory / "sae_weights.safetensors").is_file()


def read_saelens(directory) -> SAE:
    """The SAE in `directory`, in float32, as the same function of x.

    Raises UserError, naming the field or the tensor, for an architecture that is not implemented,
    a top-k SAE without k (SAELens would silently take 100), a run-time normalisation of the
    inputs, a reshaping hook, and tensors that are missing, additional or of another shape.
    """
    directory = pathlib.Path(directory)
    file = directory / "cfg.json"
    cfg = read_json(file)
    d_in, d_sae = (_whole_number(cfg, name, file) for name in ("d_in", "d_sae"))
    config = _config(cfg, d_sae, file)
    for name in ("normalize_activations", "reshape_activations"):
        if cfg.get(name, "none") != "none":
            raise UserError(
                f"{file}: {name} {cfg[name]!r} happens at run time in SAELens; fold it "
                'into the weights there, so that the field reads "none"'
            )
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    tensors = _read_tensors(directory / "sae_weights.safetensors", shapes)
    w_enc, w_dec, b_enc, b_dec = (tensors[name] for name in _TENSORS)
    if _subtracts_b_dec(cfg) and not config.apply_b_dec_to_input:
        b_enc = b_enc - b_dec @ w_enc
    if cfg.get("rescale_acts_by_decoder_norm", False):
        norms = np.linalg.norm(w_dec, axis=1)
        w_enc, b_enc = w_enc * norms, b_enc * norms
        w_dec = w_dec / np.where(norms > 0, norms, 1.0)[:, None]
    parameters = {"w_enc": w_enc, "w_dec": w_dec, "b_enc": b_enc, "b_dec": b_dec}
    return ARCHITECTURES[config.architecture](
        resolve(config, d_in),
        {name: jnp.asarray(value, jnp.float32) for name, value in parameters.items()},
    )


def saelens_site(directory) -> str | None:
    """Our name of the site that the SAE was trained on, where its cfg.json says so in a way that
    has a counterpart here."""
    if paths.is_remote(directory):
        return None
    metadata = read_json(pathlib.Path(directory) / "cfg.json").get("metadata", {})
    hook = metadata.get("hook_name") or ""
    for pattern, site in _SITES.items():
        if match := re.fullmatch(pattern, hook):
            return match.expand(site)
    return None


def _config(cfg: dict, d_sae: int, file: pathlib.Path) -> SAEConfig:
    name = cfg.get("architecture")
    if name not in ARCHITECTURE_NAMES:
        known = ", ".join(ARCHITECTURE_NAMES)
        raise UserError(f"{file}: architecture {name!r} cannot be read yet; known are {known}")
    architecture = ARCHITECTURE_NAMES[name]
    fields = {"architecture": architecture, "d_sae": d_sae, "normalize": "none"}
    if architecture == "topk":
        fields["k"] = _whole_number(cfg, "k", file)
        fields["apply_b_dec_to_input"] = _subtracts_b_dec(cfg)
        # Without the rescaling SAELens ranks raw pre-activations, whatever the decoder's norms.
        fields["unit_norm_decoder"] = bool(cfg.get("rescale_acts_by_decoder_norm", False))
    return SAEConfig(**fields)


def _subtracts_b_dec(cfg: dict) -> bool:
    return bool(cfg.get("apply_b_dec_to_input", True))  # SAELens' own default


def _whole_number(cfg: dict, name: str, file: pathlib.Path) -> int:
    value = cfg.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        missing = "is missing" if value is None else f"is {value!r}"
        raise UserError(f"{file}: {name} {missing}; it must be a whole number above 0")
    return value


def _read_tensors(file: pathlib.Path, shapes: dict[str, tuple]) -> dict[str, np.ndarray]:
    """Float64, so that folding rounds once."""
    if not file.is_file():
        raise UserError(f"no {file.name} in {file.parent}")
    try:
        tensors = safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} is damaged or truncated: {error}") from None
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise UserError(f"{file} has no tensor {missing[0]}")
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise UserError(f"{file} has a tensor {extra[0]} that its cfg.json does not explain")
    for name, shape in shapes.items():
        found = tensors[name].shape
        if found != shape:
            raise UserError(f"{file}: {name} has shape {found}; cfg.json says {shape}")
    return {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
