"""Steers a language model by an SAE's latents, and measures what that does.

A push changes activations by as much as a factor says: `latent_push` sets latents to the factor
times their maxima (Templeton et al. 2024, "Scaling Monosemanticity"), and `direction_push` adds a
direction, so that latents can be held against directions that need no SAE (`directions`).

`measure` compares the steered model with the untouched one on texts, in nats a token:

    kl             KL(untouched || steered) of the next token
    ce             cross-entropy of the text under the steered model
    ce_increase    ce less that of the untouched model
    token_logprob  log of the probability that the next token is one of a set

`measure_samples` looks at what the steered model writes:

    distinct_1, distinct_2  distinct n-grams of tokens over all n-grams, of a sample on average
    clean_ce                cross-entropy of the samples under the untouched model: text that it
                            finds unlikely is often no text any more
    concept                 the share of samples in which a regular expression is found
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.errors import UserError, choose
from sae_jax.evaluate.batching import pad_rows, sequences_at_once
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE

MODES = ("clamp", "add", "ablate", "pin")
POSITIONS = ("all", "no_bos", "prompt", "continuation")
FIXED_FACTORS = {"ablate": 0.0, "pin": 1.0}
"""The only factor of the modes that have one: ablated latents are 0, pinned ones at their
maximum."""


@dataclasses.dataclass(frozen=True)
class Push:
    """A change of activations.

    Attributes:
      name: what it is called in tables.
      sites: the sites that its edits read or write.
      edits: makes the edits, by site, from a factor and {site: activations (B, T, width)} of the
        untouched model on the same tokens.
      needs_clean: whether `edits` looks at these activations, which are {} where it does not.
    """

    name: str
    sites: tuple[str, ...]
    edits: Callable[[float, dict[str, jax.Array]], dict[str, Callable]]
    needs_clean: bool


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
      push: the push's name; "clean" of the untouched model.
      factor: the factor; 0 of the untouched model.
      measures: the measures above, by name.
      samples: what the model wrote.
    """

    push: str
    factor: float
    measures: dict[str, float | None]
    samples: list[Sample]


def latent_push(
    sae: SAE, sites: Sequence[str], latents: Sequence[int], maxima, mode: str = "clamp"
) -> Push:
    """Returns the push that sets latents, all at once, to a factor times their maxima.

    Raises UserError for a mode or a latent that there is not, for a latent whose maximum is 0, and
    for sites that are not as many as the SAE's.

    Args:
      sae: the SAE.
      sites: its sites, a transcoder's target last.
      latents: the latents' indices.
      maxima: the maxima of their activations, (latents,), as `sae-jax eval` has them.
      mode: one of `MODES`. clamp sets them, add adds as much to what is there, ablate (at factor 0)
        and pin (at factor 1) are clamps at nothing and at the maximum.
    """
    choose(mode, MODES, "the mode")
    maxima = np.asarray(maxima, np.float32)
    for latent, maximum in zip(latents, maxima, strict=True):
        if not maximum > 0:
            raise UserError(
                f"latent {latent} never fired on what its maximum is of, so there is nothing to "
                "scale; choose another latent, or measure its maximum on other text (--text)"
            )

    def edits(factor: float, clean: dict) -> dict[str, Callable]:
        activation = factor * maxima
        return lm.latent_edits(
            sae, sites, latents, activation, add=mode == "add", clean=clean or None
        )

    is_crosscoder = sae.config.kind == "crosscoder"
    if not is_crosscoder:
        edits(0.0, {})  # refused now, and not after the untouched model has run
    name = f"latent {latents[0]}" if len(latents) == 1 else f"latents {','.join(map(str, latents))}"
    return Push(name, tuple(sites), edits, is_crosscoder)


def direction_push(
    name: str, sae: SAE, sites: Sequence[str], direction: np.ndarray, length: float
) -> Push:
    """Returns the push that adds a factor times `length` along a direction.

    It writes the sites that the SAE's latents write, a crosscoder's all at once, to what they are
    in the untouched model, as `lm.latent_edits` does.

    Args:
      name: what it is called.
      sae: the SAE, which is asked for nothing but its kind and widths.
      sites: its sites, a transcoder's target last.
      direction: (d_out,), of any norm but 0.
      length: the norm of what is added at factor 1, over all sites that are written.
    """
    vector = np.asarray(direction, np.float32)
    vector = vector * np.float32(length / np.linalg.norm(vector))
    if sae.config.kind != "crosscoder":
        return Push(
            name, (), lambda factor, _: {sites[-1]: lm.add_direction(vector, factor)}, False
        )
    parts = dict(zip(sites, np.split(vector, np.cumsum(sae.config.site_widths)[:-1]), strict=True))

    def edits(factor: float, clean: dict) -> dict[str, Callable]:
        return {
            site: lm.put(clean[site].astype(jnp.float32) + factor * part)
            for site, part in parts.items()
        }

    return Push(name, tuple(sites), edits, True)


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
    taps = tuple(dict.fromkeys(s for push in pushes if push.needs_clean for s in push.sites))
    totals = np.zeros((1 + len(pushes), 3))
    starts = range(0, len(texts.tokens), size)
    for start in progress(starts, f"measuring at factor {factor:g}"):
        tokens, counts, steered = (
            jnp.asarray(pad_rows(a[start : start + size], size))
            for a in (texts.tokens, texts.counts, texts.steered)
        )
        clean, tapped = model.forward(tokens, taps=taps)
        sums = [_sums(clean, clean, tokens, counts, ids)]
        for push in pushes:
            edits = push.edits(factor, {s: tapped[s] for s in push.sites if push.needs_clean})
            edits = {site: _where(steered, edit, same_norm) for site, edit in edits.items()}
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


def _where(steered, edit: Callable, same_norm: bool) -> Callable:
    return lm.at(steered, lm.same_norm(edit) if same_norm else edit)


def distinct(tokens: Sequence[int], n: int) -> float | None:
    """Returns the share of a text's n-grams that are distinct (Li et al. 2016, arXiv:1510.03055).

    It is 1 where none comes twice, near 0 where the text goes round in a circle, and None where the
    text is shorter than n tokens.
    """
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else None
