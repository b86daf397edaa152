"""Gathers what was said of each latent with its scores, and picks a label of each from that.

labels.csv    latent, label, score: what `sae-jax dashboard --labels` reads
"""

import dataclasses
from collections.abc import Iterable, Mapping

from sae_jax import paths, tables
from sae_jax.errors import UserError
from sae_jax.interpret.explain.records import LATENTS, Explanation, Score

LABELS = "labels.csv"
LONGEST = 2000
"""How many characters of an explanation a label has."""

WAYS = ("labels", "llm", "statistics", "embedding", "")
"""The ways, in the order in which their explanations come before others that score alike."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """How a scorer marks an explanation.

    Attributes:
      scorer: the scorer.
      value: the score; None where it is not defined.
      controls: the scores of what was put in its place, by name.
      examples: how many examples it is made of.
      unparsable: how many answers could not be read.
      model: the language model that was asked, or "".
    """

    scorer: str
    value: float | None
    controls: dict[str, float | None]
    examples: int
    unparsable: int
    model: str = ""


@dataclasses.dataclass(frozen=True)
class Said:
    """What one way says of a latent.

    Attributes:
      by: the way; "" for scores that need no explanation.
      method: its method.
      text: the explanation; "" where it says nothing; None where scores need none.
      kind: what sort of thing it names, or "".
      model: the language model that wrote it, or "".
      scores: its marks, by the scorer's name.
    """

    by: str
    method: str
    text: str | None
    kind: str
    model: str
    scores: list[Mark]

    def score(self, scorer: str) -> float | None:
        """Returns the score of a scorer; None where there is none."""
        return next((mark.value for mark in self.scores if mark.scorer == scorer), None)


def gathered(explanations: Iterable[Explanation], scores: Iterable[Score]) -> dict[int, list[Said]]:
    """Returns what is said of each latent, in the order of `WAYS`; nothing of control units."""
    said: dict[tuple, Explanation | None] = {}
    marks: dict[tuple, dict[str, dict[str, Score]]] = {}
    for explanation in explanations:
        if explanation.units == LATENTS:
            said[_key(explanation)] = explanation
    for score in scores:
        if score.units == LATENTS:
            said.setdefault(_key(score), None)
            by_scorer = marks.setdefault(_key(score), {})
            by_scorer.setdefault(score.scorer, {})[score.control] = score
    found: dict[int, list[Said]] = {}
    for key in sorted(said, key=lambda key: (key[0], _order(key[1]), key[2])):
        unit, by, method = key
        explanation = said[key]
        found.setdefault(unit, []).append(
            Said(
                by,
                method,
                None if explanation is None else explanation.text,
                "" if explanation is None else explanation.kind,
                "" if explanation is None else str(explanation.details.get("model", "")),
                [_mark(name, group) for name, group in sorted(marks.get(key, {}).items())],
            )
        )
    return found


def _mark(scorer: str, by_control: Mapping[str, Score]) -> Mark:
    own = by_control.get("")
    return Mark(
        scorer,
        own and own.value,
        {name: score.value for name, score in sorted(by_control.items()) if name},
        own.examples if own else 0,
        own.unparsable if own else 0,
        str(own.details.get("model", "")) if own else "",
    )


def common_scorer(said: Mapping[int, list[Said]]) -> str | None:
    """Returns the scorer of the most explanations, of several the first by name; None of none."""
    counts: dict[str, int] = {}
    for each in said.values():
        for one in each:
            for mark in one.scores:
                if one.text and mark.value is not None:
                    counts[mark.scorer] = counts.get(mark.scorer, 0) + 1
    return min(counts, key=lambda name: (-counts[name], name), default=None)


def best(
    said: Mapping[int, list[Said]], scorer: str | None
) -> dict[int, tuple[Said, float | None]]:
    """Returns the best explanation of each latent of which anything is said, and its score.

    Where `scorer` scored all of a latent's explanations it is the one with the highest score, and
    of equal ones, or where one has no score, the first in the order of `WAYS`.
    """
    found = {}
    for latent, each in said.items():
        options = [one for one in each if one.text]
        scores = [None if scorer is None else one.score(scorer) for one in options]
        if not options:
            continue
        place = 0 if None in scores else max(range(len(options)), key=lambda i: (scores[i], -i))
        found[latent] = (options[place], scores[place])
    return found


def rule_of(scorer: str | None) -> str:
    """Returns in words how `best` chooses."""
    order = ", ".join(way for way in WAYS if way)
    if scorer is None:
        return f"No explanation has a score; of several the first of {order}."
    return (
        f"The explanation with the highest score by {scorer}; of equal ones, or where one was not "
        f"scored by it, the first of {order}."
    )


def write_labels(
    directory,
    explanations: Iterable[Explanation],
    scores: Iterable[Score],
    scorer: str | None = None,
) -> str:
    """Writes labels.csv, with a row for each latent of which anything is said.

    Args:
      directory: the directory.
      explanations: what is said of latents.
      scores: how well it holds.
      scorer: the scorer whose scores count and are written; by default the one with the most.

    Returns the rule by which labels were chosen, in words. Raises UserError if there are no scores
    of that scorer.
    """
    said = gathered(explanations, scores)
    if scorer is not None and not any(
        mark.scorer == scorer for each in said.values() for one in each for mark in one.scores
    ):
        raise UserError(f"nothing was scored by {scorer}; name another scorer for the labels")
    scorer = scorer or common_scorer(said)
    rows = [
        {
            "latent": latent,
            "label": short(one.text, LONGEST),
            "score": None if value is None else float(f"{value:.6g}"),
        }
        for latent, (one, value) in best(said, scorer).items()
    ]
    text = tables.as_csv(rows, ("latent", "label", "score"))
    paths.write(paths.local(directory) / LABELS, text)
    return rule_of(scorer)


def short(text: str, most: int) -> str:
    """Returns a text, cut to at most so many UTF-16 units, as JavaScript counts characters."""
    if len(text.encode("utf-16-le")) <= 2 * most:
        return text
    cut = text.encode("utf-16-le")[: 2 * (most - 1)]
    return cut.decode("utf-16-le", errors="ignore") + "…"


def _key(record: Explanation | Score) -> tuple[int, str, str]:
    return record.unit, record.by, record.method


def _order(by: str) -> int:
    return WAYS.index(by) if by in WAYS else len(WAYS)
