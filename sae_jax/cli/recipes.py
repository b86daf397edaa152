"""Lists the recipes, for `--help` of a command with --config."""

import inspect
import textwrap

from sae_jax import python_files, recipe_files


def table(function: str) -> list[str]:
    """Returns the lines of a list of the recipes that define `function`.

    Each has its name, its arguments (the default first) and the first paragraph of its docstring.
    """
    lines = ["Recipes, as --config=NAME:ARGUMENT; NAME alone has the first of its arguments:"]
    for name in recipe_files.names():
        module = python_files.load_module(name)
        if hasattr(module, function):
            lines += ["", f"  {name}:{_arguments(module)}"]
            summary = inspect.getdoc(module).partition("\n\n")[0]
            lines += textwrap.wrap(summary, 100, initial_indent="    ", subsequent_indent="    ")
    return lines


def _arguments(module) -> str:
    """Returns "paper|tiny" and the like for a recipe that lists its sizes, else as in "STORE"."""
    (parameter,) = inspect.signature(module.get_config).parameters.values()
    if not hasattr(module, "SIZES"):
        return parameter.name.upper()
    others = [size for size in module.SIZES if size != parameter.default]
    return "|".join([parameter.default, *others])
