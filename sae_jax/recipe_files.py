"""Finds the recipes that come with the package by their names.

They are the files of experiments/ in the repository. The folder `recipes` beside this file is a
link to that folder. In an installed package it has a copy of the files.
"""

import pathlib

from sae_jax import paths
from sae_jax.errors import UserError, nearest

_FOLDER = pathlib.Path(__file__).parent / "recipes"


def names() -> list[str]:
    """Returns the names of all recipes, which are the files that define `get_config`."""
    files = sorted(_FOLDER.glob("*.py"))
    return [file.stem for file in files if "def get_config(" in file.read_text(encoding="utf-8")]


def find(text: str) -> pathlib.Path:
    """Returns the Python file at the path `text`, or else the file of the recipe with that name.

    Raises UserError, naming the recipe whose name is most like it, if there is neither.
    """
    path = paths.local(text)
    if path.suffix == ".py" and path.is_file():
        return path
    known = names()
    if text in known:
        return _FOLDER / f"{text}.py"
    if path.is_file():
        raise UserError(f"{text} is no config file: the name of one ends in .py")
    near = nearest(path.stem, known)
    raise UserError(f"no config file at {text}, and no recipe of that name; {near}")
