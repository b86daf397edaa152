"""Labels and latents scored by vectors of sentences: planted ones, by an encoder of known vectors,
and fourteen easy concepts in real text, by a real one."""

import collections
import json
import re

import handmade
import numpy as np
import pytest
import scipy.stats
import tiny_bert

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.interpret.explain.embedding import (
    LEAST,
    NOTHING,
    by_embedding,
    score_labels,
    separability,
    window,
)
from sae_jax.interpret.explain.records import Explanation
from sae_jax.interpret.roc import auc
from sae_jax.lm.sentences import open_sentence_encoder

T = 64


class Letters:
    """An encoder whose vectors are how often each letter comes, so that what is alike is known."""

    def __init__(self):
        self.calls = collections.Counter()

    def encode(self, texts):
        self.calls.update(texts)
        counts = np.array([[text.count(chr(i)) for i in range(97, 123)] for text in texts])
        counts = counts.reshape(len(texts), 26) + 1e-3
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


def label(unit, text, by="llm"):
    return Explanation("latents", unit, by, "m-1", text)


@pytest.fixture(scope="module")
def tokenizer():
    return lm.load_tokenizer(lm.DEMO_MODEL)


@pytest.fixture(scope="module")
def activity(tmp_path_factory, tokenizer):
    """Latents 0, 1 and 2 are active in sequences full of q, j and z, 3 on random tokens, 4 in three
    sequences, 5 on all tokens; 6 on the first token of each sequence with q."""
    rng = np.random.default_rng(0)
    words, letters = "the sun rose over a town of little houses".split(), "qjz."
    which = np.arange(400) % 4
    texts = [
        " ".join(letters[kind] * 3 if rng.random() < 0.3 else rng.choice(words) for _ in range(T))
        for kind in which
    ]
    ids = [tokenizer.encode(text)[: T - 1] for text in texts]
    tokens = np.array([[tokenizer.bos, *one] for one in ids], np.int32)
    used = tokens != tokenizer.bos
    noise = rng.uniform(0.5, 1, tokens.shape)
    kinds = [np.where((which == kind)[:, None], noise, 0) for kind in range(3)]
    rare, first = np.zeros((2, *tokens.shape))
    rare[:3] = 1
    first[which == 0, 1] = 1
    random = np.where(rng.random(tokens.shape) < 0.01, noise, 0)
    latents = [*kinds, random, rare, noise, first]
    path = tmp_path_factory.mktemp("letters") / "activity"
    return handmade.activity(path, tokens, latents, used)


def test_labels_and_their_controls(activity, tokenizer):
    labels = [label(0, "qqq"), label(1, "jjj"), label(2, "zzz"), label(3, "qqq"), label(4, "e"),
              label(5, "sun"), label(6, ""), label(0, "houses", "labels")]  # fmt: skip
    encoder = Letters()
    scores = score_labels(activity, tokenizer, encoder, labels)
    assert encoder.calls[NOTHING] == 1
    found = {(s.unit, s.by, s.control): s for s in scores}
    assert len(found) == len(scores) and {s.scorer for s in scores} == {"embedding"}
    for unit in range(3):
        one = found[unit, "llm", ""]
        assert (one.value, one.examples, one.details["standard_error"]) == (1, 40, 0)
        assert found[unit, "llm", "none"].value < 0.6
        other = found[unit, "llm", "shuffled"]
        assert other.details["of"] != unit and other.value < 0.8
        assert labels[other.details["of"]].text != labels[unit].text
    assert 0.25 < found[3, "llm", ""].value < 0.75
    for unit, why in ((4, "active"), (5, "inactive")):  # too few windows
        assert found[unit, "llm", ""].value is None and found[unit, "llm", ""].details[why] < LEAST
    assert found[6, "llm", ""].value is None and (6, "llm", "none") not in found
    assert (0, "labels", "shuffled") not in found, "there is no other label of this method"
    sources = [found[i, "llm", "shuffled"].details["of"] for i in range(6)]
    assert sorted(sources) == list(range(6))


