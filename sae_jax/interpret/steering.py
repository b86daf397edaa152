"""Steers a language model, and measures what that does to it.

A push (`pushes`) changes activations by as much as a factor says. `measure` compares the model that
it steers with the untouched one on texts, in nats a token:

    kl             KL(untouched || steered) of the next token
    ce             cross-entropy of the text under the steered model
    ce_increase    ce less that of the untouched model
    token_logprob  log of the probability that the next token is one of a set

`measure_samples` looks at what the steered model writes:

    distinct_1, distinct_2  distinct n-grams of tokens over all n-grams of a sample, on average
    clean_ce                cross-entropy of the samples under the untouched model: what it finds
                            unlikely is often no language any more
    concept                 the share of samples in which a regular expression is found
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.evaluate.batching import pad_rows, sequences_at_once
from sae_jax.interpret.pushes import Push
from sae_jax.lm.generate import as_generated
from sae_jax.lm.sampling import Rules

POSITIONS = ("all", "no_bos", "prompt", "continuation")
UNTOUCHED = "untouched"
_LENGTHS = 16  # tokens that the lengths of texts are rounded up to


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts to measure on.

    Attributes:
      tokens: token ids (n, T); what is behind a text is any token.
      counts: the positions whose next token is looked at, (n, T) bool; False at the last.
      steered: the positions that are steered, (n, T) bool.
    """

    tokens: np.ndarray
    counts: np.ndarray
    steered: np.ndarray


@dataclasses.dataclass(frozen=True)
class Writing:
    """How a model goes on after prompts; the fields are those of `lm.generate`."""

    max_new_tokens: int = 40
    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0
    samples: int = 3


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a model wrote after a prompt.

    Attributes:
      prompt: the prompt.
      text: what follows.
    """

    prompt: str
    text: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one push did at one factor.

    Attributes:
      push: the push's name, or `UNTOUCHED`.
      factor: the factor; 0 of the untouched model.
      measures: the measures above, by name.
      samples: what the model wrote.
    """

    push: str
    factor: float
    measures: dict[str, float | None]
    samples: list[Sample]


@dataclasses.dataclass(frozen=True)
class Steering:
    """A model, what pushes it, and what is looked at.

    Attributes:
      model: the language model.
      pushes: the pushes.
      texts: the texts to measure on; None: none.
      prompts: the prompts' token ids.
      writing: how the model goes on after them.
      positions: which positions are steered in what the model writes, one of `POSITIONS`.
      special: the ids of tokens that `no_bos` leaves out.
      same_norm: whether steered activations keep the norm that they had.
      token_set: the ids of the tokens for token_logprob.
      concept: the regular expression that is looked for in samples; None: none.
    """

    model: lm.LanguageModel
    pushes: Sequence[Push]
    texts: Texts | None = None
    prompts: Sequence[Sequence[int]] = ()
    writing: Writing = Writing()  # noqa: RUF009, frozen
    positions: str = "all"
    special: Sequence[int] = ()
    same_norm: bool = False
    token_set: Sequence[int] = ()
    concept: str | None = None

    def untouched(self) -> Outcome:
        """Returns what is measured of the model as it is, and what it writes."""
        measures = {}
        if self.texts is not None:
            measures = measure(self.model, self.texts, [], 0.0, self.token_set)[0]
        return self._outcome(None, 0.0, measures)

    def at(self, factor: float) -> list[Outcome]:
        """Returns what each push does at a factor.

        Raises UserError if no position of the texts counts, and as edits and `lm.generate` do.
        """
        measures = [{} for _ in self.pushes]
        if self.texts is not None:
            _, *measures = measure(
                self.model, self.texts, self.pushes, factor, self.token_set, self.same_norm
            )
        return [
            self._outcome(push, factor, of_push)
            for push, of_push in zip(self.pushes, measures, strict=True)
        ]

    def _outcome(self, push: Push | None, factor: float, measures: dict) -> Outcome:
        name, samples = push.name if push else UNTOUCHED, []
        if self.prompts and self.writing.samples:
            written = self._write(push, factor)
            measures = measures | measure_samples(self.model, written, self.concept)
            samples = [Sample(self._said(text.prompt), text.text) for text in written]
        return Outcome(name, factor, measures, samples)

    def _said(self, prompt: Sequence[int]) -> str:
        tokenizer = self.model.tokenizer
        return tokenizer.decode(prompt[prompt[0] == tokenizer.bos :])

    def _write(self, push: Push | None, factor: float) -> list[lm.Generated]:
        """Returns what the model writes after each prompt."""
        options = dataclasses.asdict(self.writing)
        if push is None:
            return lm.generate(self.model, self.prompts, **options)
        if push.reads:
            return [
                text for prompt in self.prompts for text in self._write_anew(prompt, push, factor)
            ]
        edits = push.edits(factor, {})
        if self.positions in ("all", "no_bos"):
            return lm.generate(self.model, self.prompts, edits=self._placed(edits, 0), **options)
        return [  # each by itself, since each has its own length
            text
            for prompt in self.prompts
            for text in lm.generate(
                self.model, [prompt], edits=self._placed(edits, len(prompt)), **options
            )
        ]

    def _write_anew(self, prompt: Sequence[int], push: Push, factor: float) -> list[lm.Generated]:
        """Returns the same for one prompt, without a cache.

        The untouched model has to run on every text so far, and then the steered one.
        """
        how, model, count = self.writing, self.model, len(prompt)
        rules = Rules(how.max_new_tokens, how.temperature, how.top_p, how.seed, model.eos)
        room = min(how.max_new_tokens, model.max_context - count)
        tokens = np.zeros((how.samples, count + room), np.int32)
        tokens[:, :count] = prompt
        for step in range(room):
            _, clean = model.forward(tokens, taps=push.reads, logits=False)
            edits = self._placed(push.edits(factor, clean), count)
            logits, _ = model.forward(tokens, edits=edits)
            last = logits[:, count + step - 1]
            tokens[:, count + step] = rules.next_tokens(last, np.arange(how.samples), step)
            if np.isin(tokens[:, count : count + step + 1], model.eos).any(axis=1).all():
                break
        return [
            as_generated(model, prompt, prompt, sample, _until(row[count:], model.eos), rules)
            for sample, row in enumerate(tokens)
        ]

    def _placed(self, edits: dict, length: int) -> dict:
        """Returns the edits at the chosen positions of texts whose prompts are `length` long."""
        wrap = {
            "all": lambda edit: edit,
            "no_bos": lambda edit: lm.unless(self.special, edit),
            "prompt": lambda edit: lm.at(Partial(_before, length), edit),
            "continuation": lambda edit: lm.at(Partial(_after, length), edit),
        }[self.positions]
        return _wrapped(edits, wrap, self.same_norm)


