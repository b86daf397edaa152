"""Explainers and scorers on a planted text, over HTTP: a judge scores by what it knows of it."""

import collections
import contextlib
import json
import random
import re

import judge_server
import numpy as np
import planted_words
import pytest
import tokenizers
from planted_words import CONCEPTS, DEAD, RARE

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.interpret.explain.llm import scoring
from sae_jax.interpret.explain.llm.client import Client
from sae_jax.interpret.explain.llm.explaining import explain
from sae_jax.interpret.explain.llm.questions import Answer
from sae_jax.interpret.explain.llm.scorers import SCORERS
from sae_jax.interpret.explain.llm.scoring import NOTHING, planned, score
from sae_jax.interpret.explain.records import Explanation

LABELLED = [Explanation("latents", i, "labels", "", name) for i, name in enumerate(CONCEPTS[:2])]
BALANCED = ("detection", "fuzzing", "logits")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return planted_words.activity(tmp_path_factory.mktemp("words")), planted_words.tokenizer()


@contextlib.contextmanager
def judge(folder, answer=planted_words.knowing, **options):
    """Yields a server whose answers `answer` gives, by the messages, and a client of it."""

    def said(body):
        found = answer(body["messages"])
        return found if isinstance(found, str) or "content" in found else json.dumps(found)

    with judge_server.serve(said) as server:
        yield server, Client(
            server.base_url, "judge", cache=folder / "cache.jsonl", key_variable=None, retries=0,
            **options,
        )  # fmt: skip


def values(scores, control=""):
    """The scores (latents,) of each scorer, of one control."""
    found = collections.defaultdict(list)
    for one in scores:
        if one.control == control:
            found[one.scorer].append(one.value)
    return found


@pytest.mark.parametrize("way", ["bricken2023", "delphi", "saebench", "np_max_act_logits"])
def test_explains_what_is_active_often_enough(world, tmp_path, way):
    with judge(tmp_path) as (server, client):
        found = explain(*world, client, [2, 0, DEAD, RARE], explainer=way,
                        effects=planted_words.effects())  # fmt: skip
    assert [e.text for e in found] == ["map", "sun", "", ""]
    assert [e.details.get("dropped") for e in found[2:]] == ["dead", "few_windows"]
    assert re.fullmatch(f"explain_{way}@[0-9a-f]{{12}}", found[0].method)
    assert len(server.calls) == 2
    for body in server.calls:
        text = body["messages"][-1]["content"]
        assert "<|" not in text and "[/INST" not in text  # what a server may take for a turn's end


def test_composition_of_49_and_60(world, tmp_path):
    with judge(tmp_path) as (server, client):
        explained = explain(*world, client, [0])
        score(*world, client, explained, scorers=["bricken2023"], controls=[])
    shown, tested = (body["messages"][-1]["content"].split("\n") for body in server.calls)
    lines = [json.loads(line) for line in shown if line.startswith('{"from"')]
    parts = {f"part {i} of 12": 2 for i in range(1, 13)}
    expected = {"strongest": 10, **parts, "random": 5, "same token": 10}
    assert collections.Counter(line["from"] for line in lines) == expected
    for line in lines:
        words = [word.strip(" ") for word, _ in line["tokens"]]
        levels = [np.ceil(9 * value / 12) for value in planted_words.active("sun", words)]
        assert [level for _, level in line["tokens"]] == levels
    windows = [json.loads(line.partition(". ")[2]) for line in tested if re.match(r"\d+\. ", line)]
    assert len(windows) == 60 and sum(map(len, windows)) > 530  # 540, but for ends of texts
    words = [[token.strip(" ") for token in window] for window in windows]
    on = [w for w in words if any(planted_words.active("sun", w))]
    off = [w for w in words if w not in on and "sun12" in w]
    assert (len(on), len(off)) == (6 + 2 * 12, 20)
    peaks = collections.Counter(next(w for w in window if re.match(r"sun\d", w)) for window in on)
    assert peaks == {f"sun{i}": 2 for i in range(1, 12)} | {"sun12": 6 + 2}


def test_judge_that_knows_scores_one_and_controls_do_not(world, tmp_path):
    with judge(tmp_path) as (server, client):
        found = score(*world, client, LABELLED, scorers=list(SCORERS),
                      effects=planted_words.effects())  # fmt: skip
    assert values(found) == {name: [1.0] * 2 for name in SCORERS}
    none, shuffled = values(found, "none"), values(found, "shuffled")
    for name in BALANCED:
        assert none[name] == [0.5] * 2 and max(shuffled[name]) <= 0.5
    assert none["saebench"] == [10 / 14] * 2
    assert none["bricken2023"] == [0.0] * 2 and max(shuffled["bricken2023"]) < 0.1
    assert "intruder" not in none
    others = [s.details["of"] for s in found if s.control == "shuffled" and s.scorer == "detection"]
    assert others == [1, 0]
    assert any(json.dumps(NOTHING) in body["messages"][-1]["content"] for body in server.calls)
    assert not any(s.unparsable for s in found)
    assert {s.examples for s in found if s.scorer == "detection"} == {100}


