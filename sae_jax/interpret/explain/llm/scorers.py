"""Asks language models where latents are active, by explanations of them.

    bricken2023    levels 0 to 9 of all tokens of 60 windows of 9, Spearman's correlation
    logits         which of 100 tokens the latent promotes (also Bricken et al. 2023)
    detection      in which of 100 windows of 32 tokens it is active, balanced accuracy (delphi)
    fuzzing        in which of 100 windows the right tokens are marked, balanced accuracy (delphi)
    intruder       which of 5 windows is not one of its; no explanation is needed (delphi)
    saebench       which of 14 windows activate it, accuracy (SAEBench)

Windows are of the half that nothing was explained by, at most as many as there are.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from sae_jax.interpret.explain.examples import Wanted
from sae_jax.interpret.explain.llm import answers, measures
from sae_jax.interpret.explain.llm.prompts import Prompt, built_in
from sae_jax.interpret.explain.llm.source import WEIGHTS, Source, by_strength
from sae_jax.interpret.explain.llm.writing import (
    Shown,
    levels,
    marked,
    marks_for,
    mean_marked,
    numbered,
    quoted,
)
from sae_jax.interpret.text import token_text

_TOGETHER = 5  # windows of a prompt of detection, fuzzing and intruder, as in delphi
_OF_A_SORT = 50  # windows with the latent, and without, of detection and fuzzing
_INTRUDERS = 10  # questions
_MARKED_FROM = 0.3  # of a window's highest activation
_FORMER = 10  # promoted tokens that explainers see, and that are not tested
_RANDOM_TOKENS = 50
_STRENGTH = 256  # windows of which some are drawn by their strength

_BRICKEN = Wanted(top=6, per_interval=2, random=10, out_of_context=20)
_DELPHI = Wanted(intervals=1, per_interval=_OF_A_SORT, before=15, after=16)
_SAEBENCH = Wanted(top=2, intervals=1, per_interval=_STRENGTH, random=10, before=10, after=10)


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a test, whatever the explanation.

    Attributes:
      prompt: what is asked.
      places: what the prompt shows besides the explanation.
      schema: the JSON schema of the answer.
      max_tokens: how many tokens the answer may have.
      truth: what a perfect answer says.
      wrong: what stands for an answer that cannot be read.
      read: returns what the JSON value of an answer says, as `truth` does; ValueError if nothing.
      examples: how many examples it is about.
    """

    prompt: Prompt
    places: dict[str, str]
    schema: dict
    max_tokens: int
    truth: tuple[int, ...]
    wrong: tuple[int, ...]
    read: Callable[[object], tuple[int, ...]]
    examples: int

    def messages(self, explanation: str) -> tuple[tuple[str, str], ...]:
        """Returns the conversation that tests an explanation."""
        return self.prompt.messages({**self.places, "explanation": quoted(explanation)})


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A way to test an explanation.

    Attributes:
      name: its name.
      prompt: what is asked.
      ask: returns the questions about a latent.
      measure: the score of what is predicted against what is true; None where it is not defined.
      others: further measures, for a score's details. `chance` and `of_none` are what guessing
        and naming no window would score.
      has_labels: whether answers are lists of labels 0 and 1.
      explained: whether it needs an explanation.
    """

    name: str
    prompt: Prompt
    ask: Callable[[Source, int], list[Question]]
    measure: Callable[[np.ndarray, np.ndarray], float | None]
    others: tuple[tuple[str, Callable], ...] = ()
    has_labels: bool = True
    explained: bool = True


def _simulation(source: Source, latent: int) -> list[Question]:
    drawn = source.draw(latent, _BRICKEN, held_out=True)
    shown = source.show([*drawn.active, *drawn.inactive])
    shown = _shuffled(shown, source.random(latent, "bricken2023"))
    truth = tuple(
        level for window in shown for level in levels(window.activations, source.maximum(latent))
    )
    lengths = [len(window.tokens) for window in shown]
    return [
        Question(
            built_in("score_bricken2023"),
            {"examples": numbered([window.tokens for window in shown])},
            answers.levels_schema(lengths),
            200 + 16 * len(truth),
            truth,
            (0,) * len(truth),  # says nothing: a correlation of 0
            functools.partial(answers.read_levels, lengths=lengths),
            len(shown),
        )
    ]


def _logits(source: Source, latent: int) -> list[Question]:
    if source.effects is None:
        return []
    promoted, _ = source.effects.of(latent)
    random = source.random(latent, "logits")
    others = np.setdiff1d(np.flatnonzero(source.effects.used), promoted[:WEIGHTS])
    others = random.permutation(others)[:_RANDOM_TOKENS]
    tokens = [(int(token), 1) for token in promoted[_FORMER:WEIGHTS]]
    tokens = _shuffled([*tokens, *((int(token), 0) for token in others)], random)
    texts = [token_text(source.tokenizer, token) for token, _ in tokens]
    return [_labels("logits", texts, [label for _, label in tokens])]


def _detection(source: Source, latent: int) -> list[Question]:
    active, inactive = _with_and_without(source, latent)
    windows = [*((w.text, 1) for w in active), *((w.text, 0) for w in inactive)]
    windows = _shuffled(windows, source.random(latent, "detection"))
    return [_labels("detection", *zip(*part, strict=True)) for part in _parts(windows)]


def _fuzzing(source: Source, latent: int) -> list[Question]:
    active, inactive = _with_and_without(source, latent)
    random = source.random(latent, "fuzzing")
    count = mean_marked(active, _is_marked) if active else 0
    windows = [(w, _is_marked(w), 1) for w in active]
    for window in inactive:
        which = np.zeros(len(window.tokens), bool)
        which[random.permutation(len(which))[:count]] = True
        windows.append((window, which, 0))
    windows = _shuffled(windows, random)
    questions = []
    for part in _parts(windows):
        marks = marks_for(window for window, _, _ in part)
        texts = [marked(window, which, marks) for window, which, _ in part]
        labels = [label for _, _, label in part]
        questions.append(_labels("fuzzing", texts, labels, marks))
    return questions


def _intruder(source: Source, latent: int) -> list[Question]:
    active, inactive = _with_and_without(source, latent)
    active = sorted(active, key=lambda window: -window.activations.max())  # alike in strength
    random, questions, own = source.random(latent, "intruder"), [], _TOGETHER - 1
    count = min(_INTRUDERS, len(active) // own, len(inactive))
    for number in range(count):
        texts = [window.text for window in active[number * own : (number + 1) * own]]
        place = int(random.integers(_TOGETHER))
        texts.insert(place, inactive[number].text)
        questions.append(
            Question(
                built_in("score_intruder"),
                {"examples": numbered(texts)},
                answers.intruder_schema(_TOGETHER),
                40,
                (place + 1,),
                (0,),
                answers.read_intruder,
                1,
            )
        )
    return questions


def _saebench(source: Source, latent: int) -> list[Question]:
    drawn = source.draw(latent, _SAEBENCH, held_out=True)
    random = source.random(latent, "saebench")
    active = [*drawn.top, *by_strength(drawn.intervals[0], 2, random)]
    windows = [(window.text, 1) for window in source.show(active)]
    windows += [(window.text, 0) for window in source.show(drawn.random)]
    texts, truth = zip(*_shuffled(windows, random), strict=True)
    return [
        Question(
            built_in("score_saebench"),
            {"examples": numbered(texts)},
            answers.numbers_schema(len(texts)),
            40 + 6 * len(texts),
            truth,
            tuple(1 - label for label in truth),
            functools.partial(answers.read_numbers, count=len(texts)),
            len(texts),
        )
    ]


def _with_and_without(source: Source, latent: int) -> tuple[list[Shown], list[Shown]]:
    """Returns windows of 32 tokens with the latent, uniformly drawn, and as many without."""
    kind = "random" if source.negatives == "random" else "out_of_context"
    wanted = dataclasses.replace(_DELPHI, **{kind: _OF_A_SORT})
    drawn = source.draw(latent, wanted, held_out=True)
    return source.show(drawn.active), source.show(drawn.inactive)


def _is_marked(window: Shown) -> np.ndarray:
    return window.activations >= _MARKED_FROM * window.activations.max()


def _shuffled(items: Sequence, random: np.random.Generator) -> list:
    return [items[i] for i in random.permutation(len(items))]


def _parts(items: list) -> list[list]:
    return [items[i : i + _TOGETHER] for i in range(0, len(items), _TOGETHER)]


def _labels(
    scorer: str,
    texts: Sequence[str],
    truth: Sequence[int],
    marks: tuple[str, str] = ("", ""),
) -> Question:
    """Returns the question for a label 0 or 1 of each text."""
    return Question(
        built_in(f"score_{scorer}"),
        {"examples": numbered(texts), "open": marks[0], "close": marks[1]},
        answers.labels_schema(len(texts)),
        40 + 4 * len(texts),
        tuple(truth),
        tuple(1 - label for label in truth),
        answers.read_labels,
        len(texts),
    )


_ACCURACY = ("accuracy", measures.accuracy)
_F1 = ("f1", measures.f1)
_BALANCED = ("balanced_accuracy", measures.balanced_accuracy)

SCORERS = {
    scorer.name: scorer
    for scorer in (
        Scorer(
            "bricken2023",
            built_in("score_bricken2023"),
            _simulation,
            measures.spearman,
            (("pearson", measures.pearson),),
            has_labels=False,
        ),
        Scorer(
            "logits",
            built_in("score_logits"),
            _logits,
            measures.balanced_accuracy,
            (_ACCURACY, _F1),
        ),
        Scorer(
            "detection",
            built_in("score_detection"),
            _detection,
            measures.balanced_accuracy,
            (_ACCURACY, _F1),
        ),
        Scorer(
            "fuzzing",
            built_in("score_fuzzing"),
            _fuzzing,
            measures.balanced_accuracy,
            (_ACCURACY, _F1),
        ),
        Scorer(
            "intruder",
            built_in("score_intruder"),
            _intruder,
            measures.accuracy,
            (("chance", lambda truth, predicted: 1 / _TOGETHER),),
            has_labels=False,
            explained=False,
        ),
        Scorer(
            "saebench",
            built_in("score_saebench"),
            _saebench,
            measures.accuracy,
            (_BALANCED, _F1, ("of_none", lambda truth, predicted: float((truth == 0).mean()))),
            has_labels=False,
        ),
    )
}
"""The scorers that ask an API, by name."""
