"""Proxies are what their definition says, and each token has the label of its document."""

import base64
import itertools
import json
import math
import pathlib
import string

import numpy as np
import pytest

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.interpret.proxies import Bank, document_labels
from sae_jax.interpret.proxies.likelihood import largest_sums
from sae_jax.interpret.text import token_bytes

TEXTS = pathlib.Path(__file__).parents[2] / "shared" / "data" / "text"
DNA = "GATCACAGGTCTATCACCCTATTAACCACTCACGGGAGCTCTCCATGCATTTGGTATTTTCGTCTGGGGGGTGTGCACGCGATAGC"
MIXED = (
    "The deed 0xdeadbeef42aa is done. " + DNA + " and TmV2ZXIgZ29ubmEgZ2l2ZSB5b3U= أهلا، وسهلا بك "
    "in a house of 3 books, שלום then 語 or слово; BAD CAB faced 10101110001010110010."
)


@pytest.fixture(scope="module")
def tokenizer():
    return lm.load_tokenizer(lm.DEMO_MODEL)


@pytest.fixture(scope="module")
def mixed(tokenizer):
    return lm.pack([MIXED] * 3, tokenizer, 32)


def proxies(tokenizer, tokens, *wanted, **options):
    used = ~np.isin(tokens, tokenizer.special_tokens)
    bank = Bank(tokenizer, tokens, used, wanted or ("scripts", "alphabets"), **options)
    return {proxy.name: proxy for proxy in bank.of(tokens)}


def by_definition(tokenizer, tokens, alphabet: str, least: int) -> np.ndarray:
    """The largest log-likelihood ratio of all substrings that end at each token, one by one."""
    counts, special = {}, tokenizer.special_tokens
    for token in tokens.reshape(-1).tolist():
        counts[token] = counts.get(token, 0) + (token not in special)
    total = sum(counts.values())
    found = np.full(tokens.shape, -np.inf)
    for row, (start, end) in itertools.product(
        range(len(tokens)), itertools.combinations(range(tokens.shape[1] + 1), 2)
    ):
        substring = tokens[row, start:end].tolist()
        if len(substring) < least or set(substring) & set(special):
            continue
        characters = b"".join(token_bytes(tokenizer, t) for t in substring)
        log_given = sum(
            math.log(1 / len(alphabet) if byte in alphabet.encode() else 1e-10)
            for byte in characters
        )
        ratio = log_given - sum(math.log(counts[t] / total) for t in substring)
        found[row, end - 1] = max(found[row, end - 1], ratio)
    return found


