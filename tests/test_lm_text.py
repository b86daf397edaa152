"""Reading documents, special tokens, packing."""

import gzip
import json
import pathlib
import sys

import numpy as np
import pytest
import tokenizers

from sae_jax import lm
from sae_jax.config import UserError

BOS = 0


def letters(directory, **config):
    """A model directory with nothing but a tokenizer of single letters."""
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate("abcdefghij \n")}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.save(str(directory / "tokenizer.json"))
    for name, values in config.items():
        (directory / f"{name}.json").write_text(json.dumps(values))
    return lm.load_tokenizer(directory)


@pytest.fixture
def tokenizer(tmp_path):
    return letters(tmp_path, config={"bos_token_id": 0, "eos_token_id": [2, 9]})


def test_special_tokens_by_id_and_by_name(tmp_path):
    (tmp_path / "a").mkdir()
    tokenizer = letters(
        tmp_path / "a",
        generation_config={"bos_token_id": 0, "eos_token_id": [2, 9]},
        tokenizer_config={"pad_token": {"content": "<pad>"}, "bos_token": "</s>"},
    )
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 2, 1)
    assert tokenizer.special_tokens == (0, 1, 2) and tokenizer.name == "a"
    (tmp_path / "b").mkdir()
    tokenizer = letters(tmp_path / "b", tokenizer_config={"eos_token": "</s>"})
    assert tokenizer.bos == tokenizer.eos == 2 and tokenizer.special_tokens == (2,)
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="names no BOS or EOS"):
        letters(tmp_path / "c", config={})
    with pytest.raises(UserError, match="no tokenizer.json in"):
        lm.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer"):
        lm.load_tokenizer(tmp_path)


def test_encoding_adds_nothing_and_decodes_back(tokenizer):
    assert tokenizer.encode("abc") == [3, 4, 5]
    assert tokenizer.decode(np.array([3])) == "a"
    assert tokenizer.encode_batch(["a", "bc"]) == [[3], [4, 5]]


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_token_in_order(tokenizer, seed):
    rng = np.random.default_rng(seed)
    documents = ["".join(rng.choice(list("abcdefghij"), rng.integers(0, 30))) for _ in range(700)]
    length = int(rng.integers(2, 20))
    contexts = lm.pack(documents, tokenizer, length)
    assert contexts.dtype == np.int32 and contexts.shape[1] == length
    assert (contexts[:, 0] == BOS).all() and (contexts[:, 1] != BOS).all()
    wanted = [i for document in documents for i in tokenizer.encode(document)]
    packed = contexts[contexts != BOS]
    np.testing.assert_array_equal(packed, wanted[: len(packed)])
    assert len(wanted) - len(packed) < length
    # A document begins after a BOS: at a context's start or between documents.
    starts = {0, *np.cumsum([len(document) for document in documents]).tolist()}
    before = np.cumsum((contexts != BOS).ravel()) - (contexts != BOS).ravel()
    inner_bos = before.reshape(contexts.shape)[:, 1:][contexts[:, 1:] == BOS]
    assert set(inner_bos.tolist()) <= starts and len(inner_bos) > 0
    budget = 3 * length + 1
    np.testing.assert_array_equal(lm.pack(documents, tokenizer, length, budget), contexts[:3])


def test_packing_reads_no_more_than_it_needs(tokenizer):
    def endless():
        while True:
            yield "abcabcabc"

    assert lm.pack(endless(), tokenizer, 8, 800).shape == (100, 8)


@pytest.mark.parametrize(
    "texts, length, tokens, message",
    [
        ([], 8, None, "fewer tokens than one context of 8"),
        (["", "abc"], 8, None, "fewer tokens than one context of 8"),
        (["abc"], 1, None, "context_length is 1"),
        (["abc"], 8, -5, "-5 tokens are less"),
        (["abc"], 8, 7, "7 tokens are less than one context of 8"),
    ],
)
def test_too_little_text_is_refused(tokenizer, texts, length, tokens, message):
    with pytest.raises(UserError, match=message):
        lm.pack(texts, tokenizer, length, tokens)


def test_every_kind_of_source(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n\n\ntwo")
    (tmp_path / "list.json").write_text(json.dumps(["three", {"text": "four"}]))
    (tmp_path / "lines.jsonl").write_text('{"text": "five"}\n\n"six"\n')
    with gzip.open(tmp_path / "z.jsonl.gz", "wt") as file:
        file.write('{"text": "семь"}\n')
    with gzip.open(tmp_path / "y.md.gz", "wt") as file:
        file.write("eight")
    (tmp_path / "blank.txt").write_text(" \n")
    wanted = {"a.txt": ["one\n\n\n\ntwo"], "list.json": ["three", "four"],
              "lines.jsonl": ["five", "six"], "z.jsonl.gz": ["семь"], "y.md.gz": ["eight"],
              "blank.txt": []}  # fmt: skip
    for name, texts in wanted.items():
        assert list(lm.read_texts(tmp_path / name)) == texts
    assert list(lm.read_texts(tmp_path / "a.txt", collapse_newlines=True)) == ["one\ntwo"]
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.py").write_text("nine")
    in_order = [text for name in sorted(wanted) for text in wanted[name]]
    in_order.insert(in_order.index("eight"), "nine")
    assert list(lm.read_texts([str(tmp_path)])) == in_order


def test_a_large_text_file_is_cut_at_line_ends(tmp_path):
    line = "x" * 999_999 + "\n"
    (tmp_path / "large.txt").write_text(9 * line)
    documents = list(lm.read_texts(tmp_path / "large.txt"))
    assert len(documents) > 1 and "".join(documents) == 9 * line
    assert all(document.endswith("\n") and len(document) <= 5 << 20 for document in documents)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.json", b'{"text": "a"}', "holds no list"),
        ("x.json", b"[1, 2", "x.json is not valid JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"title": "b"}', "line 2 has no text in field 'text'; it has"),
        ("x.jsonl", b'{"text": "a"}\n{"te', "x.jsonl is not valid JSON"),
        ("x.txt", b"good \xff", "x.txt is not UTF-8 text .byte 5"),
        ("x.txt.gz", b"not gzip", "cannot read .*x.txt.gz"),
    ],
)
def test_sources_that_do_not_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(lm.read_texts(tmp_path / name))


def test_missing_sources(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no text at .*/nowhere.txt; give a file"):
        list(lm.read_texts(tmp_path / "nowhere.txt"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install sae-jax\[lm\]"):
        list(lm.read_texts("datasets:some/name"))


def test_files_of_a_directory_come_in_the_order_of_their_parts(tmp_path):
    for name in ("b/x", "a.txt", "a/y", "a/b/z"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("text")
    names = [path.relative_to(tmp_path) for path in lm.text_files(tmp_path)]
    assert names == [pathlib.Path(name) for name in ("a/b/z", "a/y", "a.txt", "b/x")]
