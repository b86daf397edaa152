"""dictionary_learning: ae.pt, a state dict that torch.save wrote, and config.json.

Each class there has its own names and conventions: whether b_dec is taken from x, and which way the
matrices lie (nn.Linear's weights are (out, in)).
"""

import dataclasses
import itertools
import json
import pathlib

import numpy as np

from sae_jax.errors import UserError
from sae_jax.interop.weights import (
    check_shapes,
    float32,
    import_torch,
    make_sae,
    matrix_shape,
    read_torch,
    without_shift,
)
from sae_jax.json_files import read_json
from sae_jax.sae import ARCHITECTURES, SAE


@dataclasses.dataclass(frozen=True)
class _Class:
    """One of their classes: our architecture, and their name of each of our parameters."""

    architecture: str
    names: dict[str, str]
    subtracts: bool  # b_dec from x
    unit_norm: bool = True
    has_k: bool = False
    one_threshold: bool = False

    def is_turned(self, name: str) -> bool:
        """Whether a matrix lies the other way there."""
        return self.names[name].endswith(".weight")


_LINEAR = {"w_enc": "encoder.weight", "w_dec": "decoder.weight"}
_PLAIN = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
_PICKING = _LINEAR | {"b_enc": "encoder.bias", "b_dec": "b_dec"}
_CLASSES = {
    "AutoEncoderNew": _Class(
        "relu",
        _LINEAR | {"b_enc": "encoder.bias", "b_dec": "decoder.bias"},
        subtracts=False,
        unit_norm=False,
    ),
    "AutoEncoder": _Class(
        "relu_l1_unit", _LINEAR | {"b_enc": "encoder.bias", "b_dec": "bias"}, subtracts=True
    ),
    "GatedAutoEncoder": _Class(
        "gated",
        _LINEAR
        | {"b_dec": "decoder_bias", "b_enc": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"},
        subtracts=True,
    ),
    "AutoEncoderTopK": _Class("topk", _PICKING, subtracts=True, has_k=True),
    "BatchTopKSAE": _Class(
        "batchtopk", _PICKING, subtracts=True, has_k=True, one_threshold=True
    ),
    "MatryoshkaBatchTopKSAE": _Class(
        "matryoshka", _PLAIN, subtracts=True, has_k=True, one_threshold=True
    ),
    "JumpReluAutoEncoder": _Class(
        "jumprelu", _PLAIN | {"threshold": "threshold"}, subtracts=False, unit_norm=False
    ),
}  # fmt: skip
EXPRESSES = {(c.architecture, "autoencoder"): name for name, c in _CLASSES.items()}
WHY_NOT = "it has autoencoders only"
FILES = ("config.json", "ae.pt")
USAGE = """import torch
from dictionary_learning.utils import load_dictionary

sae, _ = load_dictionary(path, device="cpu")
x = torch.randn(4, $d_in)  # stands for activations at $site
with torch.no_grad():
    latents = sae.encode(x)
    x_hat = sae.decode(latents)
"""


def recognises(path: pathlib.Path) -> bool:
    return all((path / name).is_file() for name in FILES)


def write(sae: SAE, directory: pathlib.Path, about: dict) -> None:
    torch = import_torch(directory / "ae.pt")
    config = sae.config
    name = EXPRESSES[config.architecture, "autoencoder"]
    kind = _CLASSES[name]
    arrays = float32(without_shift(sae, kind.subtracts))
    tensors = {
        theirs: np.ascontiguousarray(arrays[ours].T if kind.is_turned(ours) else arrays[ours])
        for ours, theirs in kind.names.items()
    }
    if kind.has_k:
        tensors["k"] = np.asarray(config.k, np.int32)
        tensors["threshold"] = np.float32(-1.0)  # its own mark of a threshold never estimated
    if kind.one_threshold:
        tensors["threshold"] = _the_threshold(arrays["threshold"], name)
    if name == "MatryoshkaBatchTopKSAE":
        tensors["group_sizes"] = np.diff([0, *config.prefix_widths]).astype(np.int64)
    torch.save(
        {n: torch.from_numpy(np.asarray(a)) for n, a in tensors.items()}, directory / "ae.pt"
    )
    trainer = {
        "dict_class": name,
        "activation_dim": config.d_in,
        "dict_size": config.d_sae,
        "k": config.k,
        "layer": about.get("hook_layer"),
        "lm_name": about.get("model_name"),
        "submodule_name": about.get("hook_name"),
    }
    values = {"trainer": trainer, "buffer": {"ctx_len": about.get("context_size")}}
    (directory / "config.json").write_text(json.dumps(values, indent=1) + "\n")


def read(directory: pathlib.Path) -> SAE:
    file = directory / "config.json"
    trainer = read_json(file).get("trainer") or {}
    name = trainer.get("dict_class")
    if name not in _CLASSES:
        raise UserError(
            f"{file}: trainer.dict_class {name!r} cannot be read; known are {', '.join(_CLASSES)}"
        )
    kind, file = _CLASSES[name], directory / "ae.pt"
    tensors = read_torch(file)
    encoder = kind.names["w_enc"]
    shape = matrix_shape(tensors, encoder, file)
    d, n = shape[::-1] if kind.is_turned("w_enc") else shape
    ours = {"w_enc": (d, n), "w_dec": (n, d), "b_dec": (d,)}
    shapes = {
        theirs: ours.get(name, (n,))[:: -1 if kind.is_turned(name) else 1]
        for name, theirs in kind.names.items()
    }
    fields = {}
    if kind.has_k:
        fields["k"] = _picked(tensors.pop("k", None), trainer.get("k"), directory)
        threshold = float(tensors.pop("threshold", -1.0))
    if name == "MatryoshkaBatchTopKSAE":
        sizes = np.asarray(tensors.pop("group_sizes", ()), np.int64).tolist()
        fields["prefix_widths"] = tuple(itertools.accumulate(sizes))
    arrays = check_shapes(tensors, shapes, file)
    parameters = {
        name: arrays[theirs].T if kind.is_turned(name) else arrays[theirs]
        for name, theirs in kind.names.items()
    }
    if kind.one_threshold:
        if threshold < 0:
            raise UserError(
                f"{file}: threshold is {threshold}, so it was never estimated, and without it the "
                f"latents of {name} depend on the batch"
            )
        parameters["threshold"] = np.full(n, threshold)
    if kind.architecture == "jumprelu":
        fields["apply_b_dec_to_input"] = False
    gated = kind.architecture == "gated"
    config = ARCHITECTURES[kind.architecture].Config(
        d_sae=n,
        unit_norm_decoder=kind.unit_norm and (gated or _has_unit_rows(parameters["w_dec"])),
        normalize="none",
        **fields,
    )
    sae = make_sae(config, d, d, parameters)
    return sae.fold() if gated else sae  # ours has unit rows only


def _the_threshold(thresholds: np.ndarray, name: str) -> np.ndarray:
    if not np.allclose(thresholds, thresholds[0], rtol=1e-6, atol=0):
        raise UserError(
            f"{name} of dictionary_learning has one threshold for all latents, and these differ "
            f"({thresholds.min():.4g} to {thresholds.max():.4g}): use --format=saelens"
        )
    return thresholds[0]


def _picked(k, told, directory: pathlib.Path) -> int:
    k = told if k is None else int(k)
    if not isinstance(k, int) or k < 1 or told not in (None, k):
        raise UserError(f"{directory}: k is {k!r} in ae.pt and {told!r} in config.json")
    return k


def _has_unit_rows(w_dec: np.ndarray) -> bool:
    return bool(np.allclose(np.linalg.norm(w_dec, axis=1), 1.0, atol=1e-4))
