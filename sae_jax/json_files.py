"""Reads JSON files that other programs wrote."""

import json

from sae_jax.errors import UserError
from sae_jax.paths import AnyPath


def read_json(path: AnyPath, default: dict | None = None) -> dict:
    """Returns the JSON object in a file, or `default` if it is given and there is no file.

    Raises UserError if the file is missing, is not valid JSON, or holds no object.
    """
    if not path.is_file():
        if default is None:
            raise UserError(f"no {path.name} in {path.parent}")
        return default
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values
