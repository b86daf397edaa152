"""Finds the JSON value in what a language model says, which may say more around it."""

import json
from collections.abc import Iterator

from sae_jax.errors import UserError

_LONGEST = 100_000  # characters that are looked through


def find_json(text: str, schema: dict) -> tuple[bool, object]:
    """Returns whether a text holds a JSON value that fits a schema, and the value.

    The whole text comes first, then the last value in it that fits: models think before they
    answer. Where the schema is of an object with one property, that property's value will do.

    Raises UserError if the package that knows schemas is missing.
    """
    try:
        import jsonschema
    except ImportError:
        raise UserError(
            'answers in JSON need the package jsonschema: pip install "sae-jax[explain]"'
        ) from None
    fits = jsonschema.Draft202012Validator(schema).is_valid
    found = list(_values(text[-_LONGEST:]))
    names = list(schema.get("properties", ()))
    if len(names) == 1:
        found += [{names[0]: value} for value in found]
    for value in found:
        if fits(value):
            return True, value
    return False, None


def _values(text: str) -> Iterator[object]:
    """Yields the value that a text is, and those in it that are in no other, the last first."""
    decoder = json.JSONDecoder(parse_constant=_refuse)
    try:
        yield decoder.decode(text)
    except (ValueError, RecursionError):
        pass
    found, place = [], 0
    while place < len(text):
        if text[place] not in "{[":
            place += 1
            continue
        try:
            value, place = decoder.raw_decode(text, place)
            found.append(value)
        except RecursionError:
            break  # of a model that repeats itself
        except ValueError:
            place += 1
    yield from reversed(found)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
