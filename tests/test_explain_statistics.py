"""Rules for latents of known truth: kind, precision and recall are those of the construction."""

import itertools

import handmade
import numpy as np
import pytest

from sae_jax import lm
from sae_jax.interpret.explain.statistics import by_statistics
from sae_jax.interpret.explain.statistics.finding import simplified
from sae_jax.interpret.explain.statistics.rules import InContext
from sae_jax.interpret.explain.statistics.testing import discoveries
from sae_jax.interpret.proxies import indicators
from sae_jax.interpret.text import token_bytes

PHRASES = {
    "English": [
        *"the dog runs of the house and a small cat sees the old man of out".split(),
        "out of",
    ],
    "Arabic": "ولد جميع الناس أحرارا متساوين في الكرامة والحقوق وقد وهبوا عقلا وضميرا ".split(),
    "Russian": "все люди рождаются свободными и равными в своем достоинстве и правах ".split(),
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다 ".split(),
}


@pytest.fixture(scope="module")
def tokenizer():
    return lm.load_tokenizer(lm.DEMO_MODEL)


@pytest.fixture(scope="module")
def text(tokenizer):
    """Tokens of random words, with numbers and addresses, and what is known of them."""
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(400):
        words = rng.choice(PHRASES[rng.choice(list(PHRASES))], 40).tolist()
        words[rng.integers(40)] = f"{rng.integers(1000, 9999)}"
        words[rng.integers(40)] = f"www.{rng.choice(PHRASES['English'])}.org/{rng.integers(99)}"
        documents.append(" ".join(words))
    tokens = lm.pack(documents, tokenizer, 64)
    return tokens, indicators(tokenizer, tokens)


def explain(path, tokenizer, text, dense, **arguments):
    tokens, known = text
    made = handmade.activity(path / "activity", tokens, dense)
    explanations, scores = by_statistics(made, tokenizer, indicators=known, **arguments)
    own = [score for score in scores if not score.control]
    return made, explanations, own, [score for score in scores if score.control]


def test_the_kind_is_found_where_one_holds(tokenizer, text, tmp_path):
    tokens, known = text
    dog, out, of = (tokenizer.encode(f"a {word}")[-1] for word in ("dog", "out", "of"))
    after = np.roll(tokens, 1, axis=1)
    after[:, 0] = -1
    truth = {
        "token": (tokens == dog, '"'),
        "token in context": ((tokens == of) & (after == out), "after"),
        "script": (known.of("Arabic script"), "Arabic script"),
        "regex": (known.of("URLs"), "URLs"),
    }
    assert all(where.sum() > 30 for where, _ in truth.values())
    rng = np.random.default_rng(1)
    dense = [where * rng.uniform(0.5, 1, where.shape) for where, _ in truth.values()]
    _, explanations, own, others = explain(tmp_path, tokenizer, text, dense)
    for (kind, (_, label)), explanation, score in zip(
        truth.items(), explanations, own, strict=True
    ):
        assert (explanation.kind, score.value) == (kind, 1), (explanation, score)
        assert label in explanation.text and score.details["claimed"]
        assert score.details["precision"] == score.details["recall"] == 1
    assert max(score.value for score in others) < 0.5


def test_nothing_is_said_of_what_is_random(tokenizer, text, tmp_path):
    tokens, _ = text
    rng = np.random.default_rng(2)
    dense = [rng.random(tokens.shape) < rate for rate in np.geomspace(0.003, 0.1, 100)]
    for _ in range(100):  # in bursts, of some sequences
        dense.append((rng.random((len(tokens), 1)) < 0.05) & (rng.random(tokens.shape) < 0.5))
    _, explanations, own, _ = explain(tmp_path, tokenizer, text, dense, least_f1=0.0)
    assert sum(bool(explanation.text) for explanation in explanations) <= 0.05 * len(dense)
    assert all(score.details["p_value"] >= 0 for score in own if not score.details["too_seldom"])


