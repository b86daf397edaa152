"""Reads what `sae-jax explain` found of latents, for their pages, the index and the search."""

import dataclasses

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.interpret.dashboard.labels import Labels
from sae_jax.interpret.explain import records
from sae_jax.interpret.explain.labels import LONGEST, Said, best, common_scorer, gathered, rule_of
from sae_jax.interpret.explain.labels import short as cut


@dataclasses.dataclass(frozen=True)
class Explained:
    """What was said of latents.

    Attributes:
      said: all that was said of a latent, by its number.
      labels: the best of it and its score.
      rule: how the best is chosen, in words.
    """

    said: dict[int, list[Said]]
    labels: Labels
    rule: str

    def of(self, latent: int) -> list[Said]:
        """Returns all that was said of a latent."""
        return self.said.get(latent, [])

    @property
    def texts(self) -> dict[int, list[str]]:
        """All explanations of each latent that has any."""
        texts = {i: [one.text for one in each if one.text] for i, each in self.said.items()}
        return {latent: each for latent, each in sorted(texts.items()) if each}


def read_explanations(directory, d_sae: int, scorer: str | None = None) -> Explained:
    """Reads the explanations and scores of an SAE with `d_sae` latents from a directory.

    scorer: the scorer by which labels are chosen; by default the one with the most scores.

    Raises UserError if there are none, one is damaged, or they are of more latents.
    """
    directory = paths.local(directory)
    explanations, scores = records.read(directory)
    if not explanations and not scores:
        raise UserError(
            f"{directory} holds no {records.EXPLANATIONS}; make it with: sae-jax explain"
        )
    said = gathered(explanations, scores)
    if wrong := [latent for latent in said if not 0 <= latent < d_sae]:
        raise UserError(
            f"{directory} explains latent {wrong[0]}; there are 0 to {d_sae - 1:,}: is it of "
            "another SAE?"
        )
    scorer = scorer or common_scorer(said)
    chosen = best(said, scorer)
    names = {latent: cut(one.text, LONGEST) for latent, (one, _) in chosen.items()}
    values = {latent: score for latent, (_, score) in chosen.items() if score is not None}
    return Explained(said, Labels(names, values), rule_of(scorer))
