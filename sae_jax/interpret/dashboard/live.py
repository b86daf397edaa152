"""What a page can ask of the SAE and its language model: the API of the dashboard's server.

A request is an object of JSON, and so is an answer; the classes here are their formats. Whatever
is wrong with a request is a UserError.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import numpy as np
import scipy.sparse
from msgspec import Meta

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.evaluate.metrics import activation_scale
from sae_jax.evaluate.sources import input_and_target_sites
from sae_jax.interpret.ablation import ablation_effects
from sae_jax.interpret.dashboard.latents import Latents, short
from sae_jax.interpret.dashboard.search import TextSearch
from sae_jax.interpret.text import Piece, pieces
from sae_jax.json_files import checked

SINK = 10  # times the median norm of a text's tokens: such activations are no text's (see `Live`)
_MOST_TEXTS, _MOST_TOKENS = 32, 1024
_MOST_NEW_TOKENS = 400
_AT_ONCE = 2**24  # elements of the dense latents of a few tokens
_PER_TOKEN = 8  # latents that are shown of a token

_Text = Annotated[str, Meta(max_length=20_000)]
_Texts = Annotated[list[_Text], Meta(max_length=_MOST_TEXTS)]


@dataclasses.dataclass(frozen=True)
class Encode:
    """Asks which latents are active in all of some texts, and in none of others.

    Attributes:
      texts: the texts.
      negatives: texts on which the latents must not be active.
      top: how many latents are wanted.
      sort: by the largest activation, the mean over tokens, or the part of the tokens; of several
        texts the mean counts.
    """

    texts: Annotated[_Texts, Meta(min_length=1)]
    negatives: _Texts = dataclasses.field(default_factory=list)
    top: Annotated[int, Meta(ge=1, le=1000)] = 20
    sort: Literal["max", "mean", "frequency"] = "max"


@dataclasses.dataclass(frozen=True)
class Clamp:
    """Sets a latent to `factor` times its maximum."""

    latent: Annotated[int, Meta(ge=0)]
    factor: Annotated[float, Meta(ge=-1e6, le=1e6)]


@dataclasses.dataclass(frozen=True)
class Generate:
    """Asks how the model goes on with a text, untouched and with latents clamped."""

    prompt: _Text
    clamps: Annotated[list[Clamp], Meta(max_length=64)] = dataclasses.field(default_factory=list)
    max_new_tokens: Annotated[int, Meta(ge=1, le=_MOST_NEW_TOKENS)] = 40
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0


@dataclasses.dataclass(frozen=True)
class Ablate:
    """Asks what the tokens of an example lose where a latent is ablated."""

    latent: Annotated[int, Meta(ge=0)]
    sequence: Annotated[int, Meta(ge=0)]
    start: Annotated[int, Meta(ge=0)]
    stop: Annotated[int, Meta(ge=1)]


@dataclasses.dataclass(frozen=True)
class Search:
    """Asks which latents have a text in their label, their explanations or their examples."""

    query: Annotated[str, Meta(max_length=1000)]
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 100


class Live:
    """Answers requests.

    BOS, other special tokens and sinks do not count when a text is encoded. A sink is a token
    whose activation's norm is more than 10 times the median of the text's: a few early tokens have
    such norms whatever they are, and would be first in every list.
    """

    def __init__(self, latents: Latents, model: lm.LanguageModel | None, sites: Sequence[str]):
        """Takes what requests are answered from.

        Args:
          latents: the latents, with their collection, SAE and tokenizer.
          model: the language model. Without it only `search` is answered.
          sites: the sites of the SAE, a transcoder's target last.
        """
        self._latents, self._model, self._sites = latents, model, tuple(sites)
        self._sae = latents.sae
        self._search = TextSearch(
            latents.collection,
            latents.tokenizer,
            latents.labels,
            latents.explained.texts if latents.explained else {},
        )
        self._activations = jax.jit(lambda sae, x: sae.encode(x) * activation_scale(sae))

    @property
    def can(self) -> dict[str, bool]:
        """The requests by name, and whether each is answered."""
        ours, kind = isinstance(self._model, lm.JaxModel), self._sae.config.kind
        return {
            "encode": self._model is not None,
            "generate": ours and kind != "crosscoder",
            "ablate": ours and kind == "autoencoder",
            "search": True,
        }

    def answer(self, name: str, values) -> dict | None:
        """Returns the answer to a request, as JSON has both; None if there is none of the name.

        Raises UserError where it cannot be answered, in words that say why.
        """
        known = {
            "encode": (Encode, self.encode),
            "generate": (Generate, self.generate),
            "ablate": (Ablate, self.ablate),
            "search": (Search, self.search),
        }
        if name not in known:
            return None
        if not self.can[name]:
            if self._model is None:
                raise UserError("this needs the language model: start the server with --model=DIR")
            raise UserError(
                f"there is no {name} for a {self._sae.config.kind} in {self._model.spec}: it needs "
                f"{'an autoencoder' if name == 'ablate' else 'an SAE of one site or a transcoder'}"
                ", and a model that torch: does not run"
            )
        schema, function = known[name]
        return function(checked(values, schema, "the request"))

    def encode(self, request: Encode) -> dict:
        """Returns the latents that are active in all texts and in no negative one, and the latents
        of each token."""
        texts, negatives = (
            [self._encoded(text) for text in part] for part in (request.texts, request.negatives)
        )
        active = np.all([text.largest > 0 for text in texts], axis=0)
        active &= ~np.any([text.largest > 0 for text in negatives], axis=0)
        score = np.mean([getattr(text, _STATISTICS[request.sort]) for text in texts], axis=0)
        found = np.flatnonzero(active)
        found = found[np.argsort(-score[found], kind="stable")][: request.top]
        names = self._latents.labels.names
        columns = [text.activations[:, found].toarray() for text in texts]
        return {
            "texts": [text.shown() for text in texts],
            "negatives": [text.shown() for text in negatives],
            "latents": [
                {
                    "index": int(latent),
                    "score": short(score[latent]),
                    "max": short(max(text.largest[latent] for text in texts)),
                    "label": names.get(int(latent)),
                    "values": [[short(v) for v in values[:, place]] for values in columns],
                }
                for place, latent in enumerate(found)
            ],
        }

    def generate(self, request: Generate) -> dict:
        """Returns how the model goes on with the prompt, untouched and with latents clamped."""
        numbers = [clamp.latent for clamp in request.clamps]
        for latent in numbers:
            self._check_latent(latent)
            if numbers.count(latent) > 1:
                raise UserError(f"latent {latent} is clamped twice; leave one")
        largest = self._latents.collection.max_activation
        values = [clamp.factor * float(largest[clamp.latent]) for clamp in request.clamps]
        edits = lm.latent_edits(self._sae, self._sites, numbers, values) if numbers else {}
        clean, steered = (
            lm.generate(
                self._model,
                [request.prompt],
                max_new_tokens=request.max_new_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
                edits=some,
            )[0].text
            for some in (None, edits or None)
        )
        return {"clean": clean, "steered": steered}

    def ablate(self, request: Ablate) -> dict:
        """Returns by how much the latent, at all positions, raises the log-probability of each
        token of an example: what the token loses where the latent is ablated."""
        self._check_latent(request.latent)
        groups = self._latents.collection.examples(request.latent)
        windows = [window for group in groups for window in group]
        ids = next((w.ids for w in windows if w.sequence == request.sequence), None)
        if ids is None:
            raise UserError(
                f"sequence {request.sequence} is in no example of latent {request.latent}"
            )
        if not request.start < request.stop <= len(ids):
            raise UserError(
                f"start and stop are {request.start} and {request.stop}, of {len(ids)} tokens"
            )
        (site,) = self._sites
        effects = ablation_effects(self._model, self._sae, site, request.latent, np.asarray(ids))
        return {"effects": [short(v) for v in effects[request.start : request.stop]]}

    def search(self, request: Search) -> dict:
        """Returns the latents with the query in their label or explanations, or else in their
        examples."""
        return {"latents": self._search.find(request.query, request.limit)}

    def _check_latent(self, latent: int) -> None:
        if latent >= self._sae.config.d_sae:
            raise UserError(f"no latent {latent}: there are 0 to {self._sae.config.d_sae - 1:,}")

    def _encoded(self, text: str) -> "_Encoded":
        """Runs the model and the SAE on a text."""
        tokenizer = self._latents.tokenizer
        ids = tokenizer.encode(text)
        most = min(self._model.max_context - 1, _MOST_TOKENS)
        if not 0 < len(ids) <= most:
            raise UserError(f"a text of {len(ids):,} tokens; it must have 1 to {most:,}")
        length = min(self._model.max_context, max(16, 1 << len(ids).bit_length()))
        tokens = np.full((1, length), tokenizer.bos, np.int32)  # padding: nothing looks ahead
        tokens[0, 1 : len(ids) + 1] = ids
        inputs, _ = input_and_target_sites(self._sae.config.kind, self._sites)
        _, taps = self._model.forward(tokens, taps=inputs, logits=False)
        x = np.concatenate([np.asarray(taps[site][0], np.float32) for site in inputs], axis=-1)
        x = x[1 : len(ids) + 1]
        norms = np.linalg.norm(x, axis=1)
        counted = ~np.isin(ids, tokenizer.marks) & (norms <= SINK * np.median(norms))
        size = min(64, max(8, _AT_ONCE // self._sae.config.d_sae))
        parts = []
        for first in range(0, len(x), size):
            part = x[first : first + size]
            values = self._activations(self._sae, np.pad(part, ((0, size - len(part)), (0, 0))))
            values = np.maximum(values, 0)[: len(part)] * counted[first : first + size, None]
            parts.append(scipy.sparse.csr_array(values))
        return _Encoded(
            pieces(tokenizer, np.asarray(ids)), scipy.sparse.vstack(parts, "csr"), counted
        )


_STATISTICS = {"max": "largest", "mean": "mean", "frequency": "frequency"}


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """A text with the activations (tokens, d_sae) of its tokens, which are 0 where not counted."""

    pieces: list[Piece]
    activations: scipy.sparse.csr_array
    counted: np.ndarray

    @functools.cached_property
    def largest(self) -> np.ndarray:
        return self.activations.max(axis=0).toarray().reshape(-1)

    @property
    def mean(self) -> np.ndarray:
        return self.activations.sum(axis=0) / max(1, self.counted.sum())

    @property
    def frequency(self) -> np.ndarray:
        return (self.activations > 0).sum(axis=0) / max(1, self.counted.sum())

    def shown(self) -> dict:
        """Returns the text, and the most active latents of each token, as JSON has them."""
        tokens = []
        for first, last in itertools.pairwise(self.activations.indptr):
            values, latents = (
                self.activations.data[first:last],
                self.activations.indices[first:last],
            )
            best = np.argsort(-values, kind="stable")[:_PER_TOKEN]
            tokens.append([(int(latents[i]), short(values[i])) for i in best])
        return {
            "pieces": [piece.text for piece in self.pieces],
            "stops": [piece.stop for piece in self.pieces],
            "tokens": tokens,
        }
