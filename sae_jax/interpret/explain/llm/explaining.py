"""Explains latents by a language model, many at a time."""

from collections.abc import Sequence

from absl import logging

from sae_jax import lm
from sae_jax.interpret.activity import Activity
from sae_jax.interpret.explain.llm import answers
from sae_jax.interpret.explain.llm.client import Client
from sae_jax.interpret.explain.llm.explainers import Explainer, explainer_of, messages
from sae_jax.interpret.explain.llm.questions import Answer, Request
from sae_jax.interpret.explain.llm.source import LogitWeights, Source
from sae_jax.interpret.explain.records import LATENTS, Explanation

LEAST_DENSITY = 1e-6
"""The part of the text below which Bricken et al. call a latent's density ultra-low."""

_SHORT, _REASONED = 150, 800  # tokens of an answer
_TOGETHER = 512  # latents whose prompts are in memory at once


def explain(
    activity: Activity,
    tokenizer: lm.Tokenizer,
    client: Client,
    latents: Sequence[int],
    *,
    explainer: str = "bricken2023",
    effects: LogitWeights | None = None,
    units: str = LATENTS,
    seed: int = 0,
) -> list[Explanation]:
    """Returns what a language model says that each latent responds to.

    A latent that is never active, that is on less than `LEAST_DENSITY` of the text, or that is
    active on fewer sequences than the explainer needs, is not asked about: its text is "", and its
    details have `dropped`, which is dead, rare or few_windows. Where an answer could not be read
    the text is "" too, and the details have `unparsable`. The details also name the model.

    Args:
      activity: where the latents are active. Windows are of the half that is not held out.
      tokenizer: the tokenizer of its text.
      client: the language model.
      latents: the numbers of the latents.
      explainer: one of `explainers.BUILT_IN`, or the path of a prompt that ends in .md.
      effects: the latents' output tokens, where there is a model.
      units: whose latents these are, as in `Explanation`.
      seed: the seed of what is drawn.

    Raises UserError for an unknown explainer or latent, for mistakes in a prompt, and as the client
    does.
    """
    way, source = explainer_of(explainer), Source(activity, tokenizer, effects, seed)
    found = []
    for start in range(0, len(latents), _TOGETHER):
        found += _explained(way, source, client, latents[start : start + _TOGETHER], units)
    dropped = sum("dropped" in explanation.details for explanation in found)
    unread = sum("unparsable" in explanation.details for explanation in found)
    if dropped or unread:
        logging.info("of %d latents %d are active too seldom to be explained, and of %d the answer "
                     "could not be read", len(found), dropped, unread)  # fmt: skip
    return found


def request_of(explainer: Explainer, source: Source, latent: int) -> Request:
    """Returns what is asked to explain a latent."""
    return Request(
        messages(explainer, source, latent),
        explainer.schema,
        "explanation",
        explainer.prompt.title,
        _REASONED if explainer.fields is None or "thinking" in dict(explainer.fields) else _SHORT,
    )


def why_dropped(explainer: Explainer, source: Source, latent: int) -> str:
    """Returns why a latent is not asked about, as `explain` says; "" if it is."""
    windows, density = source.windows(latent, held_out=False), source.activity.density[latent]
    if density < LEAST_DENSITY:
        return "rare" if density else "dead"
    return "few_windows" if windows < explainer.least else ""


def _explained(
    way: Explainer, source: Source, client: Client, latents: Sequence[int], units: str
) -> list[Explanation]:
    dropped = {latent: why_dropped(way, source, latent) for latent in latents}
    asked = [latent for latent in latents if not dropped[latent]]
    requests = [request_of(way, source, latent) for latent in asked]
    check = None if way.schema is None else _fault
    found = dict(zip(asked, client.ask(requests, check, "explanations"), strict=True))
    records = []
    for latent in latents:
        why = dropped[latent]
        text, details = ("", {"dropped": why}) if why else _said(way, found[latent])
        details |= {"model": client.model}
        records.append(
            Explanation(units, int(latent), "llm", way.prompt.title, text, details=details)
        )
    return records


def _fault(value: object) -> str | None:
    try:
        answers.read_explanation(value)
    except ValueError as error:
        return str(error)


def _said(way: Explainer, answer: Answer) -> tuple[str, dict]:
    """Returns the explanation in an answer, and what else it says."""
    text = ""
    if answer.status == "ok" and way.schema is None:
        text = answers.last_paragraph(answer.text)
    elif answer.status == "ok":
        text = answers.read_explanation(answer.value)
    if not text:
        return "", {"unparsable": "empty" if answer.status == "ok" else answer.status}
    others = way.fields or ()
    return text, {name: answer.value[name] for name, _ in others if name in answer.value}