@pytest.mark.parametrize(
    "name, alphabets, least",
    [
        ("DNA", ["ACGT"], 2),
        ("base64", [string.ascii_letters + string.digits + "+/"], 3),
        ("hexadecimal", ["0123456789abcdef", "0123456789ABCDEF"], 4),
        ("binary digits", ["01"], 4),
    ],
)
def test_the_fast_substring_maximum_is_that_of_the_definition(
    tokenizer, mixed, name, alphabets, least
):
    slow = np.max([by_definition(tokenizer, mixed, a, least) for a in alphabets], axis=0)
    found = proxies(tokenizer, mixed)[name].values
    assert (slow > 0).any()
    expected = slow > 0 if name == "DNA" else np.maximum(slow, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_largest_sum_of_numbers_in_a_row():
    numbers = np.array([[1.0, -3, 2, 2, -np.inf, 5]])
    assert largest_sums(numbers, 1).tolist() == [[1, -2, 2, 4, -np.inf, 5]]
    assert largest_sums(numbers, 2).tolist() == [[-np.inf, -2, 0, 4, -np.inf, -np.inf]]


def held(tokenizer, text: str, name: str, **options) -> str:
    """The tokens of a text inside a proxy, with a bar for each of the others."""
    tokens = np.array([[tokenizer.bos, *tokenizer.encode(text)]])
    inside = proxies(tokenizer, tokens, name, **options)
    (proxy,) = inside.values()
    parts = [
        token_bytes(tokenizer, t) if held else b"|"
        for t, held in zip(tokens[0, 1:].tolist(), proxy.inside[0, 1:].tolist(), strict=True)
    ]
    assert not proxy.inside[0, 0]
    return b"".join(parts).decode(errors="replace")


def test_scripts_are_of_characters(tokenizer):
    text = "It says أهلا، وسهلا ok"
    assert "".join(held(tokenizer, text, "Arabic").split("|")).replace(" ", "") == "أهلا،وسهلا"
    assert held(tokenizer, text, "Arabic", inherit=True).strip("|") == " أهلا، وسهلا"[1:]
    assert held(tokenizer, text, "Arabic script") == held(tokenizer, text, "Arabic")
    assert set(held(tokenizer, text, "Hebrew")) == {"|"}


def test_the_ratio_of_a_script_is_bayes(tokenizer):
    tokens = np.array([[tokenizer.bos, *tokenizer.encode("one two three four слово")]])
    (proxy,) = proxies(tokenizer, tokens, "Cyrillic").values()
    inside = proxy.inside[0, 1:]
    prior = inside.mean()  # no token of another script has a byte of these
    np.testing.assert_allclose(proxy.values[0, 1:][inside], -np.log(prior), rtol=1e-6)


def test_unknown_proxies_and_the_users_own(tokenizer, mixed):
    with pytest.raises(UserError, match="a proxy is 'Arabik'.*Arabic"):
        proxies(tokenizer, mixed, "Arabik")
    found = proxies(tokenizer, mixed, "pets", "numbers", patterns={"pets": "house|books"})
    assert list(found) == ["pets", "numbers"]
    assert found["pets"].inside.any() and found["numbers"].inside.any()


def test_tokens_have_the_labels_of_their_documents(tokenizer, tmp_path):
    file, texts = tmp_path / "text.jsonl", ["one two three " * 9, "abc " * 30, "x y z " * 20]
    documents = [{"text": t, "label": label} for t, label in zip(texts, "aba", strict=True)]
    file.write_text(
        "".join(json.dumps(d) + "\n" for d in [{"text": " ", "label": "c"}, *documents])
    )
    tokens = lm.pack(texts, tokenizer, 16)
    numbers = np.array([0, 2, 4])
    found = document_labels(file, tokenizer, tokens[numbers], numbers)
    assert found.names == ("a", "b")
    for row, number in enumerate(numbers):
        for place, document in enumerate(found.documents[row]):
            if document >= 0:
                assert tokenizer.decode([tokens[number, place]]).strip() in texts[document]
    assert (found.of("a") == np.isin(found.documents, [0, 2])).all()
    assert (found.codes[tokens[numbers] == tokenizer.bos] == -1).all()
    with pytest.raises(UserError, match="another text: sequence 0"):
        document_labels(file, tokenizer, tokens[1:2])
    with pytest.raises(UserError, match="give all documents"):
        document_labels(file, tokenizer, tokens[:1], [99])
    (tmp_path / "plain.txt").write_text(texts[0])
    with pytest.raises(UserError, match="has no label"):
        document_labels(tmp_path / "plain.txt", tokenizer, tokens)


def labelled_text():
    """Documents of several scripts, DNA and base64, in pieces, each with what it is."""
    wanted = ("Arabic, Standard", "Hebrew", "Russian", "Spanish", "Greek")
    for line in (TEXTS / "udhr_multilingual.jsonl").read_text().splitlines():
        document = json.loads(line)
        if document["name"].startswith(wanted):
            yield document["name"].partition(",")[0], document["text"]
    yield "wikipedia", (TEXTS / "wikitext2_valid.txt").read_text()[:400_000]
    yield "DNA", "".join((TEXTS / "dna_MT-human.fa").read_text().splitlines()[1:])
    yield "base64", base64.b64encode(np.random.default_rng(0).bytes(15_000)).decode()


@pytest.mark.slow
@pytest.mark.skipif(not TEXTS.is_dir(), reason="no shared data: ../shared/data/text")
def test_how_well_proxies_tell_documents_of_real_text(tokenizer, tmp_path):
    pieces = [
        {"label": label, "text": text[i : i + 1500]}
        for label, text in labelled_text()
        for i in range(0, len(text), 1500)
    ]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps(piece) + "\n" for piece in pieces))
    tokens = lm.pack((piece["text"] for piece in pieces), tokenizer, 128)
    labels = document_labels(file, tokenizer, tokens)
    found = proxies(tokenizer, tokens)

    def against(name, label):
        inside, of_label = (
            found[name].inside[labels.codes >= 0],
            labels.of(label)[labels.codes >= 0],
        )
        return (
            inside[of_label].mean(),
            of_label[inside].mean(),
            np.corrcoef(inside, of_label)[0, 1],
        )

    for name, label, low, high in (
        ("Arabic script", "Arabic", 0.85, 0.92),  # spaces and punctuation are of no script
        ("Hebrew script", "Hebrew", 0.86, 0.93),
    ):
        recall, precision, pearson = against(name, label)
        assert low < recall < high and precision > 0.99 and low < pearson < 0.97
    assert against("DNA", "DNA")[2] > 0.99
    recall, precision, pearson = against("base64", "base64")
    assert recall > 0.95 and precision < 0.9 and pearson < 0.9  # DNA and rare words are base64 too
    everything = proxies(tokenizer, tokens, "Arabic", inherit=True)["Arabic script"].inside
    assert everything[labels.of("Arabic")].mean() > 0.995
