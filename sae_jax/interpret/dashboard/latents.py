"""Makes what the dashboard shows of a latent, and of all of them, from a collection."""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import msgspec
import numpy as np

from sae_jax import lm
from sae_jax.interpret.collection import Collection
from sae_jax.interpret.collection import Example as Window
from sae_jax.interpret.dashboard.explanations import Explained
from sae_jax.interpret.dashboard.hints import hints
from sae_jax.interpret.dashboard.labels import Labels
from sae_jax.interpret.dashboard.neighbours import Neighbours
from sae_jax.interpret.dashboard.neurons import Neurons
from sae_jax.interpret.effects import OutputTokens, output_tokens, used_tokens
from sae_jax.interpret.explain.labels import Said
from sae_jax.interpret.text import interval_names, pieces, token_name, token_text
from sae_jax.sae import SAE

_SEQUENCES_KEPT = 2**14  # whose text is kept


@dataclasses.dataclass(frozen=True)
class Example:
    """A text on which a latent is active, as the page shows it.

    Attributes:
      sequence: the number of the sequence in the store or text.
      start: the position of the first token.
      peak: which piece is the most active.
      pieces: the text, cut between characters and as finely as tokens are.
      values: the activations of the tokens of each piece, a list of lists, as JSON: so many lists
        would take far longer to make than to write.
      tokens: the tokenizer's names for the tokens of each piece, where a piece has several.
    """

    sequence: int
    start: int
    peak: int
    pieces: list[str]
    values: msgspec.Raw
    tokens: list[list[str]] | msgspec.UnsetType = msgspec.UNSET


@dataclasses.dataclass(frozen=True)
class Counts:
    """A histogram with bins of one width from `low` to `high`."""

    low: float
    high: float
    counts: list[int]


@dataclasses.dataclass(frozen=True)
class Latent:
    """What the page shows of a latent. Activations are lengths in the model's units.

    Attributes:
      index: the number of the latent.
      density: the part of the tokens on which it fires.
      mean: its mean activation where it fires.
      max: its largest activation.
      label: what it is called, if anything.
      score: how good the label is, if that is known.
      histogram: the counts of activations above zero, in equal parts of 0 to the maximum.
      promoted: the output tokens that it promotes most, with values; None where it is not known.
      suppressed: the output tokens that it suppresses most.
      logit_histogram: its effects on all output tokens.
      groups: the examples with the highest peaks, then those of each interval, the highest first.
      neighbours: the latents with the most similar decoder rows, with cosines.
      coactive: the latents that fire on the same tokens, with Jaccard indices.
      neurons: the most correlated neurons, with Pearson correlations; None where not known.
      explanations: all that was said of it, with scores; left out where nothing was explained.
    """

    index: int
    density: float
    mean: float
    max: float
    label: str | None
    score: float | None
    histogram: list[int]
    promoted: list[tuple[str, float]] | None
    suppressed: list[tuple[str, float]] | None
    logit_histogram: Counts | None
    groups: list[list[Example]]
    neighbours: list[tuple[int, float]]
    coactive: list[tuple[int, float]]
    neurons: list[tuple[int, float]] | None
    explanations: list[Said] | msgspec.UnsetType = msgspec.UNSET


