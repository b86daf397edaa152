"""Tests explanations, of whatever way, by a language model, many at a time, beside controls."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from sae_jax import lm
from sae_jax.errors import UserError, choose
from sae_jax.interpret.activity import Activity
from sae_jax.interpret.explain.llm.client import Client
from sae_jax.interpret.explain.llm.explainers import explainer_of
from sae_jax.interpret.explain.llm.explaining import request_of, why_dropped
from sae_jax.interpret.explain.llm.questions import Answer, Plan, Request
from sae_jax.interpret.explain.llm.scorers import SCORERS, Question
from sae_jax.interpret.explain.llm.simulation import Simulator
from sae_jax.interpret.explain.llm.source import LEAST, LogitWeights, Source
from sae_jax.interpret.explain.others import others
from sae_jax.interpret.explain.records import LATENTS, Explanation, Score
from sae_jax.interpret.roc import auc
from sae_jax.progress_bar import progress

SHUFFLED, NONE = "shuffled", "none"
CONTROLS = (SHUFFLED, NONE)
"""What is tested in an explanation's place: that of another unit; one that says nothing."""

NOTHING = "Text of no particular kind."
"""The explanation that says nothing."""

SIMULATION = "simulation"
"""The scorer that needs no API, but a language model of a directory."""

_TYPICAL = "words and phrases about one subject, mostly where they begin a sentence or a list"
_TOGETHER = 64  # explanations whose tests are in memory at once
_DIGIT = re.compile(r"[01]")


@dataclasses.dataclass(frozen=True)
class _Test:
    """A text that is tested as the explanation of a unit."""

    scorer: str
    explanation: Explanation
    control: str
    text: str
    details: dict


def score(
    activity: Activity,
    tokenizer: lm.Tokenizer,
    client: Client | None,
    explanations: Sequence[Explanation],
    *,
    scorers: Sequence[str] = ("detection", "fuzzing"),
    controls: Sequence[str] = CONTROLS,
    effects: LogitWeights | None = None,
    seed: int = 0,
    negatives: str = "random",
    judge: lm.LanguageModel | None = None,
    logprobs: int = 0,
) -> list[Score]:
    """Returns how well explanations, and controls in their place, tell where units are active.

    Everything is tested on the half that is held out. Explanations without a text are left out. A
    score is None for a unit that is active on fewer than `source.LEAST` sequences of that half.
    A judge that says the same of everything has a balanced accuracy of 0.5, and a correlation of 0.
    Answers that cannot be read, that were cut or refused, are wrong; where there are any, the
    details have the score without them, `without_unparsable`. The details also name the model, and
    the unit whose explanation a shuffled one is, `of`.

    Args:
      activity: where the units are active.
      tokenizer: the tokenizer of its text.
      client: the language model that is asked; None if only `SIMULATION` scores.
      explanations: what is tested, of any way, all of units of this activity.
      scorers: names of `scorers.SCORERS`, or `SIMULATION`.
      controls: some of `CONTROLS`. The other unit's explanation is one of the same way and method,
        with another text.
      effects: the output tokens of the units, for the scorer logits.
      seed: the seed of what is drawn.
      negatives: one of `source.NEGATIVES`.
      judge: the language model that simulates.
      logprobs: of how many tokens at each place log-probabilities are asked for, where labels have
        an AUC by them; 0 for none.

    Raises UserError for an unknown name, for a scorer whose effects or judge are missing, and as
    the client does.
    """
    _check(scorers, controls, effects)
    if SIMULATION in scorers and judge is None:
        raise UserError(f"the scorer {SIMULATION} needs a language model's directory as its judge")
    if client is None and set(scorers) - {SIMULATION}:
        raise UserError(f"only the scorer {SIMULATION} needs no API; give one for the others")
    source = Source(activity, tokenizer, effects, seed, negatives)
    tests = list(_tests(explanations, scorers, controls, seed))
    found = []
    for block in _blocks([test for test in tests if test.scorer != SIMULATION]):
        found += _asked(source, client, block, logprobs)
    if simulated := [test for test in tests if test.scorer == SIMULATION]:
        simulator = Simulator(judge)
        shown = progress(simulated, "simulating", len(simulated), "explanation")
        found += [_simulated(source, simulator, test) for test in shown]
    return found


