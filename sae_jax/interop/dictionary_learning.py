"""Reads and writes the format of dictionary_learning: ae.pt and config.json.

ae.pt is a state dict that torch.save wrote. Each class of that package has its own names of the
parameters, subtracts b_dec from x or does not, and has its matrices as (in, out) or, where they are
weights of nn.Linear, as (out, in).
"""

import dataclasses
import itertools
import pathlib
from typing import Annotated

import msgspec
import numpy as np

from sae_jax.errors import UserError, choose
from sae_jax.interop.archives import read_torch
from sae_jax.interop.weights import (
    check_shapes,
    float32,
    import_torch,
    make_sae,
    matrix_shape,
    parameters_for,
)
from sae_jax.json_files import checked, read_json
from sae_jax.numpy_files import Arrays
from sae_jax.paths import as_json
from sae_jax.sae import ARCHITECTURES, SAE
from sae_jax.sae.files import naming


@dataclasses.dataclass(frozen=True)
class _Trainer:
    """Describes what we use of the section `trainer` of config.json."""

    dict_class: str
    k: Annotated[int, msgspec.Meta(ge=1)] | None = None


@dataclasses.dataclass(frozen=True)
class _Config:
    """Describes what we use of config.json."""

    trainer: _Trainer


@dataclasses.dataclass(frozen=True)
class _Class:
    """Describes a class of dictionary_learning.

    Attributes:
      architecture: the architecture of sae_jax that it is.
      names: its name of each parameter, by ours.
      subtracts: whether b_dec is taken from x.
      unit_norm: whether its decoder rows have norm 1.
      has_k: whether it stores k.
      one_threshold: whether it has one threshold for all latents.
    """

    architecture: str
    names: dict[str, str]
    subtracts: bool
    unit_norm: bool = True
    has_k: bool = False
    one_threshold: bool = False

    def is_transposed(self, name: str) -> bool:
        """Returns whether one of our parameters is stored transposed."""
        return self.names[name].endswith(".weight")