def texts_of(
    tokens: np.ndarray, is_text: np.ndarray, special: Sequence[int], positions: str = "all"
) -> Texts:
    """Returns texts to measure on, in which all positions are steered, or those of no special
    token.

    Special tokens neither count nor are they predicted.

    Args:
      tokens: token ids (n, T).
      is_text: which of them are no padding, (n, T) bool.
      special: the ids of tokens that are no text.
      positions: all, or else special tokens are not steered.
    """
    is_word = is_text & ~np.isin(tokens, special)
    steered = is_text if positions == "all" else is_word
    return Texts(tokens, _predicting(is_word), steered)


def own_texts(
    model: lm.LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    special: Sequence[int],
    positions: str,
) -> Texts:
    """Returns the prompts with what the untouched model most likely goes on with, to measure on.

    The tokens that it wrote count.

    Args:
      model: the language model.
      prompts: the prompts' token ids.
      max_new_tokens: the most tokens after a prompt.
      special: the ids of tokens that are no text.
      positions: which positions are steered, one of `POSITIONS`.
    """
    written = lm.generate(model, prompts, max_new_tokens=max_new_tokens)
    tokens, is_new, is_text = _side_by_side(
        prompts, [text.tokens for text in written], model.max_context
    )
    steered = {
        "all": is_text,
        "no_bos": is_text & ~np.isin(tokens, special),
        "prompt": is_text & ~is_new,
        "continuation": is_new,
    }[positions]
    return Texts(tokens, _predicting(is_new, is_text), steered)


def measure(
    model: lm.LanguageModel,
    texts: Texts,
    pushes: Sequence[Push],
    factor: float,
    token_set: Sequence[int] = (),
    same_norm: bool = False,
) -> list[dict[str, float]]:
    """Returns the measures of texts, first of the untouched model and then of each push.

    Raises UserError if no position counts.

    Args:
      model: the language model.
      texts: what to measure on.
      pushes: the pushes.
      factor: the factor of all of them.
      token_set: the ids of the tokens for token_logprob; without any it is left out.
      same_norm: whether steered activations keep the norm that they had.
    """
    if not texts.counts.any():
        raise UserError("there is no position to measure on; give longer --text")
    ids = jnp.asarray(np.asarray(token_set, np.int32))
    size = sequences_at_once(model.vocab_size, *texts.tokens.shape)
    taps = tuple(dict.fromkeys(site for push in pushes for site in push.reads))
    totals = np.zeros((1 + len(pushes), 3))
    for start in range(0, len(texts.tokens), size):
        tokens, counts, steered = (
            jnp.asarray(pad_rows(a[start : start + size], size))
            for a in (texts.tokens, texts.counts, texts.steered)
        )
        clean, tapped = model.forward(tokens, taps=taps)
        sums = [_sums(clean, clean, tokens, counts, ids)]
        for push in pushes:
            edits = push.edits(factor, {site: tapped[site] for site in push.reads})
            edits = _wrapped(edits, functools.partial(lm.at, steered), same_norm)
            logits, _ = model.forward(tokens, edits=edits)
            sums.append(_sums(clean, logits, tokens, counts, ids))
        totals += np.asarray(jax.device_get(sums), np.float64)
    means = totals / texts.counts.sum()
    return [
        {
            "kl": float(kl),
            "ce": float(ce),
            "ce_increase": float(ce - means[0, 1]),
            **({"token_logprob": float(logprob)} if len(token_set) else {}),
        }
        for kl, ce, logprob in means
    ]


