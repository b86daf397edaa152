"""Checks the second claim about a latent: that it does to the output what it responds to.

Logit weights are those of the direct path (`effects`), so that their median over the vocabulary is
0: of a latent of Arabic, tokens of Arabic should have larger ones than others. Steering says more:
with the latent set to multiples of its maximum, the model should write of the concept, and with a
random latent set so it should not.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.interpret.activity import Activity
from sae_jax.interpret.effects import output_tokens, used_tokens
from sae_jax.interpret.proxies.bank import Bank
from sae_jax.interpret.pushes import latent_push
from sae_jax.interpret.roc import auc
from sae_jax.interpret.steering import Outcome, Steering, Writing
from sae_jax.sae import SAE

BINS = 50


@dataclasses.dataclass(frozen=True)
class LogitWeights:
    """The logit weights of a latent, by whether a token of the vocabulary is of the concept.

    It is where most of its occurrences in the text are inside.

    Attributes:
      tokens: how many tokens of the vocabulary are of the concept.
      others: how many are not; tokens that the text lacks are in neither.
      inside: the mean weight of those that are; None where there are none.
      outside: of the others.
      spread: the standard deviation over both.
      above: the chance that one of the concept has a larger weight than one of the others.
      edges: `BINS` + 1 edges of parts of the weights' range.
      counts_inside: tokens of the concept in each part.
      counts_outside: other tokens in each part.
    """

    tokens: int
    others: int
    inside: float | None
    outside: float | None
    spread: float
    above: float | None
    edges: list[float]
    counts_inside: list[int]
    counts_outside: list[int]


@dataclasses.dataclass(frozen=True)
class Steered:
    """What a model writes with a latent set to a multiple of its maximum.

    Attributes:
      push: which latent, or untouched.
      factor: the multiple; 0 for the untouched model.
      tokens: the share of the tokens of samples that are inside the concept.
      samples: the share of samples with such a token.
      clean_ce: the cross-entropy of the samples under the untouched model, nats a token; large
        where what is written is no language.
      example: the beginning of the first sample.
    """

    push: str
    factor: float
    tokens: float
    samples: float
    clean_ce: float | None
    example: str


def logit_weights(
    sae: SAE,
    model: lm.LanguageModel,
    activity: Activity,
    latents: Sequence[int],
    concepts: Sequence[np.ndarray],
) -> list[LogitWeights | None]:
    """Returns the logit weights of latents by the concept of each.

    Args:
      sae: the SAE.
      model: its language model.
      activity: where its latents are active; its settings name the site.
      latents: the latents.
      concepts: for each the tokens inside its concept, (n, T) bool.

    Returns None for each where no linear map leads from the site to the output
    (`effects.output_tokens`).
    """
    site = activity.about.settings["site"].split(",")[-1]
    size = model.vocab_size
    seen = np.bincount(activity.tokens[activity.used], minlength=size)
    used = used_tokens(model.tokenizer, size, seen)
    found = []
    for latent, inside in zip(latents, concepts, strict=True):
        weights = output_tokens(sae, model, site, np.array([latent]), size, used)
        if weights is None:
            found.append(None)
            continue
        hits = np.bincount(activity.tokens[activity.used & inside], minlength=size)
        ids, values = weights.promoted[0], weights.promoted_values[0].astype(np.float64)
        found.append(_weights(values, hits[ids] > seen[ids] / 2))
    return found


def _weights(values: np.ndarray, ours: np.ndarray) -> LogitWeights:
    """Returns what is said of weights, (m,), of which `ours` are of the concept, (m,) bool."""
    n, others = int(ours.sum()), int((~ours).sum())
    edges = np.linspace(values.min(), max(values.max(), values.min() + 1e-12), BINS + 1)
    return LogitWeights(
        tokens=n,
        others=others,
        inside=float(values[ours].mean()) if n else None,
        outside=float(values[~ours].mean()) if others else None,
        spread=float(values.std()),
        above=auc(values[ours], values[~ours])[0] if n and others else None,
        edges=edges.tolist(),
        counts_inside=np.histogram(values[ours], edges)[0].tolist(),
        counts_outside=np.histogram(values[~ours], edges)[0].tolist(),
    )


def steered(
    sae: SAE,
    model: lm.LanguageModel,
    activity: Activity,
    latent: int,
    bank: Bank,
    concept: str,
    *,
    factors: Sequence[float] = (2, 5, 10),
    writing: Writing = Writing(max_new_tokens=40, samples=16),  # noqa: B008, frozen
    prompts: Sequence[Sequence[int]] = (),
) -> list[Steered]:
    """Returns what the model writes with a latent, and with a random one, set to multiples of its
    maximum in the activity.

    Args:
      sae: the SAE.
      model: its language model.
      activity: where its latents are active.
      latent: the latent.
      bank: the proxies.
      concept: the name of one of them.
      factors: the multiples.
      writing: how the model goes on, and how many samples of each prompt there are.
      prompts: the prompts' token ids; BOS alone where there are none.

    Raises UserError where the concept is no proxy of the bank, and as `latent_push` does.
    """
    if concept not in bank.names:
        raise UserError(f"{concept} cannot be told in new text, so steering cannot be measured")
    sites, maxima = activity.about.settings["site"].split(","), activity.max_activation
    others = np.flatnonzero(activity.counts >= np.median(activity.counts[activity.counts > 0]))
    others = others[others != latent]
    chosen = [latent, *np.random.default_rng(writing.seed).permutation(others)[:1].tolist()]
    pushes = [latent_push(sae, sites, [i], [maxima[i]]) for i in chosen]
    prompts = prompts or [[model.tokenizer.bos]]
    steering = Steering(model, pushes, prompts=prompts, writing=writing)
    outcomes = [steering.untouched(), *(o for factor in factors for o in steering.at(factor))]
    names = ("the latent", "a random latent")
    roles = {push.name: role for push, role in zip(pushes, names, strict=False)}
    return [_measured(outcome, model, bank, concept, roles) for outcome in outcomes]


def _measured(
    outcome: Outcome, model: lm.LanguageModel, bank: Bank, concept: str, roles: dict[str, str]
) -> Steered:
    tokenizer, inside = model.tokenizer, []
    for sample in outcome.samples:
        ids = np.array([[tokenizer.bos, *tokenizer.encode(sample.text)]], np.int32)
        inside.append(bank.of(ids, [concept])[0].inside[0, 1:])
    return Steered(
        push=roles.get(outcome.push, outcome.push),
        factor=float(outcome.factor),
        tokens=float(np.concatenate(inside).mean()) if sum(map(len, inside)) else 0.0,
        samples=float(np.mean([part.any() for part in inside])),
        clean_ce=outcome.measures.get("clean_ce"),
        example=outcome.samples[0].text[:200],
    )
