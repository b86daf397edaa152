"""Architectures by name, and how one that a user's file defines is found."""

import pathlib
import sys

from sae_jax.errors import UserError, choose
from sae_jax.python_files import load_module
from sae_jax.sae.config import SAEConfig

_PACKAGE = __name__.rpartition(".")[0]

ARCHITECTURES: dict[str, type] = {}
"""The SAE classes by name: those of this package, then the user's."""


def register(cls: type) -> None:
    """Enters an SAE class under the name in its Config. Defining a class of one's own again
    replaces it. Raises UserError for a name that this package uses, or that is missing."""
    name = cls.Config.__dict__.get("architecture")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{cls.Config.__qualname__} needs a name for its architecture: "
            'architecture: str = "mine"'
        )
    if "__dataclass_fields__" not in vars(cls.Config):
        raise UserError(
            f"{cls.Config.__qualname__} must be a dataclass: put "
            "@dataclasses.dataclass(frozen=True) above it"
        )
    there = ARCHITECTURES.get(name)
    if there is not None and in_package(there) and not in_package(cls):
        raise UserError(
            f"{cls.__qualname__}: sae_jax has an architecture {name!r} of its own; give "
            f"{cls.Config.__qualname__}.architecture another name"
        )
    ARCHITECTURES[name] = cls


def in_order(*classes: type) -> None:
    """Puts classes that are registered in this order, behind all others."""
    for cls in classes:
        name = cls.Config.architecture
        ARCHITECTURES[name] = ARCHITECTURES.pop(name)


def architecture(config: SAEConfig) -> type:
    """Returns the SAE class of a config. Raises UserError for one that is not registered."""
    return by_name(config.architecture)


def by_name(name: str) -> type:
    """Returns the SAE class of this name. Raises UserError, with the nearest name, if there is
    none."""
    return ARCHITECTURES[choose(name, ARCHITECTURES, "sae.architecture")]


def in_package(cls: type) -> bool:
    """Whether a class is one of this package's, and not of a user's file."""
    return cls.__module__.startswith(f"{_PACKAGE}.")


def architecture_file(config: SAEConfig) -> str | None:
    """Returns the absolute path of the user's file that defines a config's architecture. None for
    an architecture of this package, and for one that a notebook's cell defines."""
    cls = architecture(config)
    if in_package(cls):
        return None
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return None if file is None else str(pathlib.Path(file).resolve())


def find(name: str, file: str | None, folder=None, trust_code: bool = True) -> type:
    """Returns the SAE class of this name, for what is loaded from `folder`.

    file: what `architecture_file` gave when the folder was written. It is run if no class of this
    name is registered yet, but never where it lies in the folder itself, is not an absolute path,
    or `trust_code` is False. Raises UserError that names the file and says to import it first."""
    if name in ARCHITECTURES or not file:
        if name not in ARCHITECTURES and folder is not None:
            raise UserError(
                f"{folder}: unknown architecture {name!r}; if it is your own, run the cell or "
                "import the file that defines it first"
            )
        return by_name(name)
    why = ""
    if not trust_code:
        why = "was not run, since it came with what is loaded"
    elif not pathlib.PurePath(file).is_absolute():
        why = "was not run, since its path is not absolute"
    elif folder is not None and _is_inside(file, folder):
        why = "was not run, since it lies in the folder that is loaded"
    elif not pathlib.Path(file).is_file():
        why = "is not there any more"
    if not why:
        load_module(file)
        why = "does not define it any more"
    if name not in ARCHITECTURES:
        raise UserError(
            f"{folder or 'the config'}: its architecture {name!r} is defined in {file}, which "
            f"{why}; import the file that defines it, and load again"
        )
    return ARCHITECTURES[name]


def _is_inside(file: str, folder) -> bool:
    """An object store's folder holds no local file."""
    if not isinstance(folder, pathlib.Path | str):
        return False
    return pathlib.Path(file).resolve().is_relative_to(pathlib.Path(folder).resolve())