def planned(
    activity: Activity,
    tokenizer: lm.Tokenizer,
    client: Client,
    latents: Sequence[int],
    *,
    explainer: str | None = "bricken2023",
    scorers: Sequence[str] = ("detection", "fuzzing"),
    controls: Sequence[str] = CONTROLS,
    effects: LogitWeights | None = None,
    seed: int = 0,
    negatives: str = "random",
    explanations: Sequence[Explanation] | None = None,
) -> Plan:
    """Returns what explaining latents, and testing that, would ask at most; nothing is asked.

    Args are those of `explain` and `score`, and:
      explainer: None if nothing is to be explained.
      explanations: what is to be tested; None for explanations of a typical length of all latents
        that are explained.
    """
    _check(scorers, controls, effects)
    source, plans = Source(activity, tokenizer, effects, seed, negatives), []
    if explainer is not None:
        way = explainer_of(explainer)
        latents = [latent for latent in latents if not why_dropped(way, source, latent)]
        for block in _blocks(latents):
            plans.append(client.planned([request_of(way, source, latent) for latent in block]))
    if explanations is None:
        explanations = [Explanation(LATENTS, i, "llm", "", f"{_TYPICAL} ({i})") for i in latents]
    tests = list(_tests(explanations, scorers, controls, seed))
    for block in _blocks([test for test in tests if test.scorer != SIMULATION]):
        plans.append(client.planned(_requests(block, _questions(source, block), 0)))
    return _sum(plans, client)


def _sum(plans: list[Plan], client: Client) -> Plan:
    """Returns what all plans take together."""
    names = [field.name for field in dataclasses.fields(Plan)]
    columns = {name: [getattr(plan, name) for plan in plans] for name in names}
    if not plans:
        return client.planned([])
    return Plan(**{n: None if None in values else sum(values) for n, values in columns.items()})


def _blocks(items: Sequence) -> Iterator[Sequence]:
    for start in range(0, len(items), _TOGETHER):
        yield items[start : start + _TOGETHER]


def _check(scorers: Sequence[str], controls: Sequence[str], effects) -> None:
    for name in scorers:
        choose(name, (*SCORERS, SIMULATION), "a scorer")
    for name in controls:
        choose(name, CONTROLS, "a control")
    if "logits" in scorers and effects is None:
        raise UserError("the scorer logits needs the model whose output tokens latents promote")


def _tests(
    explanations: Sequence[Explanation],
    scorers: Sequence[str],
    controls: Sequence[str],
    seed: int,
) -> Iterator[_Test]:
    """Yields all tests, those of an explanation and of the controls in its place together."""
    explanations = [explanation for explanation in explanations if explanation.text]
    another, seen = _others(explanations, seed), set()
    for explanation in explanations:
        other = another.get(_key(explanation))
        for name in scorers:
            if name != SIMULATION and not SCORERS[name].explained:
                if (name, explanation.unit) not in seen:
                    of_no_way = dataclasses.replace(explanation, by="", method="")
                    yield _Test(name, of_no_way, "", "", {})
                seen.add((name, explanation.unit))
                continue
            yield _Test(name, explanation, "", explanation.text, {})
            if SHUFFLED in controls and other is not None:
                yield _Test(name, explanation, SHUFFLED, other.text, {"of": other.unit})
            if NONE in controls:
                yield _Test(name, explanation, NONE, NOTHING, {})


def _key(explanation: Explanation) -> tuple:
    return explanation.units, explanation.by, explanation.method, explanation.unit


def _others(explanations: list[Explanation], seed: int) -> dict[tuple, Explanation]:
    """Returns the explanation of another unit for each, of the same way and method (`others`)."""
    groups = {}
    for explanation in explanations:
        groups.setdefault(_key(explanation)[:-1], {})[explanation.unit] = explanation
    found = {}
    for group in groups.values():
        pairs = others({unit: one.text for unit, one in group.items()}, seed)
        found |= {_key(group[unit]): group[other] for unit, other in pairs.items()}
    return found


def _questions(source: Source, tests: Sequence[_Test]) -> list[list[Question]]:
    """Returns the questions of each test, none where a unit is active too seldom.

    An explanation and its controls are tested by the same ones.
    """
    found = {}
    for unit, scorer in dict.fromkeys((test.explanation.unit, test.scorer) for test in tests):
        enough = source.windows(unit, held_out=True) >= LEAST
        found[unit, scorer] = SCORERS[scorer].ask(source, unit) if enough else []
    return [found[test.explanation.unit, test.scorer] for test in tests]