def test_hard_windows_lie_around_the_latents_tokens(activity, tokenizer):
    """Latent 6 is active in sequences with q, and off in the later parts of these."""
    (easy,) = score_labels(activity, tokenizer, Letters(), [label(6, "qqq")], controls=())
    (hard,) = score_labels(
        activity, tokenizer, Letters(), [label(6, "qqq")], controls=(), hard=True
    )
    assert (easy.scorer, hard.scorer) == ("embedding", "embedding_hard")
    assert hard.details["inactive"] and hard.value < easy.value


def test_separability_needs_no_label(activity, tokenizer):
    scores = separability(activity, tokenizer, Letters(), range(6))
    found = {(s.unit, s.control): s for s in scores}
    assert {(s.by, s.scorer) for s in scores} == {("embedding", "embedding_examples")}
    for unit in range(3):
        assert found[unit, ""].value == 1
    for unit in (1, 2):
        assert found[unit, "shuffled"].details["of"] == unit - 1
        assert found[unit, "shuffled"].value < 0.6
    assert 0.2 < found[3, ""].value < 0.8
    assert found[4, ""].value is None and found[5, ""].value is None


def test_both_together_are_the_same(activity, tokenizer, tmp_path):
    short = {"max_seq_length": 16}
    encoder = open_sentence_encoder(tiny_bert.write(tmp_path / "bert", sentences=short))
    labels = [label(0, "food"), label(1, "mat"), Explanation("neurons", 0, "llm", "m-1", "cat")]
    both = by_embedding(activity, tokenizer, tmp_path / "bert", labels, [1, 2], units="latents")
    apart = separability(activity, tokenizer, encoder, [1, 2])
    apart += score_labels(activity, tokenizer, encoder, labels[:2])
    assert sorted(map(repr, both)) == sorted(map(repr, apart))


@pytest.mark.parametrize("seed", range(3))
def test_auc_is_of_pairs_with_ties_as_half(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 6, 15) + 1, rng.integers(0, 6, 12)
    value, error = auc(a.astype(np.float32), b.astype(np.float32))
    pairs = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    np.testing.assert_allclose(value, pairs.mean())
    expected = scipy.stats.sem(pairs.mean(1)) ** 2 + scipy.stats.sem(pairs.mean(0)) ** 2
    np.testing.assert_allclose(error, np.sqrt(expected))


