"""Puts scores beside what they are to be held against, and counts what was explained."""

import dataclasses
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from sae_jax.interpret.explain.estimates import Estimate, Means, difference, means, median
from sae_jax.interpret.explain.records import LATENTS, Explanation, Score

FROM_UNITS = ("neurons", "random", "shuffled_model")
"""The units that are controls, in the order in which they are shown."""

IN_PLACE = ("shuffled", "none")
"""What is scored in an explanation's place, in that order."""


@dataclasses.dataclass(frozen=True)
class Way:
    """How many units one way explains.

    Attributes:
      units: whose units they are, as in `Explanation`.
      by: the way.
      method: its method.
      asked: how many units it was asked to explain.
      claimed: of how many it says something.
      nothing: of how many it found nothing to say.
      too_seldom: how many are active too seldom for it.
      unparsable: of how many the language model's answer could not be read.
      single_token: how many of the units asked about are of a single token; None if unknown.
      kinds: how many of the explanations are of each kind.
    """

    units: str
    by: str
    method: str
    asked: int
    claimed: int
    nothing: int
    too_seldom: int
    unparsable: int
    single_token: int | None
    kinds: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Control:
    """What scores are held against.

    Attributes:
      name: one of `IN_PLACE`, scored in place of the same units' explanations, or other units, with
        explanations of their own.
      mean: the mean score of it.
      median: the median.
      difference: by how much the mean of the scores is higher. Over the same units where it is in
        place of their explanations, which makes it the surer.
      several_tokens: the same without single-token units on either side.
    """

    name: str
    mean: Estimate
    median: Estimate
    difference: Estimate
    several_tokens: Estimate


@dataclasses.dataclass(frozen=True)
class Scored:
    """How units are scored by one scorer, of one way.

    Attributes:
      units: whose units they are.
      by: the way that explained them; "" where the scorer needs no explanation.
      method: its method.
      scorer: what scores.
      undefined: how many units have no score, as those that are active too seldom.
      mean: the mean over all others.
      median: the median.
      claimed: the mean over units of which something is said.
      several_tokens: the mean without single-token units.
      single_token: the mean over single-token units.
      readable: the mean without the answers that could not be read, and without units of which it
        is not known what it is without them.
      unparsable: how many answers could not be read.
      affected: the share of units with such an answer.
      chance: the score of guessing, where it is known.
      controls: what it is held against.
    """

    units: str
    by: str
    method: str
    scorer: str
    undefined: int
    mean: Estimate
    median: Estimate
    claimed: Estimate
    several_tokens: Estimate
    single_token: Estimate
    readable: Estimate
    unparsable: int
    affected: float
    chance: float | None
    controls: list[Control]

    @property
    def name(self) -> str:
        """The way, the method and the scorer, in words."""
        return " ".join(part for part in (self.by, self.method, self.scorer) if part)


_CHANCE = {
    "detection": 0.5,
    "fuzzing": 0.5,
    "embedding": 0.5,
    "embedding_hard": 0.5,
    "embedding_examples": 0.5,
    "logits": 0.5,
    "bricken2023": 0.0,
    "simulation": 0.0,
}


def ways_of(
    explanations: Iterable[Explanation],
    scores: Iterable[Score],
    single_token: Mapping[str, Collection[int]],
) -> list[Way]:
    """Returns what each way explains of each sort of units."""
    groups: dict[tuple, list[Explanation]] = {}
    for explanation in explanations:
        groups.setdefault(_way(explanation), []).append(explanation)
    seldom = {(_way(s), s.unit) for s in scores if s.details.get("too_seldom")}
    found = []
    for way, members in sorted(groups.items(), key=lambda group: _order(group[0])):
        claimed = [e for e in members if e.text]
        silent = [e for e in members if not e.text]
        too_seldom = sum("dropped" in e.details or (way, e.unit) in seldom for e in silent)
        unparsable = sum("unparsable" in e.details for e in silent)
        of_one = single_token.get(way[0])
        kinds = [e.kind for e in claimed if e.kind]
        found.append(
            Way(
                *way,
                asked=len(members),
                claimed=len(claimed),
                nothing=len(silent) - too_seldom - unparsable,
                too_seldom=too_seldom,
                unparsable=unparsable,
                single_token=None if of_one is None else sum(e.unit in of_one for e in members),
                kinds={kind: kinds.count(kind) for kind in sorted(set(kinds))},
            )
        )
    return found


