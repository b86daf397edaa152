"""Reads the answers of language models: what JSON they are asked for, and what it says.

A reader takes the JSON value of an answer and raises ValueError if it is not what was asked for.
"""

import re
from collections.abc import Sequence

_WITH_LEVEL = re.compile(r"(?:^|.*\s)([0-9])\s*", re.DOTALL)
_LABEL = re.compile(r"[01]")


def object_of(properties: dict) -> dict:
    """Returns the JSON schema of an object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def list_of(items: dict, least: int, most: int) -> dict:
    """Returns the JSON schema of a list of `least` to `most` items."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def labels_schema(count: int) -> dict:
    """Returns the JSON schema that `read_labels` reads."""
    return object_of({"labels": list_of({"type": "integer", "enum": [0, 1]}, count, count)})


def read_labels(value, count: int) -> tuple[int, ...]:
    """Returns `count` labels, 0 or 1 each, of {"labels": [...]}."""
    labels = _field(value, "labels", list)
    if len(labels) != count:
        raise ValueError(f"{len(labels)} labels, not {count}")
    if any(label not in (0, 1) for label in labels):
        raise ValueError("a label is neither 0 nor 1")
    return tuple(int(label) for label in labels)


def numbers_schema(count: int) -> dict:
    """Returns the JSON schema that `read_numbers` reads."""
    numbers = {"type": "integer", "minimum": 1, "maximum": count}
    return object_of({"active": list_of(numbers, 0, count)})


def read_numbers(value, count: int) -> tuple[int, ...]:
    """Returns `count` labels of {"active": [...]}, the numbers from 1 of those that are 1."""
    numbers = _field(value, "active", list)
    if any(number not in range(1, count + 1) for number in numbers):
        raise ValueError(f"a number is not one of 1 to {count}")
    return tuple(int(number in numbers) for number in range(1, count + 1))


def intruder_schema(count: int) -> dict:
    """Returns the JSON schema that `read_intruder` reads."""
    return object_of({"intruder": {"type": "integer", "minimum": 1, "maximum": count}})


def read_intruder(value, count: int) -> tuple[int, ...]:
    """Returns the number that {"intruder": N} names, from 1, alone."""
    number = _field(value, "intruder", int)
    if not 1 <= number <= count:
        raise ValueError(f"{number} is not one of 1 to {count}")
    return (number,)


def levels_schema(lengths: Sequence[int]) -> dict:
    """Returns the JSON schema that `read_levels` reads, of windows with these lengths."""
    window = list_of({"type": "string"}, min(lengths), max(lengths))
    return object_of({"predictions": list_of(window, len(lengths), len(lengths))})


def read_levels(value, lengths: Sequence[int]) -> tuple[int, ...]:
    """Returns the levels 0 to 9 of all tokens of windows with these lengths.

    They are in {"predictions": [["token 3", ...], ...]}; a number alone is one too.
    """
    windows = _field(value, "predictions", list)
    if len(windows) != len(lengths):
        raise ValueError(f"{len(windows)} lists, not {len(lengths)}")
    found = []
    for number, (window, length) in enumerate(zip(windows, lengths, strict=True), 1):
        if not isinstance(window, list) or len(window) != length:
            raise ValueError(f"list {number} has not {length} tokens")
        found += [_level(token) for token in window]
    return tuple(found)


def read_explanation(value) -> str:
    """Returns the explanation of {"explanation": "..."}, on one line."""
    text = " ".join(_field(value, "explanation", str).split())
    if not text:
        raise ValueError("the explanation is empty")
    return text


def last_paragraph(text: str) -> str:
    """Returns the last paragraph of a text, on one line."""
    return " ".join(text.strip().rpartition("\n\n")[2].split())


def _level(token) -> int:
    if isinstance(token, int) and 0 <= token <= 9:
        return int(token)
    found = _WITH_LEVEL.fullmatch(token) if isinstance(token, str) else None
    if not found:
        raise ValueError(f"{token!r} does not end with a number from 0 to 9")
    return int(found[1])


def _field(value, name: str, kind: type):
    if not isinstance(value, dict) or name not in value:
        raise ValueError(f"no object with {name!r}")
    field = value[name]
    if not isinstance(field, kind) or isinstance(field, bool):
        raise ValueError(f"{name!r} is of another type")
    return field
