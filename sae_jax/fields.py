"""Fields of dataclasses: their types, their values as text, and their documentation.

A config is a frozen dataclass whose values are checked when it is made, in Python as on the command
line. The documentation of a field is a string literal under it in the class.
"""

import ast
import dataclasses
import functools
import inspect
import math
import textwrap
import types
import typing

import numpy as np

from sae_jax.errors import UserError


@functools.cache
def types_of(cls: type) -> dict[str, object]:
    """Returns the type of each field of the dataclass `cls`, by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def check_types(instance, prefix: str) -> None:
    """Checks the value of each field of a frozen dataclass against its type.

    A value of another type that means the same is replaced: 3 by 3.0, a list by a tuple, a number
    of NumPy by one of Python. Raises UserError, naming the field with `prefix`, for any other.
    """
    for name, hint in types_of(type(instance)).items():
        value = getattr(instance, name)
        same = typed(value, hint, prefix + name)
        if same is not value:
            object.__setattr__(instance, name, same)


def typed(value, hint, path: str):
    """Returns `value` as a field of type `hint` holds it, for example 3.0 for 3 in a float field.

    Raises UserError, calling the field `path`, if the value is of another type.
    """
    kinds = _kinds(hint)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None and type(None) in kinds:
        return None
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, hint):
            raise UserError(f"{path} must be a {hint.__name__}, not {value!r}")
        return value
    if tuple in kinds:
        if not isinstance(value, tuple | list):
            what = "whole numbers, such as 256,512,1024" if _element(hint) is int else "a tuple"
            raise UserError(f"{path} must be {what}, not {value!r}")
        return tuple(typed(part, _element(hint), path) for part in value)
    if isinstance(value, bool) != (bool in kinds) or not isinstance(value, (*kinds, int, float)):
        raise UserError(f"{path} must be {_name(kinds)}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path} must be a finite number, not {value!r}")
    if int in kinds and isinstance(value, float):
        if value != int(value):
            raise UserError(f"{path} must be a whole number, not {value!r}")
        return int(value)
    if float in kinds and isinstance(value, int):
        return float(value)
    if str in kinds and not isinstance(value, str):
        raise UserError(f"{path} must be text, not {value!r}")
    return value


def parse(text: str, hint, path: str):
    """Returns the value of type `hint` that `text`, from the command line, stands for.

    Raises UserError, calling the field `path`, if it stands for none.
    """
    kinds = _kinds(hint)
    if type(None) in kinds and text.lower() == "none":
        return None
    if tuple in kinds:
        parts = text.strip("()[] ").split(",")
        return tuple(parse(part, _element(hint), path) for part in parts if part)
    if bool in kinds:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{path} must be true or false, not {text!r}")
        return text.lower() == "true"
    if int in kinds:
        try:
            return int(text.replace("_", ""))
        except ValueError:
            pass  # 1e6 and 2M-style floats are tried below, and refused if not whole
    if int in kinds or float in kinds:
        try:
            return typed(float(text), hint, path)
        except ValueError:
            raise UserError(f"{path} must be a number, not {text!r}") from None
    return text


def documentation(cls: type) -> dict[str, str]:
    """Returns the documentation of each field of the dataclass `cls`, by name.

    It is the string literal under the field, on one line. A field without one is left out.
    """
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            found |= _documented(owner)
    return {
        field.name: found[field.name] for field in dataclasses.fields(cls) if field.name in found
    }


def _documented(cls: type) -> dict[str, str]:
    """Returns the documentation of the fields that the class itself names.

    It is empty if the source of the class cannot be read.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return {}
    found, name = {}, None
    for statement in tree.body[0].body:
        if name and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            found[name] = " ".join(str(statement.value.value).split())
        name = statement.target.id if isinstance(statement, ast.AnnAssign) else None
    return found


def _kinds(hint) -> tuple[type, ...]:
    return tuple(typing.get_origin(kind) or kind for kind in _alternatives(hint))


def _alternatives(hint) -> tuple:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _element(hint):
    """Returns the type of the elements of a tuple[TYPE, ...]."""
    (found,) = (kind for kind in _alternatives(hint) if typing.get_origin(kind) is tuple)
    return typing.get_args(found)[0]


def _name(kinds) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    names[type(None)] = "none"
    return " or ".join(names.get(kind, kind.__name__) for kind in kinds)