def test_precision_and_recall_are_those_of_the_construction(tokenizer, text, tmp_path):
    tokens, known = text
    rng = np.random.default_rng(3)
    arabic, russian = known.of("Arabic script"), known.of("Cyrillic script")
    korean = known.of("Hangul script")
    noisy = (arabic & (rng.random(tokens.shape) < 0.7)) | (
        ~arabic & (rng.random(tokens.shape) < 0.002)
    )
    mixed = arabic | (russian & (rng.random(tokens.shape) < 0.1))
    made, explanations, own, _ = explain(
        tmp_path, tokenizer, text, [noisy, mixed, arabic + korean * 0.5]
    )
    tested = made.held_out[:, None]
    for active, score, explanation in zip((noisy, mixed), own, explanations, strict=False):
        assert explanation.text == "Arabic script"
        hits = (active & arabic & tested).sum()
        precision, recall = hits / (arabic & tested).sum(), hits / (active & tested).sum()
        assert score.details["precision"] == pytest.approx(precision, rel=1e-5)
        assert score.details["recall"] == pytest.approx(recall, rel=1e-5)
        assert score.value == pytest.approx(2 / (1 / precision + 1 / recall), rel=1e-5)
    share = (russian & tested).sum() / (arabic & tested).sum()
    assert own[1].details["precision"] == 1
    assert own[1].details["recall"] == pytest.approx(1 / (1 + 0.1 * share), rel=0.02)
    assert explanations[2].text in (
        "Arabic script or Hangul script",
        "Hangul script or Arabic script",
    )
    assert own[2].value == 1


@pytest.mark.parametrize(
    ("last", "before", "expected"),
    [
        ("Latin script", 0, "Latin script and not first 16 tokens of a context"),
        ("Arabic script", 2, "Arabic script and 2 tokens after digits"),
    ],
)
def test_a_tree_is_found_where_no_rule_by_itself_holds(
    tokenizer, text, tmp_path, last, before, expected
):
    _, known = text
    if before:
        beside = np.zeros_like(known.of("digits"))
        beside[:, before:] = known.of("digits")[:, :-before]
    else:
        beside = ~known.of("first 16 tokens of a context")
    where = known.of(last) & beside
    assert where.sum() > 50
    _, (explanation,), (score,), _ = explain(tmp_path, tokenizer, text, [where])
    assert explanation.kind == "tree" and score.value == 1
    assert sorted(explanation.text.split(" and ")) == sorted(expected.split(" and "))


def test_what_a_tree_can_leave_out_changes_nothing():
    def holds(leaves, facts):
        return any(all(facts[i] == answer for i, answer in leaf) for leaf in leaves)

    def leaves_below(path, rng):
        if len(path) == 3 or rng.random() < 0.2:
            return [path]
        question = rng.choice([i for i in range(5) if i not in dict(path)])
        return [
            leaf
            for answer in (True, False)
            for leaf in leaves_below((*path, (int(question), answer)), rng)
        ]

    assert simplified([((0, True),), ((0, False), (1, True))]) == [((0, True),), ((1, True),)]
    for seed in range(100):
        rng = np.random.default_rng(seed)
        leaves = [leaf for leaf in leaves_below((), rng) if rng.random() < 0.5]
        shorter = simplified(leaves)
        assert sum(map(len, shorter)) <= sum(map(len, leaves))
        for facts in itertools.product((True, False), repeat=5):
            assert holds(shorter, facts) == holds(leaves, facts)


def test_parts_of_characters_are_named_by_their_bytes(tokenizer):
    token_of = {token_bytes(tokenizer, i): i for i in range(tokenizer.vocab_size)}
    rule = InContext((token_of[b"\xd8"],), (token_of[b" the"], token_of[b"a"]))
    assert rule.label(tokenizer, ()) == 'byte D8 after one of " the", "a"'


def test_what_is_too_seldom_is_said_to_be(tokenizer, text, tmp_path):
    tokens, _ = text
    once = np.zeros(tokens.shape)
    once[3, 5:9] = 1
    _, (never, seldom), own, _ = explain(tmp_path, tokenizer, text, [0 * once, once])
    assert never.text == seldom.text == "" and all(s.details["too_seldom"] for s in own)
    assert all(score.value is None for score in own)


def test_a_latent_is_told_by_itself(tokenizer, text, tmp_path):
    tokens, known = text
    rng = np.random.default_rng(4)
    dense = [known.of("numbers") & (rng.random(tokens.shape) < 0.8) for _ in range(3)]
    made, all_of_them, own, _ = explain(tmp_path, tokenizer, text, dense)
    (one,), (score,) = by_statistics(made, tokenizer, indicators=known, latents=[2])
    assert one == all_of_them[2] and score == own[2]


def test_discoveries():
    p = np.array([0.001, 0.9, 0.012, 0.04, 0.03])
    np.testing.assert_array_equal(discoveries(p, 0.05), [True, False, True, True, True])
    assert not discoveries(np.array([0.06, 0.2]), 0.05).any()
