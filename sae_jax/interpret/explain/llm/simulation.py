"""Simulates latents by a language model of ours, from what its logits say of every token at once.

An explanation is followed by the tokens of a window, each with the word "unknown" in place of its
activation. Where that word stands, the model's probabilities of the numbers 0 to 10 give an
expected activation (all-at-once simulation of Bills et al. 2023, "Language models can explain
neurons in language models"). The score is Pearson's correlation over the tokens of all windows of
a latent together. No API gives probabilities of a prompt's tokens, so the model is a directory's.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.interpret.explain.examples import Wanted
from sae_jax.interpret.explain.llm import measures
from sae_jax.interpret.explain.llm.prompts import built_in
from sae_jax.interpret.explain.llm.source import LEAST, Source
from sae_jax.interpret.explain.llm.writing import quoted

PROMPT = built_in("score_simulation")
_WANTED = Wanted(top=5, random=5, before=31, after=32)
_BLOCK = 64  # prompts are padded to a multiple, so that few programs are compiled


class Simulator:
    """A language model that predicts activations.

    Attributes:
      judge: the model.
      scale: its largest number: 10, or 9 where its tokenizer cuts 10 in two.
    """

    def __init__(self, judge: lm.LanguageModel):
        """Takes a model. Raises UserError if a number is not a token of it."""
        self.judge = judge
        tokenizer = judge.tokenizer
        self.scale = 10 if len(tokenizer.encode("10")) == 1 else 9
        ids = [tokenizer.encode(str(number)) for number in range(self.scale + 1)]
        if any(len(found) != 1 for found in ids):
            raise UserError(
                f"{tokenizer.name} cannot simulate: numbers are not single tokens of it"
            )
        self._numbers = jnp.array([found[0] for found in ids])

    def score(self, source: Source, latent: int, explanation: str) -> tuple[float | None, int]:
        """Returns how well what is predicted agrees with a latent's activations, from -1 to 1.

        Returns:
          Pearson's correlation over the tokens of 5 windows with the latent's highest peaks and 5
          without it, of the held-out half; None where it is active on too few sequences. And how
          many windows there are.
        """
        if source.windows(latent, held_out=True) < LEAST:
            return None, 0
        drawn = source.draw(latent, _WANTED, held_out=True)
        shown = source.show([*drawn.top, *drawn.random])
        truth = np.concatenate([window.activations for window in shown])
        predicted = np.concatenate([self.predict(explanation, w.tokens) for w in shown])
        return measures.pearson(truth, predicted), len(shown)

    def predict(self, explanation: str, tokens: Sequence[str]) -> np.ndarray:
        """Returns the expected activation of each token, from 0 to `scale`, (n,).

        Raises UserError if the prompt is longer than the model's context.
        """
        ids, places = self.prompt(explanation, tokens)
        if len(ids) > self.judge.max_context:
            raise UserError(
                f"simulating takes {len(ids)} tokens, and the context of {self.judge.spec} has "
                f"{self.judge.max_context}; give a model with a longer one"
            )
        length = min(-len(ids) % _BLOCK + len(ids), self.judge.max_context)
        padded = np.pad(ids, (0, length - len(ids)), mode="edge")[None]
        logits, _ = self.judge.forward(padded)
        padding = (0, length - len(places))
        found = _expected(logits, np.pad(places, padding), self._numbers)
        return np.asarray(found)[: len(places)]

    def prompt(self, explanation: str, tokens: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of a prompt, and where the logits of each token's activation are.

        The parts are turned into ids one by one, so that these places are known.
        """
        tokenizer = self.judge.tokenizer
        values = {"explanation": quoted(explanation), "top": self.scale, "examples": ""}
        ((_, text),) = PROMPT.messages(values)
        texts = [f"{text}\n", *(f"{token}\t" for token in tokens), "unknown\n"]
        head, *parts, unknown = tokenizer.encode_batch(texts)
        ids, places = [tokenizer.bos, *head], []
        for part in parts:
            ids += part
            places.append(len(ids) - 1)
            ids += unknown
        return np.array(ids, np.int32), np.array(places, np.int32)


@functools.partial(jax.jit)
def _expected(logits_1xTxV, places_T, numbers_N) -> jax.Array:
    """Returns the expected number at each place, of those that are numbers."""
    share_TxN = jax.nn.softmax(logits_1xTxV[0][places_T][:, numbers_N], axis=-1)
    return share_TxN @ jnp.arange(len(numbers_N), dtype=jnp.float32)