_LINEAR_NAMES = {"w_enc": "encoder.weight", "w_dec": "decoder.weight"}
_PLAIN_NAMES = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
_TOP_K_NAMES = _LINEAR_NAMES | {"b_enc": "encoder.bias", "b_dec": "b_dec"}
_CLASSES = {
    "AutoEncoderNew": _Class(
        "relu",
        _LINEAR_NAMES | {"b_enc": "encoder.bias", "b_dec": "decoder.bias"},
        subtracts=False,
        unit_norm=False,
    ),
    "AutoEncoder": _Class(
        "relu_l1_unit", _LINEAR_NAMES | {"b_enc": "encoder.bias", "b_dec": "bias"}, subtracts=True
    ),
    "GatedAutoEncoder": _Class(
        "gated",
        _LINEAR_NAMES
        | {"b_dec": "decoder_bias", "b_enc": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"},
        subtracts=True,
    ),
    "AutoEncoderTopK": _Class("topk", _TOP_K_NAMES, subtracts=True, has_k=True),
    "BatchTopKSAE": _Class(
        "batchtopk", _TOP_K_NAMES, subtracts=True, has_k=True, one_threshold=True
    ),
    "MatryoshkaBatchTopKSAE": _Class(
        "matryoshka", _PLAIN_NAMES, subtracts=True, has_k=True, one_threshold=True
    ),
    "JumpReluAutoEncoder": _Class(
        "jumprelu", _PLAIN_NAMES | {"threshold": "threshold"}, subtracts=False, unit_norm=False
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
    """Returns whether `path` is a folder of dictionary_learning."""
    return all((path / name).is_file() for name in FILES)


def write(sae: SAE, directory: pathlib.Path, provenance: dict) -> None:
    """Writes a folded SAE to an existing folder as dictionary_learning's class for it.

    Raises UserError if torch is not installed, or if thresholds differ where the class has one.
    """
    torch = import_torch(directory / "ae.pt")
    config = sae.config
    name = EXPRESSES[config.architecture, "autoencoder"]
    kind = _CLASSES[name]
    arrays = float32(parameters_for(sae, kind.subtracts))
    tensors = {
        theirs: np.ascontiguousarray(arrays[ours].T if kind.is_transposed(ours) else arrays[ours])
        for ours, theirs in kind.names.items()
    }
    if kind.has_k:
        tensors["k"] = np.asarray(config.k, np.int32)
        tensors["threshold"] = np.float32(-1.0)  # its own mark of a threshold never estimated
    if kind.one_threshold:
        tensors["threshold"] = _single_threshold(arrays["threshold"], name)
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
        "layer": provenance.get("hook_layer"),
        "lm_name": provenance.get("model_name"),
        "submodule_name": provenance.get("hook_name"),
    }
    values = {"trainer": trainer, "buffer": {"ctx_len": provenance.get("context_size")}}
    (directory / "config.json").write_text(as_json(values))


def read(directory: pathlib.Path) -> SAE:
    """Returns the SAE in a folder of dictionary_learning, in float32.

    Raises UserError for a class that is not known here, for tensors that are missing, additional or
    of another shape, and for a threshold that was never estimated.
    """
    file = directory / "config.json"
    trainer = checked(read_json(file), _Config, file).trainer
    name = choose(trainer.dict_class, _CLASSES, f"{file}: trainer.dict_class")
    kind, file = _CLASSES[name], directory / "ae.pt"
    tensors = read_torch(file)
    encoder = kind.names["w_enc"]
    shape = matrix_shape(tensors, encoder, file)
    d, n = shape[::-1] if kind.is_transposed("w_enc") else shape
    ours = {"w_enc": (d, n), "w_dec": (n, d), "b_dec": (d,)}
    shapes = {
        theirs: ours.get(name, (n,))[:: -1 if kind.is_transposed(name) else 1]
        for name, theirs in kind.names.items()
    }
    fields = {}
    if kind.has_k:
        fields["k"] = _checked_k(tensors, trainer.k, directory)
        threshold = _one(tensors, "threshold", np.floating, -1.0, file)
    if name == "MatryoshkaBatchTopKSAE":
        sizes = tensors.pop("group_sizes", None)
        if not isinstance(sizes, np.ndarray) or sizes.ndim != 1 or sizes.dtype.kind != "i":
            raise UserError(f"{file}: group_sizes must be whole numbers, the sizes of the groups")
        fields["prefix_widths"] = tuple(itertools.accumulate(sizes.tolist()))
    arrays = check_shapes(tensors, shapes, file)
    parameters = {
        name: arrays[theirs].T if kind.is_transposed(name) else arrays[theirs]
        for name, theirs in kind.names.items()
    }
    if kind.one_threshold:
        if not 0 <= threshold < np.inf:
            raise UserError(
                f"{file}: threshold is {threshold}, so it was never estimated, and without it the "
                f"latents of {name} depend on the batch"
            )
        parameters["threshold"] = np.full(n, threshold)
    if kind.architecture == "jumprelu":
        fields["apply_b_dec_to_input"] = False
    gated = kind.architecture == "gated"
    with naming(file):
        config = ARCHITECTURES[kind.architecture].Config(
            d_sae=n,
            unit_norm_decoder=kind.unit_norm and (gated or _has_unit_rows(parameters["w_dec"])),
            normalize="none",
            **fields,
        )
    sae = make_sae(config, d, d, parameters)
    return sae.fold() if gated else sae  # ours has unit rows only


def _single_threshold(thresholds: np.ndarray, name: str) -> np.ndarray:
    if not np.allclose(thresholds, thresholds[0], rtol=1e-6, atol=0):
        raise UserError(
            f"{name} of dictionary_learning has one threshold for all latents, and these differ "
            f"({thresholds.min():.4g} to {thresholds.max():.4g}): use --format=saelens"
        )
    return thresholds[0]


def _checked_k(tensors: Arrays, configured: int | None, directory: pathlib.Path) -> int:
    """Returns k, and takes it out of the tensors."""
    k = _one(tensors, "k", np.integer, configured, directory / "ae.pt")
    if k is None or k < 1 or configured not in (None, k):
        raise UserError(f"{directory}: k is {k!r} in ae.pt and {configured!r} in config.json")
    return k


def _one(tensors: Arrays, name: str, kind: type, default, file: pathlib.Path):
    """Returns the number in the tensor `name`, and takes it out; `default` if there is none."""
    if name not in tensors:
        return default
    value = np.asarray(tensors.pop(name))
    if value.size != 1 or not np.issubdtype(value.dtype, kind):
        raise UserError(f"{file}: {name} must be one number, not {value.dtype} {value.shape}")
    return value.item()


def _has_unit_rows(w_dec: np.ndarray) -> bool:
    return bool(np.allclose(np.linalg.norm(w_dec, axis=1), 1.0, atol=1e-4))