def compared(
    explanations: Iterable[Explanation],
    scores: Iterable[Score],
    single_token: Mapping[str, Collection[int]],
    seed: int,
) -> list[Scored]:
    """Returns the scores of each way and scorer, beside controls, those of latents first."""
    claimed: dict[tuple, set[int]] = {}
    for explanation in explanations:
        units = claimed.setdefault(_way(explanation), set())
        if explanation.text:
            units.add(explanation.unit)
    groups: dict[tuple, list[Score]] = {}
    for score in scores:
        groups.setdefault((*_way(score), score.scorer), []).append(score)
    made = {
        key: _Group(key, members, claimed.get(key[:3]), single_token.get(key[0]), seed)
        for key, members in groups.items()
    }
    return [made[key].scored(made) for key in sorted(made, key=_order)]


class _Group:
    """The scores of one sort of units, way, method and scorer, by control."""

    def __init__(
        self,
        key: tuple[str, str, str, str],
        scores: Sequence[Score],
        claimed: Collection[int] | None,
        single_token: Collection[int] | None,
        seed: int,
    ):
        self.key, self.scores = key, [score for score in scores if not score.control]
        units = sorted({score.unit for score in scores})
        place = {unit: i for i, unit in enumerate(units)}
        self.columns = {name: np.full(len(units), np.nan) for name in ("", "readable")}
        for score in scores:
            column = self.columns.setdefault(score.control, np.full(len(units), np.nan))
            column[place[score.unit]] = np.nan if score.value is None else score.value
        for score in self.scores:
            value = score.details.get("without_unparsable") if score.unparsable else score.value
            self.columns["readable"][place[score.unit]] = np.nan if value is None else value
        self.in_place = [name for name in IN_PLACE if name in self.columns]
        one = np.array([unit in (single_token or ()) for unit in units], bool)
        said = np.array([unit in (claimed or ()) for unit in units], bool)
        own = self.columns[""]
        self.columns |= {
            "claimed": np.where(said, own, np.nan),
            "single": np.where(one, own, np.nan),
            "several": np.where(one, np.nan, own),
        }
        for name in self.in_place:
            less = own - self.columns[name]
            self.columns |= {
                f"over {name}": less,
                f"several over {name}": np.where(one, np.nan, less),
            }
        self.seed = zlib.crc32(repr((seed, *key)).encode())
        self.means: Means = means(self.columns, self.seed)

    def scored(self, groups: Mapping[tuple, "_Group"]) -> Scored:
        """Returns what is said of the group, beside others of the same way and scorer."""
        estimates, own = self.means.estimates, self.columns[""]
        controls = [
            Control(
                name,
                estimates[name],
                median(self.columns[name], self.seed),
                estimates[f"over {name}"],
                estimates[f"several over {name}"],
            )
            for name in self.in_place
        ]
        if self.key[0] == LATENTS:
            others = [groups.get((units, *self.key[1:])) for units in FROM_UNITS]
            controls += [
                Control(
                    other.key[0],
                    other.means.estimates[""],
                    median(other.columns[""], other.seed),
                    difference(self.means, other.means, ""),
                    difference(self.means, other.means, "several"),
                )
                for other in others
                if other is not None
            ]
        defined = [score for score in self.scores if score.value is not None]
        known = [s.details["chance"] for s in defined if "chance" in s.details]
        return Scored(
            *self.key,
            undefined=len(self.scores) - len(defined),
            mean=estimates[""],
            median=median(own, self.seed),
            claimed=estimates["claimed"],
            several_tokens=estimates["several"],
            single_token=estimates["single"],
            readable=estimates["readable"],
            unparsable=sum(score.unparsable for score in defined),
            affected=sum(score.unparsable > 0 for score in defined) / max(len(defined), 1),
            chance=float(np.mean(known)) if known else _CHANCE.get(self.key[3]),
            controls=controls,
        )


def _way(record: Explanation | Score) -> tuple[str, str, str]:
    return record.units, record.by, record.method


def _order(key: tuple) -> tuple:
    """Returns what puts latents first, then controls, and ways by their names."""
    return (key[0] != LATENTS, *key[1:], key[0])
