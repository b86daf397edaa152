"""Reads and writes sae_jax's own exchange format, which keeps an SAE exactly.

A folder of this format has two files. sae.safetensors holds the parameters by name, and `scale` and
`target_scale`. sae.json holds an object of

    format              "sae_jax"
    version             2
    config              the fields of the architecture's config
    architecture_file   the file that defines a user's own architecture; left out for others
    about               the SAE's provenance

In version 1, config had the fields of all architectures, which were null where the SAE's own
architecture did not have them.
"""

import contextlib
import dataclasses
import os
import pathlib
import secrets
import shutil
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from sae_jax import paths
from sae_jax.errors import UserError, on_one_line
from sae_jax.json_files import checked, read_json
from sae_jax.sae.registry import architecture_file, find

_CONFIG, _TENSORS = "sae.json", "sae.safetensors"
_VERSION = 2
_SCALES = ("scale", "target_scale")


@dataclasses.dataclass(frozen=True)
class _File:
    """Describes sae.json. The architecture's config checks what is in `config`."""

    format: Literal["sae_jax"]
    version: Literal[1, 2]
    config: dict[str, Any]
    architecture_file: str | None = None
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


def recognises(path: pathlib.Path) -> bool:
    """Returns whether a folder holds an SAE of this format."""
    return (path / _CONFIG).is_file() and (path / _TENSORS).is_file()


def save(sae, path: str | pathlib.Path) -> None:
    """Writes an SAE to the new folder `path`, all of it or nothing.

    Raises UserError if something is at `path` already.
    """
    with new_folder(path) as folder:
        write(sae, folder, {})


def write(sae, folder: pathlib.Path, provenance: dict) -> None:
    """Writes an SAE's two files to an existing folder.

    Args:
      sae: the SAE.
      folder: the folder.
      provenance: where the SAE comes from, as values that JSON can hold.
    """
    arrays = {name: np.asarray(value) for name, value in sae.parameters().items()}
    # Python's numbers stay numbers: float64, as the run had them.
    arrays |= {name: np.asarray(getattr(sae, name)) for name in _SCALES}
    safetensors.numpy.save_file(arrays, folder / _TENSORS)
    file = architecture_file(sae.config)
    values = {
        "format": "sae_jax",
        "version": _VERSION,
        "config": dataclasses.asdict(sae.config),
        **({"architecture_file": file} if file else {}),
        "about": provenance,
    }
    (folder / _CONFIG).write_text(paths.as_json(values), encoding="utf-8")


def read(folder: pathlib.Path, trust_code: bool = True):
    """Returns the SAE in a folder of this format.

    Raises UserError if a file is damaged, of another version, or of an unknown architecture.

    Args:
      folder: the folder.
      trust_code: whether the file that defines a user's own architecture may be run, if the folder
        names one. It is never run if it is in the folder itself.
    """
    file, values = folder / _CONFIG, _read(folder)
    fields = values.config
    if not isinstance(fields.get("architecture"), str):
        raise UserError(f"{file}: config must be an object that names an architecture")
    if values.version == 1:
        fields = {name: value for name, value in fields.items() if value is not None}
    cls = find(fields["architecture"], values.architecture_file, folder, trust_code)
    tensors = read_safetensors(folder / _TENSORS)
    for name in _SCALES:
        if name not in tensors:
            raise UserError(f"{folder / _TENSORS} has no tensor {name}")
    scales = [tensors.pop(name) for name in _SCALES]
    check_weights(tensors, folder / _TENSORS)
    with naming(file):
        config = cls.Config(**cls.Config.fields_in_file(fields))
    shape = (config.d_in,) if config.kind == "crosscoder" else ()
    for name, scale in zip(_SCALES, scales, strict=True):
        if scale.shape != shape:
            raise UserError(
                f"{folder / _TENSORS}: {name} has shape {scale.shape}; it must be {shape}"
            )
        if not jnp.issubdtype(scale.dtype, jnp.number) or not np.all(
            (scale > 0) & (scale < np.inf)
        ):
            raise UserError(f"{folder / _TENSORS}: {name} must be above 0 and finite")
    scales = [scale if scale.ndim else scale.item() for scale in scales]
    with naming(folder / _TENSORS):
        parameters = {name: jnp.asarray(a.astype(np.float32)) for name, a in tensors.items()}
        return cls.from_parameters(config, parameters, *scales)


def read_provenance(folder: pathlib.Path) -> dict:
    """Returns what a folder of this format says about where its SAE comes from."""
    return _read(folder).about


def _read(folder: pathlib.Path) -> _File:
    return checked(read_json(folder / _CONFIG), _File, folder / _CONFIG)


def read_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file by name.

    Raises UserError if the file is missing, damaged or cut off, or has a tensor of a type that
    NumPy does not have.
    """
    if not file.is_file():
        raise UserError(f"no {file.name} in {file.parent}")
    try:
        return safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or truncated: {on_one_line(error)}") from None
    except (AttributeError, TypeError, KeyError) as error:  # one of 8 bits or fewer
        reason = on_one_line(error)
        raise UserError(f"{file} has a tensor of a type that is not read here: {reason}") from None


def check_weights(tensors: dict[str, np.ndarray], file) -> None:
    """Raises UserError, which names the tensor and `file`, if one is no weights.

    Weights are of a floating-point type, finite, and finite in float32 too.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, np.ndarray):
            raise UserError(f"{file}: {name} is {type(tensor).__name__}, not a tensor")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise UserError(f"{file}: {name} is of type {tensor.dtype}; weights are real numbers")
        with np.errstate(over="ignore"):  # of float64
            if not np.isfinite(tensor.astype(np.float32, copy=False)).all():
                raise UserError(f"{file}: {name} holds NaN or infinity")


@contextlib.contextmanager
def new_folder(path: str | pathlib.Path):
    """Gives a temporary folder to write to, which becomes `path` if the block raises nothing.

    The temporary folder is beside `path` and of this call alone, so nothing of a user's or of
    another process's is touched.

    Raises UserError if something is at `path` already, also if another process wrote it in the
    meantime, and if the block or this cannot write there.
    """
    path = paths.local(path)
    there = f"{path} is there already; give a new directory"
    if os.path.lexists(path):
        raise UserError(there)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    except (OSError, safetensors.SafetensorError) as error:
        if os.path.lexists(path):
            raise UserError(there) from None
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def naming(file):
    """Puts a file's name in front of a UserError that is raised within the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