def _requests(
    tests: Sequence[_Test], questions: list[list[Question]], logprobs: int
) -> list[Request]:
    return [
        Request(
            question.messages(test.text),
            question.schema,
            test.scorer,
            SCORERS[test.scorer].prompt.title,
            question.max_tokens,
            logprobs=logprobs if SCORERS[test.scorer].has_labels else 0,
        )
        for test, asked in zip(tests, questions, strict=True)
        for question in asked
    ]


def _asked(source: Source, client: Client, tests: Sequence[_Test], logprobs: int) -> list[Score]:
    questions = _questions(source, tests)
    answers = iter(client.ask(_requests(tests, questions, logprobs), None, "answers"))
    return [
        _score(test, asked, [next(answers) for _ in asked], client.model)
        for test, asked in zip(tests, questions, strict=True)
    ]


def _score(test: _Test, questions: list[Question], answers: list[Answer], model: str) -> Score:
    if not questions:
        return Score(*_record(test), details=test.details | {"why": "too few held-out windows"})
    scorer = SCORERS[test.scorer]
    read = [_read(question, answer) for question, answer in zip(questions, answers, strict=True)]
    truth = _joined(question.truth for question in questions)
    predicted = _joined(
        question.wrong if said is None else said
        for question, said in zip(questions, read, strict=True)
    )
    details = {**test.details, "model": model}
    details |= {name: of(truth, predicted) for name, of in scorer.others}
    unread = read.count(None)
    if unread:
        pairs = [
            (q.truth, said) for q, said in zip(questions, read, strict=True) if said is not None
        ]
        readable = [_joined(part) for part in zip(*pairs, strict=True)]
        details["without_unparsable"] = scorer.measure(*readable) if readable else None
    if scorer.has_labels and (area := _auc(questions, answers)) is not None:
        details["auc"] = area
    return Score(
        *_record(test),
        scorer.measure(truth, predicted),
        sum(question.examples for question in questions),
        unread,
        details,
    )


def _simulated(source: Source, simulator: Simulator, test: _Test) -> Score:
    value, examples = simulator.score(source, test.explanation.unit, test.text)
    return Score(*_record(test), value, examples, 0, test.details)


def _record(test: _Test) -> tuple:
    """Returns the first fields of a test's `Score`."""
    e = test.explanation
    return e.units, e.unit, e.by, e.method, test.scorer, test.control


def _read(question: Question, answer: Answer) -> tuple[int, ...] | None:
    """Returns what an answer says, None if it cannot be read."""
    if answer.status != "ok":
        return None
    try:
        return question.read(answer.value)
    except ValueError:
        return None


def _joined(parts) -> np.ndarray:
    return np.array([value for part in parts for value in part], np.int64)


def _auc(questions: list[Question], answers: list[Answer]) -> float | None:
    """Returns the AUC of labels by their probabilities, of the answers that have these; None where
    these are all of one label."""
    truth, values = [], []
    for question, answer in zip(questions, answers, strict=True):
        found = label_probabilities(answer)
        if len(found) == len(question.truth):
            truth += question.truth
            values += found
    is_one, values = np.array(truth, bool), np.array(values)
    if is_one.all() or not is_one.any():
        return None
    return auc(values[is_one], values[~is_one])[0]


def label_probabilities(answer: Answer) -> list[float]:
    """Returns the probability of 1, beside 0, of each label of an answer, in order.

    The labels are the digits of the answer's tokens from the first "[" on. The list is empty where
    there are none that can be read, or where a token has more than one label.
    """
    try:
        return _label_probabilities(answer.logprobs or ())
    except (AttributeError, KeyError, TypeError):  # of a server with a form of its own
        return []


def _label_probabilities(tokens: Sequence[dict]) -> list[float]:
    found, is_list = [], False
    for token in tokens:
        text = token["token"]
        if not is_list:
            _, bracket, text = text.partition("[")
            is_list = bool(bracket)
        digits = _DIGIT.findall(text)
        if len(digits) > 1:
            return []
        if digits:
            found.append(_probability_of_one(token))
    return found


def _probability_of_one(token: dict) -> float:
    weights = {"0": 0.0, "1": 0.0}
    alternatives = {entry["token"]: entry["logprob"] for entry in token.get("top_logprobs") or ()}
    for text, logprob in (alternatives | {token["token"]: token["logprob"]}).items():
        digits = _DIGIT.findall(text)
        if len(digits) == 1:
            weights[digits[0]] += math.exp(logprob)
    return weights["1"] / max(weights["0"] + weights["1"], math.ulp(0.0))