def constant(messages):
    kind, (_, examples) = planted_words.asked(messages), planted_words.question(messages)
    return {
        "bricken2023": {"predictions": [[f"{token} 7" for token in w] for w in examples]},
        "saebench": {"active": []},
        "intruder": {"intruder": 1},
    }.get(kind, {"labels": [1] * len(examples)})


def guessing(messages):
    kind, (_, examples) = planted_words.asked(messages), planted_words.question(messages)
    rng = random.Random(messages[-1]["content"])
    return {
        "bricken2023": {
            "predictions": [[f"{t} {rng.randrange(10)}" for t in window] for window in examples]
        },
        "saebench": {"active": [i for i in range(1, 15) if rng.random() < 0.5]},
        "intruder": {"intruder": rng.randint(1, 5)},
    }.get(kind, {"labels": [rng.randrange(2) for _ in examples]})


def test_judges_that_know_nothing(world, tmp_path):
    effects = planted_words.effects()
    with judge(tmp_path / "a", constant) as (_, client):
        found = values(score(*world, client, LABELLED, scorers=list(SCORERS), effects=effects))
    assert all(found[name] == [0.5] * 2 for name in BALANCED)
    assert found["bricken2023"] == [0.0] * 2 and found["saebench"] == [10 / 14] * 2
    with judge(tmp_path / "b", guessing) as (_, client):
        found = values(score(*world, client, LABELLED, scorers=list(SCORERS), effects=effects))
    for name, chance, examples in (
        ("detection", 0.5, 200), ("fuzzing", 0.5, 200), ("logits", 0.5, 200),
        ("saebench", 0.5, 28), ("intruder", 0.2, 20),
    ):  # fmt: skip
        error = np.sqrt(chance * (1 - chance) / examples)
        assert abs(np.mean(found[name]) - chance) < 3 * error
    assert abs(np.mean(found["bricken2023"])) < 3 / np.sqrt(2 * 540)


def runs(text, length=5):
    """All runs of that many words in the examples of a question; chance makes no two the same."""
    words = re.findall(r"\w+", text)
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_nothing_is_tested_that_was_explained(world, tmp_path):
    shown, tested = set(), set()
    with judge(tmp_path) as (server, client):
        explain(*world, client, [0, 1], explainer="delphi")
        explained = len(server.calls)
        for scorer, negatives in (
            ("detection", "random"), ("intruder", "same_tokens"), ("saebench", "random"),
        ):  # fmt: skip
            score(*world, client, LABELLED, scorers=[scorer], negatives=negatives, controls=[])
    for number, body in enumerate(server.calls):
        for line in body["messages"][-1]["content"].split("\n"):
            if re.match(r"\d+\. ", line):
                (shown if number < explained else tested).update(runs(line.partition(". ")[2]))
    assert len(shown) > 1000 and len(tested) > 1000
    assert not shown & tested


@pytest.mark.parametrize(
    "bad",
    [
        "I cannot say.",
        '{"labels": [1]}',
        '{"labels": [1, 0, 1, 0, 2]}',
        {"content": "", "refusal": "no"},
        {"content": '{"labels": [1', "finish_reason": "length"},
    ],
)
def test_what_cannot_be_read_is_wrong_and_is_counted(world, tmp_path, bad):
    def answer(messages):
        _, examples = planted_words.question(messages)
        first = min(examples)
        return bad if sum(map(ord, first)) % 4 == 0 else planted_words.knowing(messages)

    with judge(tmp_path, answer) as (_, client):
        (one,) = score(*world, client, LABELLED[:1], scorers=["detection"], controls=[])
    assert 0 < one.unparsable < 20
    assert one.details["without_unparsable"] == 1
    assert one.details["accuracy"] == 1 - one.unparsable / 20


def test_auc_is_of_the_probabilities_of_labels(world, tmp_path):
    """All labels are 0, and the probability of 1 is larger where it is true."""

    def answer(messages):
        truth = planted_words.knowing(messages)["labels"]
        tokens = ['{"labels', '": [', *[t for _ in truth for t in ("0", ",")][:-1], "]}"]
        labels = iter(truth)
        logprobs = [{"token": t, "logprob": 0.0, "top_logprobs": [
            {"token": "0", "logprob": -0.5}, {"token": "1", "logprob": next(labels) - 3.0}
        ] if t == "0" else []} for t in tokens]  # fmt: skip
        return {"content": "".join(tokens), "logprobs": logprobs}

    with judge(tmp_path, answer) as (server, client):
        found = score(*world, client, LABELLED, scorers=["detection"], controls=["none"],
                      logprobs=5)  # fmt: skip
    assert all(body["logprobs"] and body["top_logprobs"] == 5 for body in server.calls)
    assert [s.details["auc"] for s in found] == [1.0, 0.5] * 2
    assert {s.value for s in found} == {0.5}