class Latents:
    """Makes what the page shows of the latents of a collection."""

    def __init__(
        self,
        collection: Collection,
        sae: SAE,
        tokenizer: lm.Tokenizer,
        model: lm.LanguageModel | None = None,
        *,
        written_site: str | None = None,
        labels: Labels | None = None,
        neurons: Neurons | None = None,
        explained: Explained | None = None,
    ):
        """Takes what latents are shown from; nothing is read yet.

        Args:
          collection: the examples.
          sae: the SAE that they are of.
          tokenizer: what turns tokens into text.
          model: the language model. Without it, and where it is run by transformers, no output
            tokens are shown.
          written_site: the site that the SAE writes to; None where there are several.
          labels: what latents are called; by default the best explanation of each.
          neurons: the neurons that they are correlated with.
          explained: what was said of them.
        """
        self.collection, self.sae, self.tokenizer = collection, sae, tokenizer
        self.labels = labels or (explained.labels if explained else Labels())
        self.neurons, self.explained = neurons, explained
        self._model, self._site = model, written_site
        self._neighbours = Neighbours(sae)
        self._texts: dict[int, _Text] = {}  # by the number of the sequence, the latest last

    @property
    def language_model(self) -> str | None:
        """The fingerprint of the language model; None without one."""
        return self._model and self._model.fingerprint

    @property
    def group_names(self) -> list[str]:
        """The names of the groups of examples."""
        return ["highest", *interval_names(self.collection.about.intervals)]

    def hints(self) -> dict[int, str]:
        """Returns the tokens on which each latent peaks, as text, by its number."""
        return hints(self.collection, self.tokenizer)

    def columns(self) -> np.ndarray:
        """Returns density, mean and largest activation, and score (NaN: none): (4, d_sae)."""
        found = self.collection
        score = np.full(found.about.d_sae, np.nan, np.float32)
        score[list(self.labels.scores)] = list(self.labels.scores.values())
        columns = (found.density, found.mean_activation, found.max_activation, score)
        return np.stack(columns).astype("<f4")

    def make(self, numbers: Sequence[int]) -> list[Latent]:
        """Returns the latents of these numbers."""
        numbers = np.asarray(numbers, np.int64)
        neighbours = self._neighbours.find(numbers)
        effects = None
        if self._model is not None and self._site is not None:
            effects = output_tokens(self.sae, self._model, self._site, numbers, used=self._used)
        return [
            self._latent(int(number), near, self._effects(effects, place))
            for place, (number, near) in enumerate(zip(numbers, neighbours, strict=True))
        ]

    @functools.cached_property
    def _used(self) -> np.ndarray:
        return used_tokens(self.tokenizer, self._model.vocab_size)

    def _latent(self, number: int, neighbours, effects: dict) -> Latent:
        found = self.collection
        largest = float(found.max_activation[number])
        return Latent(
            number,
            short(found.density[number]),
            short(found.mean_activation[number]),
            short(largest),
            self.labels.names.get(number),
            self.labels.scores.get(number),
            found.histogram[number].tolist(),
            **effects,
            groups=[[self._example(w, largest) for w in g] for g in found.examples(number)],
            neighbours=[(latent, short(cosine)) for latent, cosine in neighbours],
            coactive=[(latent, short(jaccard)) for latent, jaccard in found.coactive(number)],
            neurons=None if self.neurons is None else self.neurons.of(number),
            explanations=self.explained.of(number) if self.explained else msgspec.UNSET,
        )

    def _effects(self, effects: OutputTokens | None, place: int) -> dict:
        if effects is None:
            return {"promoted": None, "suppressed": None, "logit_histogram": None}

        def pairs(tokens, values) -> list[tuple[str, float]]:
            named = zip(tokens[place], values[place], strict=True)
            return [(token_text(self.tokenizer, token), short(value)) for token, value in named]

        low, high = short(effects.low[place]), short(effects.high[place])
        return {
            "promoted": pairs(effects.promoted, effects.promoted_values),
            "suppressed": pairs(effects.suppressed, effects.suppressed_values),
            "logit_histogram": Counts(low, high, effects.histogram[place].tolist()),
        }

    def _example(self, window: Window, largest: float) -> Example:
        text = self._text(window)
        first = bisect.bisect_right(text.starts, window.start) - 1
        last = bisect.bisect_left(text.starts, window.stop)
        decimals = 3 - math.floor(math.log10(largest)) if largest > 0 else 0
        values = np.round(window.activations.astype(np.float64), decimals).tolist()
        cuts = [start - window.start for start in text.starts[first:last]]
        cuts = [0, *cuts[1:], len(values)]
        tokens = msgspec.UNSET
        if len(cuts) > len(values):  # a token each
            shown = f"[[{str(values)[1:-1].replace(', ', '],[')}]]"
        else:
            shown = str([values[a:b] for a, b in itertools.pairwise(cuts)])
            names = [token_name(self.tokenizer, i) for i in window.ids[window.start : window.stop]]
            tokens = [names[a:b] if b > a + 1 else [] for a, b in itertools.pairwise(cuts)]
        peak = bisect.bisect_right(text.starts, window.peak) - 1 - first
        return Example(
            window.sequence,
            window.start,
            peak,
            text.texts[first:last],
            msgspec.Raw(shown.encode()),
            tokens,
        )

    def _text(self, window: Window) -> "_Text":
        text = self._texts.pop(window.sequence, None)
        if text is None:
            found = pieces(self.tokenizer, window.ids)
            text = _Text([p.start for p in found], [p.text for p in found])
            if len(self._texts) >= _SEQUENCES_KEPT:
                del self._texts[next(iter(self._texts))]
        self._texts[window.sequence] = text
        return text


@dataclasses.dataclass(frozen=True)
class _Text:
    """A whole sequence as text: where each piece starts, and the pieces."""

    starts: list[int]
    texts: list[str]


def short(number: float) -> float:
    """Returns a number with six significant digits, which is what float32 is good for."""
    return float(f"{float(number):.6g}")