def test_windows_are_of_whole_tokens_around_the_peak(tokenizer):
    for text in (" ".join(f"word{i}" for i in range(80)), "كل الناس يولدون أحرارا " * 20):
        ids = np.array([tokenizer.bos, *tokenizer.encode(text)])
        for peak in (1, len(ids) // 2, len(ids) - 1):
            start, stop, found = window(tokenizer, ids, peak)
            assert start <= peak < stop and found in text and 95 < len(found) <= 110
            assert found in tokenizer.decode(ids[start:stop])
        start, stop, found = window(tokenizer, ids, len(ids) // 2)
        before = len(tokenizer.decode(ids[start : len(ids) // 2]))
        assert abs(before - len(found) / 2) < 8
    assert window(tokenizer, ids[:2], 0)[:2] == (0, 2)


@pytest.mark.parametrize(
    "options, message", [({"windows": 4}, "4 windows"), ({"controls": ["shufled"]}, "'shuffled'")]
)
def test_mistakes_are_named(activity, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        score_labels(activity, tokenizer, Letters(), [label(0, "q")], **options)


# By document, or by the words on which the latent is active. Labels as a person would write them.
ANIMALS = "cat|bird|fish|bear|frog|rabbit|duck|bunny|mouse|horse|cow|pig|lion|monkey|squirrel"
CONCEPTS = {
    "Arabic": "Arabic text", "Russian": "text in Russian", "Spanish": "Spanish text",
    "Chinese": "Chinese characters", "dna": "a DNA sequence", "html": "HTML code",
    "shakespeare": "a play by Shakespeare", "wikipedia": "a Wikipedia article",
    r"\bdogs?\b": "dogs", rf"\b({ANIMALS})s?\b": "animals",
    r"\b(sad|cried|crying|cry|tears|unhappy|upset)\b": "sadness and crying",
    r'"[^"\n]+"': "someone speaks, in quotation marks",
    r"\b\d+(\.\d+)?\b": "numbers", r"\b(eat|ate|food|cake|cookies?|lunch|dinner)\b": "food",
}  # fmt: skip


def documents():
    """(where it is from, text) of pieces of real text."""
    folder, rng = tiny_bert.SHARED / "text", np.random.default_rng(0)
    languages = ("Arabic", "Chinese", "Russian", "Spanish")  # in their kinds
    sources = collections.defaultdict(str)
    for line in (folder / "udhr_multilingual.jsonl").read_text().splitlines():
        one = json.loads(line)
        name = next((name for name in languages if one["name"].startswith(name)), one["name"])
        sources[name] += one["text"][: 12_000 if name in CONCEPTS else 600]
    sources["stories"] = "\n".join(json.loads((folder / "tinystories_1000.json").read_text()))
    for line in (folder / "tinystories_ru.jsonl").read_text().splitlines()[:20]:
        sources["Russian"] += json.loads(line)["story"]
    for name, file in (("wikipedia", "wikitext2_valid.txt"), ("shakespeare", "tinyshakespeare.txt"),
                       ("html", "html_wikipedia_mozilla.html")):  # fmt: skip
        sources[name] = (folder / file).read_text()
    dna = (folder / "dna_lambda_virus.fa").read_text().splitlines()[1:]
    sources["dna"] = "".join(dna)
    for name, text in sources.items():
        starts = rng.permutation(range(0, len(text), 300))[: 700 if name == "stories" else 60]
        yield from ((name, text[start : start + 300]) for start in starts)


@pytest.fixture(scope="module")
def real(tmp_path_factory, tokenizer):
    """Latents that are active, by random values, where one of the concepts is."""
    rng, length = np.random.default_rng(0), 192
    tokens, dense = [], []
    for name, text in documents():
        encoded = tokenizer.backend.encode(text, add_special_tokens=False)
        ids = [tokenizer.bos, *encoded.ids][:length]
        on = np.zeros((len(CONCEPTS), length))
        for latent, concept in enumerate(CONCEPTS):
            spans = [match.span() for match in re.finditer(concept, text)]
            for place, (start, stop) in enumerate(encoded.offsets[: length - 1], 1):
                inside = any(start < end and stop > begin for begin, end in spans)
                on[latent, place] = name == concept or (name != "html" and inside)
        tokens.append([*ids, *[tokenizer.bos] * (length - len(ids))])
        dense.append(on * rng.uniform(0.3, 1, length))
    tokens = np.array(tokens)
    path = tmp_path_factory.mktemp("real") / "activity"
    return handmade.activity(path, tokens, np.stack(dense, 1), tokens != tokenizer.bos)


@pytest.mark.slow
@pytest.mark.skipif(not tiny_bert.MINILM.is_dir(), reason="no all-MiniLM-L6-v2: see tiny_bert.py")
@pytest.mark.skipif(not tiny_bert.SHARED.is_dir(), reason="no shared data: ../shared/data/text")
def test_fourteen_easy_concepts(real, tokenizer):
    texts = list(CONCEPTS.values())
    labels = [
        Explanation("latents", unit, "labels", f"{shift} further", texts[(unit + shift) % 14])
        for unit in range(14)
        for shift in range(14)
    ]
    scores = by_embedding(real, tokenizer, tiny_bert.MINILM, labels)
    values = {(s.method, s.control, s.unit): s.value for s in scores}
    own = [values["0 further", "", unit] for unit in range(14)]
    random = [values[f"{shift} further", "", unit] for unit in range(14) for shift in range(1, 14)]
    nothing = [values["0 further", "none", unit] for unit in range(14)]
    shuffled = [values["0 further", "shuffled", unit] for unit in range(14)]
    print("", *zip(texts, own, strict=True), sep="\n")
    print(*(np.mean(found) for found in (own, random, shuffled, nothing)))
    assert np.mean(own) >= 0.85
    assert abs(np.mean(random) - 0.5) < 0.08
    assert abs(np.mean(shuffled) - 0.5) < 0.12, "14 of these"
    assert abs(np.mean(nothing) - 0.5) < 0.12
