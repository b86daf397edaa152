"""Asks language models what latents respond to, by the ways of four publications.

    bricken2023          49 windows of all heights with activations 0 to 9, and output tokens
                         (Bricken et al. 2023, "Towards Monosemanticity")
    delphi               40 windows of 32 tokens, marks and activations 0 to 10
                         (Paulo et al. 2024, "Automatically Interpreting Millions of Features")
    saebench             10 strongest windows and 5 drawn by strength, with marks
                         (Karvonen et al. 2025, "SAEBench")
    np_max_act_logits    lists of tokens, of which the first that shows a pattern counts
                         (after Neuronpedia)

Windows are of the half that nothing is tested on. Prompts are our own words.
"""

import dataclasses
import itertools

import numpy as np

from sae_jax.errors import choose
from sae_jax.interpret.collection import Example
from sae_jax.interpret.explain.examples import Drawn, Wanted
from sae_jax.interpret.explain.llm.answers import object_of
from sae_jax.interpret.explain.llm.prompts import Prompt, built_in, from_file
from sae_jax.interpret.explain.llm.source import Source, by_strength
from sae_jax.interpret.explain.llm.writing import (
    Shown,
    levels,
    marked,
    marks_for,
    numbered,
    quoted,
)
from sae_jax.interpret.text import token_text

_TOKENS = 10  # promoted and suppressed ones that an explainer sees
_STRENGTH = 256  # windows of which some are drawn by their strength
PLACES = (
    "examples",
    "marked",
    "marked_values",
    "peak_tokens",
    "next_tokens",
    "promoted",
    "suppressed",
    "open",
    "close",
)
"""What an explainer's prompt can show."""


@dataclasses.dataclass(frozen=True)
class Explainer:
    """A way to ask what a latent responds to.

    Attributes:
      name: its name.
      prompt: what is asked.
      wanted: which windows are shown.
      least: on how many sequences a latent must be active, or it is left out.
      marked_from: the share of a window's highest activation from which tokens are marked.
      by_strength: how many windows are drawn by their strength, besides those wanted.
      fields: what the answer's JSON has besides the explanation, and of which types; None if the
        answer is a text of which the last paragraph is the explanation.
    """

    name: str
    prompt: Prompt
    wanted: Wanted
    least: int
    marked_from: float = 0.3
    by_strength: int = 0
    fields: tuple[tuple[str, str], ...] | None = ()

    @property
    def schema(self) -> dict | None:
        """The JSON schema of an answer, None for text."""
        if self.fields is None:
            return None
        names = {**dict(self.fields), "explanation": "string"}
        return object_of({name: {"type": kind} for name, kind in names.items()})


BUILT_IN = {
    "bricken2023": Explainer(
        "bricken2023",
        built_in("explain_bricken2023"),
        Wanted(top=10, per_interval=2, random=5, out_of_context=10),
        least=20,
        fields=(("thinking", "string"),),
    ),
    "delphi": Explainer(
        "delphi",
        built_in("explain_delphi"),
        Wanted(intervals=1, per_interval=40, before=15, after=16),
        least=20,
    ),
    "saebench": Explainer(
        "saebench",
        built_in("explain_saebench"),
        Wanted(top=10, before=10, after=10),
        least=15,
        marked_from=0.01,
        by_strength=5,
    ),
    "np_max_act_logits": Explainer(
        "np_max_act_logits",
        built_in("explain_np_max_act_logits"),
        Wanted(top=20, before=12, after=12),
        least=10,
        fields=(("list", "integer"),),
    ),
}


def explainer_of(name: str) -> Explainer:
    """Returns the explainer of a name, or one with a user's prompt if the name ends in .md.

    A user's prompt has some of `PLACES`, which are of the windows of bricken2023. Its answer is
    text, of which the last paragraph is the explanation.

    Raises UserError if there is no such explainer, or for what is wrong with the prompt.
    """
    if not name.endswith(".md"):
        return BUILT_IN[choose(name, BUILT_IN, "the explainer (a name, or a prompt FILE.md)")]
    prompt = from_file(name, PLACES)
    return dataclasses.replace(
        BUILT_IN["bricken2023"], name=prompt.name, prompt=prompt, fields=None
    )