@jax.jit
def _sums(clean_BxTxV, logits_BxTxV, tokens_BxT, counts_BxT, ids_S):
    """Returns the sums over counted positions of KL, cross-entropy and the set's log-probability.

    Of logits that are the same in every bit KL is exactly 0.
    """
    log_p = jax.nn.log_softmax(clean_BxTxV)
    log_q = jax.nn.log_softmax(logits_BxTxV)
    kl_BxT = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    ce_BxT = lm.next_token_loss(logits_BxTxV, tokens_BxT)
    set_BxT = jax.nn.logsumexp(log_q[..., ids_S], axis=-1) if len(ids_S) else jnp.zeros_like(kl_BxT)
    return (
        jnp.sum(kl_BxT, where=counts_BxT),
        jnp.sum(ce_BxT, where=counts_BxT[:, :-1]),
        jnp.sum(set_BxT, where=counts_BxT),
    )


def measure_samples(
    model: lm.LanguageModel, samples: Sequence[lm.Generated], concept: str | None = None
) -> dict[str, float | None]:
    """Returns the measures of samples by name, on average; None where no sample is long enough.

    Args:
      model: the untouched language model.
      samples: what was written.
      concept: a regular expression; None leaves the share with it out.
    """
    found = {}
    for n in (1, 2):
        values = [distinct(list(sample.tokens), n) for sample in samples]
        values = [value for value in values if value is not None]
        found[f"distinct_{n}"] = float(np.mean(values)) if values else None
    prompts = [sample.prompt for sample in samples]
    tokens, is_new, is_text = _side_by_side(
        prompts, [sample.tokens for sample in samples], model.max_context
    )
    counts = _predicting(is_new, is_text)
    found["clean_ce"] = None
    if counts.any():
        own = measure(model, Texts(tokens, counts, counts), [], 0.0)
        found["clean_ce"] = own[0]["ce"]
    if concept is not None:
        found["concept"] = float(np.mean([bool(re.search(concept, s.text)) for s in samples]))
    return found


def distinct(tokens: Sequence[int], n: int) -> float | None:
    """Returns the share of a text's n-grams that are distinct (Li et al. 2016, arXiv:1510.03055).

    It is 1 where none comes twice, near 0 where the text goes round in a circle, and None where the
    text is shorter than n tokens.
    """
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else None


def _side_by_side(prompts, new, max_context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns token ids (n, T) of prompts and what follows, which are new, and which are text.

    T is rounded up, so that texts of similar lengths share a compiled program.
    """
    lengths = [(len(prompt), len(tokens)) for prompt, tokens in zip(prompts, new, strict=True)]
    longest = max(map(sum, lengths))
    width = max(longest, min(-(-longest // _LENGTHS) * _LENGTHS, max_context))
    tokens = np.zeros((len(lengths), width), np.int32)
    is_new = np.zeros(tokens.shape, bool)
    is_text = np.zeros(tokens.shape, bool)
    for row, (before, after) in enumerate(lengths):
        tokens[row, : before + after] = [*prompts[row], *new[row]]
        is_new[row, before : before + after] = is_text[row, : before + after] = True
    return tokens, is_new, is_text


def _until(tokens: np.ndarray, eos: Sequence[int]) -> list[int]:
    """Returns a row's tokens up to the first of `eos`, that one included."""
    ends = np.flatnonzero(np.isin(tokens, eos))
    return tokens[: ends[0] + 1].tolist() if len(ends) else tokens.tolist()


def _predicting(counted: np.ndarray, by: np.ndarray | None = None) -> np.ndarray:
    """Returns which positions (n, T) have a counted token next, and are `by` themselves."""
    predicting = (counted if by is None else by).copy()
    predicting[:, :-1] &= counted[:, 1:]
    predicting[:, -1] = False
    return predicting


def _wrapped(edits: dict, wrap: Callable, same_norm: bool) -> dict:
    return {s: wrap(lm.same_norm(edit) if same_norm else edit) for s, edit in edits.items()}


def _before(length, positions):
    return positions < length


def _after(length, positions):
    return positions >= length
