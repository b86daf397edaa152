"""Reads JSON, which other programs, other versions or a user's editor may have written.

Everything in the package that reads JSON does it by `parse_json` or `read_json`, so that whatever
is wrong with a file is told in one way. What is in it is held against its schema by `checked`
before anything uses it.
"""

import json
from typing import Any, TypeVar

import msgspec

from sae_jax.errors import UserError
from sae_jax.paths import AnyPath

T = TypeVar("T")


def parse_json(text: bytes | str, where) -> Any:
    """Returns the value that a JSON text holds; `where` names the text in messages.

    Bytes may be UTF-8, with or without a byte-order mark, or UTF-16 or UTF-32.

    Raises UserError if the text is not valid JSON, is nested too deep, or has an integer of
    thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where} is not usable JSON: it is nested too deep") from None
    except ValueError as error:  # a digit too many or no UTF-8 too
        raise UserError(f"{where} is not valid JSON: {error}") from None


def read_json(path: AnyPath, default: dict | None = None) -> dict:
    """Returns the JSON object in a file, or `default` if it is given and there is no file.

    Raises UserError if the file is missing, cannot be read, is not valid JSON, or holds no object.
    """
    try:
        if not path.is_file():
            if default is None:
                raise UserError(f"no {path.name} in {path.parent}")
            return default
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    values = parse_json(data, path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values


def checked(values: Any, schema: type[T], where) -> T:
    """Returns JSON values as an instance of `schema`; `where` names them in messages.

    `schema` is any type that msgspec converts to: a dataclass, `list[int]`,
    `Annotated[float, msgspec.Meta(gt=0)]`. Its annotations are the file format's definition. An
    object's fields that the schema does not have are left out. No value is turned into another
    type, except an integer into a float.

    Raises UserError, which names the field and both types, if a value has another type or is out
    of the schema's bounds, or a field without default is missing.
    """
    try:
        return msgspec.convert(values, schema)
    except msgspec.ValidationError as error:
        raise UserError(f"{where} is not as it must be: {_sentence(error)}") from None
    except UnicodeEncodeError:  # "\ud800", which JSON may hold and no text is
        raise UserError(f"{where} is not as it must be: it holds half of a character") from None


def _sentence(error: msgspec.ValidationError) -> str:
    """Returns msgspec's message with the place in front, as `path.to[3].field: what`."""
    what, _, place = str(error).partition(" - at `$")
    place = place.rstrip("`").lstrip(".")
    return f"{place}: {what}" if place else what
