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
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.json_files import read_json
from sae_jax.sae.registry import architecture_file, find

_CONFIG, _TENSORS = "sae.json", "sae.safetensors"
_VERSION, _READS = 2, (1, 2)
_SCALES = ("scale", "target_scale")


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
    (folder / _CONFIG).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read(folder: pathlib.Path, trust_code: bool = True):
    """Returns the SAE in a folder of this format.

    Raises UserError if a file is damaged, of another version, or of an unknown architecture.

    Args:
      folder: the folder.
      trust_code: whether the file that defines a user's own architecture may be run, if the folder
        names one. It is never run if it is in the folder itself.
    """
    file = folder / _CONFIG
    values = read_json(file)
    if values.get("format") != "sae_jax" or values.get("version") not in _READS:
        raise UserError(
            f"{file}: format {values.get('format')!r}, version {values.get('version')!r}; "
            f"this sae_jax reads its own format of version {_VERSION}"
        )
    fields = values.get("config")
    if not isinstance(fields, dict) or not isinstance(fields.get("architecture"), str):
        raise UserError(f"{file}: config must be an object that names an architecture")
    if values["version"] == 1:
        fields = {name: value for name, value in fields.items() if value is not None}
    cls = find(fields["architecture"], values.get("architecture_file"), folder, trust_code)
    tensors = read_safetensors(folder / _TENSORS)
    for name in _SCALES:
        if name not in tensors:
            raise UserError(f"{folder / _TENSORS} has no tensor {name}")
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"{folder / _TENSORS}: {name} holds NaN or infinity")
    scales = [tensors.pop(name) for name in _SCALES]
    scales = [scale if scale.ndim else scale.item() for scale in scales]
    with _naming(file):
        config = cls.Config(**fields)
    shape = (config.d_in,) if config.kind == "crosscoder" else ()
    for name, scale in zip(_SCALES, scales, strict=True):
        if np.shape(scale) != shape:
            raise UserError(
                f"{folder / _TENSORS}: {name} has shape {np.shape(scale)}; it must be {shape}"
            )
    with _naming(folder / _TENSORS):
        parameters = {name: jnp.asarray(array) for name, array in tensors.items()}
        return cls.from_parameters(config, parameters, *scales)


def read_provenance(folder: pathlib.Path) -> dict:
    """Returns what a folder of this format says about where its SAE comes from."""
    return read_json(folder / _CONFIG).get("about", {})


def read_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file by name.

    Raises UserError if the file is missing, damaged or cut off.
    """
    if not file.is_file():
        raise UserError(f"no {file.name} in {file.parent}")
    try:
        return safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} is damaged or truncated: {error}") from None


@contextlib.contextmanager
def new_folder(path: str | pathlib.Path):
    """Gives a temporary folder to write to, which becomes `path` if the block raises nothing.

    Raises UserError if something is at `path` already.
    """
    path = paths.local(path)
    if path.exists():
        raise UserError(f"{path} is there already; give a new directory")
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _naming(file: pathlib.Path):
    """Puts the file's name in front of a UserError that is raised within the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
