"""Runs a user's Python files as modules: configs, sweeps, architectures, loss terms."""

import contextlib
import hashlib
import importlib.util
import pathlib
import sys
import types

from sae_jax import recipe_files
from sae_jax.errors import UserError

_versions: dict[str, tuple[int, int]] = {}  # by module: time and size of its file when it was run


def load_module(path: str | pathlib.Path) -> types.ModuleType:
    """Returns the module that the Python file at `path`, or the recipe of this name, defines.

    A file is run once, so that the classes in it stay the same, and again when it has changed. A
    module that was imported from it in any other way is returned as it is. The module is in
    sys.modules, where type hints and `inspect` look for it.

    Raises UserError if there is no such file or running it fails.
    """
    file = recipe_files.find(str(path)).resolve()
    name = f"_sae_jax_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}_{file.stem}"
    status = file.stat()
    version = status.st_mtime_ns, status.st_size
    before = sys.modules.get(name)
    if before is None:
        if imported := _imported_from(file):
            return imported
    elif _versions[name] == version:
        return before
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with mistakes_in(path):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        raise
    _versions[name] = version
    return module


def split(spec: str) -> tuple[str, str]:
    """Returns the file or recipe that "FILE.py:ARG" or "RECIPE:ARG" names, and ARG; "" for none.

    Colons in the file's path are part of it.
    """
    path, ending, arg = spec.partition(".py:")
    if ending:
        return f"{path}.py", arg
    if spec.endswith(".py"):
        return spec, ""
    path, _, arg = spec.partition(":")
    return path, arg


def attribute_of(spec: str, what: str):
    """Returns what "FILE.py:NAME" names.

    Raises UserError if the file does not define it; the message begins with `what` it is for.
    """
    path, name = split(spec)
    if not path or not name:
        raise UserError(f"{what} is {spec!r}; it must be FILE.py:NAME")
    module = load_module(path)
    if not hasattr(module, name):
        raise UserError(f"{what}: {path} defines no {name}")
    return getattr(module, name)


def call_in_file(spec: str, name: str, what: str):
    """Returns what the function `name` of a Python file returns.

    It is called without an argument for "FILE.py", and with "arg" for "FILE.py:arg". Raises
    UserError if the file or the call fails. If the file has no such function, the message ends with
    `what`, which says what the function is for.
    """
    path, arg = split(spec)
    module = load_module(path)
    if not callable(getattr(module, name, None)):
        raise UserError(f"{path} has no {name}(); {what}")
    with mistakes_in(path):
        return getattr(module, name)(arg) if arg else getattr(module, name)()


@contextlib.contextmanager
def mistakes_in(path: str | pathlib.Path):
    """Turns whatever is raised within it into a UserError that names the user's own file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"config file {path} fails: {type(error).__name__}: {error}") from error


def _imported_from(file: pathlib.Path) -> types.ModuleType | None:
    """Returns the module that was imported from a file, or None."""
    for module in list(sys.modules.values()):
        source = getattr(module, "__file__", None)
        if not isinstance(source, str) or not source.endswith(".py"):
            continue
        source = pathlib.Path(source)
        if source.stem == file.stem and source.resolve() == file:
            return module
    return None
