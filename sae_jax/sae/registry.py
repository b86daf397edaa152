"""Finds architectures by name, those of this package and those that a user's file defines."""

import pathlib
import sys

from sae_jax.errors import UserError, choose
from sae_jax.python_files import load_module
from sae_jax.sae.config import SAEConfig

_PACKAGE = __name__.rpartition(".")[0]

ARCHITECTURES: dict[str, type] = {}
"""The SAE classes by name: those of this package, then the user's."""


def register(cls: type) -> None:
    """Enters an SAE class in `ARCHITECTURES` under the name in its Config.

    A class of the same name that a user defined before is replaced. Raises UserError if the Config
    has no name or is not a dataclass, or if an architecture of this package has the name.
    """
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


def move_to_end(*classes: type) -> None:
    """Moves registered classes, in the given order, to the end of `ARCHITECTURES`."""
    for cls in classes:
        name = cls.Config.architecture
        ARCHITECTURES[name] = ARCHITECTURES.pop(name)


def architecture(config: SAEConfig) -> type:
    """Returns the SAE class of a config. Raises UserError for one that is not registered."""
    return by_name(config.architecture)


def by_name(name: str) -> type:
    """Returns the SAE class of this name.

    Raises UserError, which says the nearest name, if there is none.
    """
    return ARCHITECTURES[choose(name, ARCHITECTURES, "sae.architecture")]


def in_package(cls: type) -> bool:
    """Returns whether a class is defined in this package and not in a user's file."""
    return cls.__module__.startswith(f"{_PACKAGE}.")


def architecture_file(config: SAEConfig) -> str | None:
    """Returns the absolute path of the user's file that defines a config's architecture.

    It is None for an architecture of this package, and for one that a notebook's cell defines.
    """
    cls = architecture(config)
    if in_package(cls):
        return None
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return None if file is None else str(pathlib.Path(file).resolve())


def find(name: str, file: str | None, folder=None, trust_code: bool = True) -> type:
    """Returns the SAE class of this name, and runs the file that defines it where that is needed.

    Raises UserError if no class has the name. The error says which file to import first.

    Args:
      name: the architecture's name.
      file: the path that `architecture_file` gave when `folder` was written, or None. It is run if
        no class of this name is registered yet. It is never run if it is in `folder` itself, or if
        its path is not absolute.
      folder: the run or export that is loaded.
      trust_code: whether the file may be run.
    """
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
    """Returns whether a local file is in a folder. A folder of an object store holds none."""
    if not isinstance(folder, pathlib.Path | str):
        return False
    return pathlib.Path(file).resolve().is_relative_to(pathlib.Path(folder).resolve())
