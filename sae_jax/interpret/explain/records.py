"""What was said about latents and how well it held, as files of one line each.

    explanations.jsonl   an `Explanation` a line
    scores.jsonl         a `Score` a line

Both are written whole, sorted, so that the same work gives the same bytes whatever happened on the
way.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.json_files import checked, parse_json
from sae_jax.lm.text import well_formed

EXPLANATIONS, SCORES = "explanations.jsonl", "scores.jsonl"

LATENTS = "latents"
"""The name of the units that are the SAE's own latents; others are controls."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A text that says what a unit responds to.

    Attributes:
      units: what is explained: `LATENTS`, or a control: neurons, random, shuffled_model.
      unit: the number of the latent or control unit.
      by: the way: statistics, embedding, llm, or labels for those that were given.
      method: which one of that way, with the version of its prompts.
      text: the explanation; "" where nothing was found to say.
      kind: what sort of thing it names, such as token, script or regex; "" where that is not known.
      details: what the way knows besides, as values that JSON can hold.
    """

    units: str
    unit: int
    by: str
    method: str
    text: str
    kind: str = ""
    details: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Score:
    """How well an explanation, or a control in its place, tells where a unit is active.

    Attributes:
      units: as in `Explanation`.
      unit: the number of the unit.
      by: the way that made the explanation that is scored.
      method: its method.
      scorer: what scores: f1, detection, fuzzing, intruder, simulation, embedding and so on.
      control: "" for the explanation itself; shuffled for that of another unit; none for one that
        says nothing.
      value: the score; None where it is not defined, as of a unit that is never active.
      examples: how many examples it is made of.
      unparsable: how many answers could not be read; they count as wrong.
      details: what the scorer knows besides.
    """

    units: str
    unit: int
    by: str
    method: str
    scorer: str
    control: str = ""
    value: float | None = None
    examples: int = 0
    unparsable: int = 0
    details: dict = dataclasses.field(default_factory=dict)


def write(directory, explanations: Iterable[Explanation], scores: Iterable[Score]) -> None:
    """Writes both files to a directory, each under a temporary name first."""
    directory = paths.local(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = {}
    for name, records in ((EXPLANATIONS, explanations), (SCORES, scores)):
        lines = sorted(_line(record) for record in records)
        temporary[name] = directory / f"{name}.tmp"
        temporary[name].write_text("".join(lines), encoding="utf-8")
    # Scores first: where this is killed in between, `update` sees again which texts have changed.
    for name in (SCORES, EXPLANATIONS):
        os.replace(temporary[name], directory / name)


def _line(record: Explanation | Score) -> str:
    """Returns a record as a line of JSON, halves of characters replaced: JSON cannot hold them."""
    return well_formed(json.dumps(vars(record), sort_keys=True, ensure_ascii=False)) + "\n"


def update(directory, explanations: Iterable[Explanation], scores: Iterable[Score]) -> None:
    """Puts records into the two files of a directory, in place of what they replace there.

    Explanations replace all those of their units, way and method, and scores all those that besides
    are of their scorer, with all controls. Where the explanations of a way are others than before,
    what other scorers said of the earlier ones is dropped.

    Raises UserError if a file is damaged.
    """
    explanations, scores = list(explanations), list(scores)
    old_explanations, old_scores = read(directory)
    before, after = _texts(old_explanations), _texts(explanations)
    changed = {way for way in after if after[way] != before.get(way)}
    replaced = {(*_way(score), score.scorer) for score in scores}
    kept = [e for e in old_explanations if _way(e) not in after]
    kept_scores = [
        score
        for score in old_scores
        if _way(score) not in changed and (*_way(score), score.scorer) not in replaced
    ]
    write(directory, [*kept, *explanations], [*kept_scores, *scores])


def _way(record: Explanation | Score) -> tuple[str, str, str]:
    return record.units, record.by, record.method


def _texts(explanations: Iterable[Explanation]) -> dict[tuple, dict[int, str]]:
    """Returns the texts by unit, of each way."""
    found = {}
    for explanation in explanations:
        found.setdefault(_way(explanation), {})[explanation.unit] = explanation.text
    return found


def read(directory) -> tuple[list[Explanation], list[Score]]:
    """Returns what the two files in a directory hold; a file that is not there holds nothing.

    Raises UserError if one is damaged.
    """
    directory = paths.local(directory)
    return (
        _lines(directory / EXPLANATIONS, Explanation),
        _lines(directory / SCORES, Score),
    )


def _lines(file: pathlib.Path, kind) -> list:
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    places = ((f"{file}, line {number}", line) for number, line in enumerate(lines, 1))
    return [checked(parse_json(line, where), kind, where) for where, line in places]
