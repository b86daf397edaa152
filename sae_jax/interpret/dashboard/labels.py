"""Reads what people or programs have called latents."""

import dataclasses
from typing import Annotated

import msgspec

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.json_files import checked, parse_json
from sae_jax.tables import as_number, read_csv

_LONGEST = 2000  # characters of a label


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A label in a JSON file."""

    label: Annotated[str, msgspec.Meta(max_length=_LONGEST)]
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class _Numbered(_Entry):
    """A label in a JSON list."""

    latent: int = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True)
class Labels:
    """What latents are called.

    Attributes:
      names: a text by the number of a latent.
      scores: how good a label is, in whatever units its maker has, by the number of a latent.
    """

    names: dict[int, str] = dataclasses.field(default_factory=dict)
    scores: dict[int, float] = dataclasses.field(default_factory=dict)


def read_labels(file, d_sae: int) -> Labels:
    """Reads the labels of an SAE with `d_sae` latents from a file.

    The file is one of:

        .csv    with the columns latent, label and, if there are scores, score
        .json   {"7": "a label", ...}, {"7": {"label": "...", "score": 0.9}, ...}, or
                [{"latent": 7, "label": "...", "score": 0.9}, ...]

    Raises UserError if it is missing or damaged, or names a latent that there is not, or one twice.
    """
    file = paths.path(file)
    entries = _from_csv(file) if file.suffix == ".csv" else _from_json(file)
    names, scores = {}, {}
    for latent, entry in entries:
        if not 0 <= latent < d_sae:
            raise UserError(f"{file} has a label of latent {latent}; there are 0 to {d_sae - 1:,}")
        if latent in names:
            raise UserError(f"{file} has two labels of latent {latent}; leave one")
        names[latent] = entry.label
        if entry.score is not None:
            scores[latent] = entry.score
    return Labels(names, scores)


def _from_csv(file) -> list[tuple[int, _Entry]]:
    found = []
    for line, row in read_csv(file):
        where = f"{file}, line {line}"
        if missing := {"latent", "label"} - row.keys():
            raise UserError(f"{where}: there is no column {sorted(missing)[0]}")
        score = as_number(row.get("score"))
        if score is None and row.get("score"):
            raise UserError(f"{where}: score is {row['score']!r}, which is no number")
        entry = checked({"label": row["label"], "score": score}, _Entry, where)
        found.append((_number(row["latent"], where), entry))
    return found


def _from_json(file) -> list[tuple[int, _Entry]]:
    try:
        values = parse_json(file.read_bytes(), file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    if isinstance(values, list):
        return [(entry.latent, entry) for entry in checked(values, list[_Numbered], file)]
    entries = checked(values, dict[str, str | _Entry], file)
    return [
        (_number(key, file), checked({"label": e}, _Entry, file) if isinstance(e, str) else e)
        for key, e in entries.items()
    ]


def _number(text: str, where) -> int:
    if not (text.isdecimal() and len(text) < 16):
        raise UserError(f"{where}: {text!r} is not the number of a latent")
    return int(text)