def windows_shown(explainer: Explainer, source: Source, latent: int) -> Drawn:
    """Returns the windows of a latent that an explainer shows."""
    drawn = source.draw(latent, explainer.wanted, held_out=False)
    if not explainer.by_strength:
        return drawn
    wanted = dataclasses.replace(explainer.wanted, intervals=1, per_interval=_STRENGTH)
    others = source.draw(latent, wanted, held_out=False).intervals[0]
    random = source.random(latent, explainer.name)
    chosen = by_strength(others, explainer.by_strength, random)
    return dataclasses.replace(drawn, intervals=[chosen])


def messages(explainer: Explainer, source: Source, latent: int) -> tuple[tuple[str, str], ...]:
    """Returns the conversation that asks what a latent responds to."""
    drawn = windows_shown(explainer, source, latent)
    shown = source.show(drawn.active)
    marks = marks_for(shown)
    on = [
        window.activations >= explainer.marked_from * window.activations.max() for window in shown
    ]
    texts = [marked(window, which, marks) for window, which in zip(shown, on, strict=True)]
    promoted, suppressed = _output_tokens(source, latent)
    peaks, following = _peak_tokens(source, drawn.active)
    return explainer.prompt.messages(
        {
            "examples": _by_kind(source, latent, drawn),
            "marked": numbered(texts),
            "marked_values": _with_values(texts, shown, on, source.maximum(latent)),
            "peak_tokens": quoted(peaks),
            "next_tokens": quoted(following),
            "promoted": quoted(promoted),
            "suppressed": quoted(suppressed),
            "open": marks[0],
            "close": marks[1],
        }
    )


def _by_kind(source: Source, latent: int, drawn: Drawn) -> str:
    """Returns windows with levels 0 to 9, a JSON object each, by the kinds of Bricken et al."""
    parts = len(drawn.intervals)
    kinds = [("strongest", drawn.top)]
    kinds += [(f"part {parts - i} of {parts}", part) for i, part in enumerate(drawn.intervals)]
    kinds += [("random", drawn.random), ("same token", drawn.out_of_context)]
    maximum, lines = source.maximum(latent), []
    for kind, examples in kinds:
        for window in source.show(examples):
            values = levels(window.activations, maximum)
            tokens = [list(pair) for pair in zip(window.tokens, values, strict=True)]
            lines.append(quoted({"from": kind, "tokens": tokens}))
    return "\n".join(lines)


def _with_values(texts: list[str], shown: list[Shown], on: list[np.ndarray], maximum: float) -> str:
    """Returns marked texts, and below each its marked tokens with activations 0 to 10 (delphi)."""
    lines = []
    for number, (text, window, which) in enumerate(zip(texts, shown, on, strict=True), 1):
        parts = np.floor(10 * window.activations / maximum + 1e-5).astype(int).tolist()
        pairs = itertools.compress(zip(window.tokens, parts, strict=True), which)
        lines += [f"{number}. {quoted(text)}", f"   {quoted([list(pair) for pair in pairs])}"]
    return "\n".join(lines)


def _output_tokens(source: Source, latent: int) -> tuple[list[str], list[str]]:
    if source.effects is None:
        return [], []
    promoted, suppressed = source.effects.of(latent)
    return _texts(source, promoted[:_TOKENS]), _texts(source, suppressed[:_TOKENS])


def _peak_tokens(source: Source, examples: list[Example]) -> tuple[list[str], list[str]]:
    """Returns the tokens of peaks, and those after them, each once."""
    length = source.activity.tokens.shape[1]
    peaks = [example.ids[example.peak] for example in examples]
    following = [e.ids[e.peak + 1] for e in examples if e.peak + 1 < length]
    return _texts(source, peaks), _texts(source, following)


def _texts(source: Source, ids) -> list[str]:
    return list(dict.fromkeys(token_text(source.tokenizer, token) for token in ids))
