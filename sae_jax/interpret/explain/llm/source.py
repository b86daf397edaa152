"""What explanations and their tests are made of: a text, its tokenizer, and output tokens."""

import dataclasses
import functools
import zlib

import numpy as np

from sae_jax import lm
from sae_jax.errors import UserError, choose
from sae_jax.interpret.activity import Activity
from sae_jax.interpret.collection import Example
from sae_jax.interpret.effects import OutputTokens, output_tokens, used_tokens
from sae_jax.interpret.explain.examples import Drawn, Wanted, draw
from sae_jax.interpret.explain.llm.writing import Shown, show
from sae_jax.sae import SAE

WEIGHTS = 60
"""How many output tokens of a latent are looked at, the most promoted first (Bricken et al.)."""

LEAST = 5
"""On how many held-out sequences a latent must be active to be tested."""

NEGATIVES = ("random", "same_tokens")
"""Where windows without the latent are from: anywhere, or around its own tokens, which is hard."""


@dataclasses.dataclass(frozen=True)
class LogitWeights:
    """The output tokens that latents promote and suppress most.

    Attributes:
      latents: the numbers of the latents, (L,).
      tokens: their output tokens, a row each, `WEIGHTS` of them where the vocabulary has so many.
      used: which tokens text can have, (vocab_size,) bool.
    """

    latents: np.ndarray
    tokens: OutputTokens
    used: np.ndarray

    def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids that a latent promotes, and those that it suppresses, the most first.

        Raises UserError if it is not among the latents.
        """
        row = np.flatnonzero(self.latents == latent)
        if not len(row):
            raise UserError(f"no output tokens were computed for latent {latent}")
        return self.tokens.promoted[row[0]], self.tokens.suppressed[row[0]]


def logit_weights(
    sae: SAE, model: lm.LanguageModel, site: str, latents: np.ndarray
) -> LogitWeights | None:
    """Returns the output tokens of latents; None and UserError as of `effects.output_tokens`."""
    used = used_tokens(model.tokenizer, model.vocab_size)
    found = output_tokens(sae, model, site, latents, WEIGHTS, used)
    return None if found is None else LogitWeights(np.asarray(latents), found, used)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Everything that prompts are made of.

    Attributes:
      activity: where the latents are active.
      tokenizer: the tokenizer of its text.
      effects: the latents' output tokens, None where they are not known.
      seed: the seed of what is drawn.
      negatives: which of `NEGATIVES` detection, fuzzing and intruders take.
    """

    activity: Activity
    tokenizer: lm.Tokenizer
    effects: LogitWeights | None = None
    seed: int = 0
    negatives: str = "random"

    def __post_init__(self):
        choose(self.negatives, NEGATIVES, "negatives")

    def draw(self, latent: int, wanted: Wanted, held_out: bool) -> Drawn:
        """Returns windows of a latent, as `examples.draw` does."""
        return _drawn(self, latent, wanted, held_out)

    def windows(self, latent: int, held_out: bool) -> int:
        """Returns on how many sequences of a half a latent is active."""
        rows, _ = self.activity.of(latent)
        sequences = np.unique(rows // self.activity.tokens.shape[1])
        return int((self.activity.held_out[sequences] == held_out).sum())

    def random(self, latent: int, purpose: str) -> np.random.Generator:
        """Returns random numbers for one purpose of one latent, the same whatever else is done."""
        return np.random.default_rng([self.seed, latent, zlib.crc32(purpose.encode())])

    def show(self, examples: list[Example]) -> list[Shown]:
        """Returns windows as people read them."""
        return [show(self.tokenizer, example) for example in examples]

    def maximum(self, latent: int) -> float:
        """Returns a latent's largest activation."""
        return float(self.activity.max_activation[latent])


@functools.lru_cache(16)  # of a latent, detection, fuzzing and intruders have the same windows
def _drawn(source: Source, latent: int, wanted: Wanted, held_out: bool) -> Drawn:
    return draw(source.activity, latent, wanted, held_out=held_out, seed=source.seed)


def by_strength(examples: list[Example], count: int, random: np.random.Generator) -> list[Example]:
    """Returns `count` windows drawn with probabilities in proportion to their peaks (SAEBench)."""
    peaks = np.array([example.activations.max() for example in examples])
    keys = np.log(random.random(len(peaks))) / peaks  # Efraimidis & Spirakis 2006
    return [examples[i] for i in np.argsort(-keys, kind="stable")[:count]]
