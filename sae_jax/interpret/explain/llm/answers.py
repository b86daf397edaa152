"""Says what JSON language models are asked for, and what an answer in it says.

Values fit the schemas here, which the client sees to. A reader raises ValueError for what a schema
cannot say.
"""

import re
from collections.abc import Sequence

_WITH_LEVEL = re.compile(r"(?:^|.*\s)([0-9])\s*", re.DOTALL)


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


def read_labels(value: dict) -> tuple[int, ...]:
    """Returns the labels of {"labels": [...]}."""
    return tuple(int(label) for label in value["labels"])


def numbers_schema(count: int) -> dict:
    """Returns the JSON schema that `read_numbers` reads."""
    numbers = {"type": "integer", "minimum": 1, "maximum": count}
    return object_of({"active": list_of(numbers, 0, count)})


def read_numbers(value: dict, count: int) -> tuple[int, ...]:
    """Returns `count` labels, of which those are 1 whose numbers {"active": [...]} has."""
    return tuple(int(number in value["active"]) for number in range(1, count + 1))


def intruder_schema(count: int) -> dict:
    """Returns the JSON schema that `read_intruder` reads."""
    return object_of({"intruder": {"type": "integer", "minimum": 1, "maximum": count}})


def read_intruder(value: dict) -> tuple[int, ...]:
    """Returns the number that {"intruder": N} names, from 1, alone."""
    return (int(value["intruder"]),)


def levels_schema(lengths: Sequence[int]) -> dict:
    """Returns the JSON schema that `read_levels` reads, of windows with these lengths."""
    window = list_of({"type": "string"}, min(lengths), max(lengths))
    return object_of({"predictions": list_of(window, len(lengths), len(lengths))})


def read_levels(value: dict, lengths: Sequence[int]) -> tuple[int, ...]:
    """Returns the levels 0 to 9 of all tokens of windows with these lengths.

    They end the texts in {"predictions": [["token 3", ...], ...]}.
    """
    windows = value["predictions"]
    for number, (window, length) in enumerate(zip(windows, lengths, strict=True), 1):
        if len(window) != length:
            raise ValueError(f"list {number} has {len(window)} tokens, not {length}")
    return tuple(_level(text) for window in windows for text in window)


def read_explanation(value: dict) -> str:
    """Returns the explanation of {"explanation": "..."}, on one line."""
    text = " ".join(value["explanation"].split())
    if not text:
        raise ValueError("the explanation is empty")
    return text


def last_paragraph(text: str) -> str:
    """Returns the last paragraph of a text, on one line."""
    return " ".join(text.strip().rpartition("\n\n")[2].split())


def _level(text: str) -> int:
    found = _WITH_LEVEL.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} does not end with a number from 0 to 9")
    return int(found[1])
