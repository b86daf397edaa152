"""Sums up how many units each way explains, and how well, beside all controls.

`write_summary` writes summary.json.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from sae_jax import paths
from sae_jax.interpret.explain.comparison import Scored, Way, compared, ways_of
from sae_jax.interpret.explain.doubts import doubts_of
from sae_jax.interpret.explain.estimates import RESAMPLES, Estimate
from sae_jax.interpret.explain.records import LATENTS, Explanation, Score

SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was explained, and how well.

    Attributes:
      ways: how many units each way explains.
      scores: the scores of each way and scorer, beside controls; those of latents come first.
      doubts: sentences that say what is to be doubted.
      seed: the seed of the resamples.
      resamples: how many there are.
    """

    ways: list[Way]
    scores: list[Scored]
    doubts: list[str]
    seed: int
    resamples: int

    @property
    def of_latents(self) -> list[Scored]:
        """The scores of the latents themselves."""
        return [one for one in self.scores if one.units == LATENTS]

    def __str__(self) -> str:
        lines = [f"{'units':15}{'way':32}{'asked':>9}{'claimed':>9}{'nothing':>9}{'seldom':>9}"]
        for way in self.ways:
            name = f"{way.by} {way.method}".strip()
            lines.append(
                f"{way.units:15}{name:32.31}{way.asked:>9,}{way.claimed:>9,}"
                f"{way.nothing + way.unparsable:>9,}{way.too_seldom:>9,}"
            )
        for one in self.of_latents:
            lines += ["", f"{one.name}: {one.mean.n:,} latents"]
            rows = [("mean", one.mean), ("median", one.median)]
            if 0 < one.claimed.n < one.mean.n:
                rows.append((f"of the {one.claimed.n:,} claimed", one.claimed))
            if one.single_token.n:
                rows.append((f"without {one.single_token.n:,} single-token", one.several_tokens))
            if one.unparsable:
                rows.append(("without unparsable answers", one.readable))
            lines += [f"  {name:32}{_shown(estimate)}" for name, estimate in rows]
            for control in one.controls:
                lines.append(
                    f"  {control.name:32}{_shown(control.mean)}  less: {control.difference}"
                )
        return "\n".join([*lines, *([""] if self.doubts else []), *self.doubts])


def _shown(estimate: Estimate) -> str:
    return f"{estimate!s:24}"


def summarise(
    explanations: Sequence[Explanation],
    scores: Sequence[Score],
    *,
    single_token: Mapping[str, Collection[int]] | None = None,
    seed: int = 0,
) -> Summary:
    """Returns the counts of explanations, and means and medians of scores with 95% intervals.

    Intervals are of a bootstrap over units. What is scored in place of a unit's explanation is
    compared with it unit by unit; other units with a resample of their own.

    Args:
      explanations: the explanations, of latents and of control units.
      scores: their scores and those of controls.
      single_token: the units that are active on a single token, by whose units they are, as in
        `Explanation`. None: those of which the way statistics says so.
      seed: the seed of the resamples.
    """
    if single_token is None:
        single_token = single_token_units(explanations)
    ways = ways_of(explanations, scores, single_token)
    scored = compared(explanations, scores, single_token, seed)
    return Summary(ways, scored, doubts_of(ways, scored), seed, RESAMPLES)


def single_token_units(explanations: Sequence[Explanation]) -> dict[str, set[int]]:
    """Returns the units that are active on a single token, by whose they are, where their
    explanations say whether they are."""
    found: dict[str, set[int]] = {}
    for explanation in explanations:
        if "single_token" in explanation.details:
            units = found.setdefault(explanation.units, set())
            if explanation.details["single_token"]:
                units.add(explanation.unit)
    return found


def write_summary(directory, summary: Summary) -> None:
    """Writes summary.json to a directory, whole or not at all."""
    paths.save_json(dataclasses.asdict(summary), paths.local(directory) / SUMMARY)
