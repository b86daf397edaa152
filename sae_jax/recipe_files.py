"""The recipes that come with the package, found by their names.

They are the files of experiments/ in the repository. `recipes`, beside this file, is a link to that
folder; an installed package has a copy of its files there.
"""

import pathlib

from sae_jax.errors import UserError, nearest

_FOLDER = pathlib.Path(__file__).parent / "recipes"


def names() -> list[str]:
    """Returns the names of all recipes: of the files that define `get_config`."""
    files = sorted(_FOLDER.glob("*.py"))
    return [file.stem for file in files if "def get_config(" in file.read_text(encoding="utf-8")]


def find(text: str) -> pathlib.Path:
    """Returns the Python file at the path `text`, or else the file of the recipe with that name.

    Raises UserError, with the recipe whose name is most like it, if there is neither."""
    path = pathlib.Path(text)
    if path.suffix == ".py" and path.is_file():
        return path
    known = names()
    if text in known:
        return _FOLDER / f"{text}.py"
    if path.is_file():
        raise UserError(f"{text} is no config file: the name of one ends in .py")
    near = nearest(path.stem, known)
    raise UserError(f"no config file at {text}, and no recipe of that name; {near}")
