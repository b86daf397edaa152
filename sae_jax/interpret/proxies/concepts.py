"""What is found of the concepts that proxies stand for."""

import dataclasses

from sae_jax.errors import choose
from sae_jax.interpret.proxies.influence import LogitWeights, Steered
from sae_jax.interpret.proxies.units import Unit

SPECIFIC = 0.5
"""F1, at the best threshold, from which there is a latent for a concept."""


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """How well the proxy itself tells the documents of its concept, the most that a latent of the
    concept can reach against the proxy, and the other way round.

    Attributes:
      labels: the labels of these documents: the one of the concept's name, or else those of which
        most tokens are inside.
      tokens: how many tokens they have.
      precision: the share of the tokens inside that are theirs.
      recall: the share of theirs that are inside.
      f1: the harmonic mean of both.
      pearson: the correlation of the proxy and of being theirs: that of a perfect latent of the
        documents with the proxy.
    """

    labels: list[str]
    tokens: int
    precision: float | None
    recall: float | None
    f1: float
    pearson: float | None


@dataclasses.dataclass(frozen=True)
class Partner:
    """A unit that goes with a concept's best latent.

    Attributes:
      unit: its number.
      pearson: the correlation of their activations; None where one is constant.
    """

    unit: int
    pearson: float | None


@dataclasses.dataclass(frozen=True)
class Concept:
    """What was found for one proxy.

    Attributes:
      name: the concept.
      kind: the group of the proxy.
      tokens: how many tokens of the half that is measured on are inside.
      share: what part of them.
      said: in words whether there is a latent for it.
      latents: the best latents, the one first that went best with the proxy on the other half.
      latents_inside: how many latents have most of their tokens inside: the concept may be split
        over many, of which none tells it alone.
      ceiling: see `Ceiling`; None without labels.
      neuron: the best neuron; None where none were given.
      neuron_of_latent: the neuron that goes best with the best latent, or the other way round.
      other: the latent of the other SAE that goes best with the best latent.
      controls: the best unit of each control that has one, by the control's name.
      logit_weights: those of the best latent; None where they are not known.
      steering: what the model writes with the best latent; empty where that was not asked for.
    """

    name: str
    kind: str
    tokens: int
    share: float
    said: str
    latents: list[Unit]
    latents_inside: int
    ceiling: Ceiling | None = None
    neuron: Unit | None = None
    neuron_of_latent: Partner | None = None
    other: Partner | None = None
    controls: dict[str, Unit] = dataclasses.field(default_factory=dict)
    logit_weights: LogitWeights | None = None
    steering: list[Steered] = dataclasses.field(default_factory=list)

    @property
    def has_latent(self) -> bool:
        """Whether the best latent tells the concept with F1 of at least `SPECIFIC`."""
        return bool(self.latents) and self.latents[0].at_best.f1 >= SPECIFIC


@dataclasses.dataclass(frozen=True)
class Specificity:
    """What was found for all proxies.

    Attributes:
      settings: what was looked at.
      concepts: the concepts, by group and name.
    """

    settings: dict
    concepts: list[Concept]

    def of(self, name: str) -> Concept:
        """Returns what was found for a proxy. Raises UserError if there is none of that name."""
        named = {concept.name: concept for concept in self.concepts}
        return named[choose(name, named, "the concept")]