def test_plan_counts_the_calls(world, tmp_path):
    with judge(tmp_path) as (server, client):
        plan = planned(*world, client, [0, 1, DEAD], scorers=["saebench", "intruder"])
        assert not server.calls
        explanations = explain(*world, client, [0, 1, DEAD])
        score(*world, client, explanations, scorers=["saebench", "intruder"])
    assert plan.calls == len(server.calls) == 2 * (1 + 3 + 10)


def test_a_prompt_of_ones_own(world, tmp_path):
    file = tmp_path / "mine.md"
    file.write_text("# user\nSee:\n{{marked}}\n\n# assistant\nhm\n\n# user\n{{promoted}}")
    with judge(tmp_path, lambda _: "First I think.\n\nA {{sort}} of\nthing\n") as (_, client):
        (found,) = explain(*world, client, [0], explainer=str(file))
    assert found.text == "A {{sort}} of thing" and found.method.startswith("mine@")


@pytest.mark.parametrize(
    "text,message",
    [
        (b"# user\n{{exampels}}", "has {{exampels}}; did you mean 'examples'"),
        (b"What is it?", "shows nothing of a latent"),
        (b"# user\n{{marked}}\n# assistant\nIt is", "must end with a turn of the user's"),
        (b"\xff{{marked}}", "no text in UTF-8"),
        (None, "cannot read the prompt"),
    ],
)
def test_mistakes_in_a_prompt(world, tmp_path, text, message):
    if text is not None:
        (tmp_path / "mine.md").write_bytes(text)
    with pytest.raises(UserError, match=re.escape(message)):
        explain(*world, None, [0], explainer=str(tmp_path / "mine.md"))


class Simulating:
    """A model of characters, sure of the activation that the last explanation gives each token."""

    spec, max_context = "simulating", 10**5

    def __init__(self):
        characters = ["<s>", "\t", "\n", *map(chr, range(32, 127))]
        backend = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<s>")
        )
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        self.characters = characters
        self.tokenizer = lm.Tokenizer(backend, 0, None, None, "characters", (0,), "")

    def forward(self, ids):
        text = "".join(self.characters[i] if i else "?" for i in ids[0])
        concept = re.findall(r'responds to: "(.*)"', text)[-1]
        logits = np.zeros((*ids.shape, len(self.characters)), np.float32)
        for tab in re.finditer("\t", text):
            words = [line.partition("\t")[0].strip() for line in text[: tab.start()].split("\n")]
            level = int(np.ceil(9 * planted_words.active(concept, words)[-1] / 12))
            logits[0, tab.start(), self.characters.index(str(level))] = 100
        return logits, {}


def test_simulation_by_probabilities(world):
    found = score(*world, None, LABELLED, scorers=["simulation"], judge=Simulating())
    assert [s.control for s in found[:3]] == ["", "shuffled", "none"]
    assert {s.examples for s in found} == {10}
    assert values(found)["simulation"] == pytest.approx([1, 1])
    assert values(found, "none")["simulation"] == [0, 0]
    assert max(values(found, "shuffled")["simulation"]) <= 0
    small = Simulating()
    small.max_context = 200
    with pytest.raises(UserError, match="the context of simulating has 200"):
        score(*world, None, LABELLED, scorers=["simulation"], judge=small)


def test_labels_have_the_probabilities_that_the_server_gives():
    def token(text, logprob, **others):
        top = [{"token": t, "logprob": float(np.log(p))} for t, p in others.get("top", ())]
        return {"token": text, "logprob": float(np.log(logprob)), "top_logprobs": top}

    of_two = [token('{"labels":', 1), token(" [", 1), token("1", 0.6, top=[("1", 0.6), ("0", 0.2)])]
    of_two += [token(", ", 1), token("0", 0.9, top=[("0", 0.9), (" 1", 0.1)]), token("]}", 1)]
    for tokens, expected in (
        (of_two, [0.75, 0.1]),
        ([token("[10]", 1)], []),
        ([{"token": "["}, {"token": "1"}], []),
        (["[", "1"], []),
        (None, []),
    ):
        answer = Answer("", None, "ok", 0, 0, tokens)
        np.testing.assert_allclose(scoring.label_probabilities(answer), expected)
