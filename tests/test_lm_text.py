"""Reading documents, special tokens, packing."""

import bz2
import dataclasses
import gzip
import json
import lzma
import pathlib
import sys

import numpy as np
import pytest
import tokenizers

from sae_jax import lm
from sae_jax.errors import UserError

BOS = 0
_NOISE = bytes(i * i % 89 + 33 for i in range(9000))


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


def family(directory, special, template=None, **configs):
    """The tokenizer of a directory with what a family's files say: `special` tokens from id 3 on,
    `template` put before a text by tokenizer.json itself."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(special)
    if template:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{template} $A", special_tokens=[(template, backend.token_to_id(template))]
        )
    backend.save(str(directory / "tokenizer.json"))
    for name, values in configs.items():
        (directory / f"{name}.json").write_text(json.dumps(values))
    return lm.load_tokenizer(directory)


END, IM_END = "<|endoftext|>", "<|im_end|>"
FAMILIES = {
    "gpt2, pythia": (([END],), {"config": {"bos_token_id": 3, "eos_token_id": 3}}, 3, (3,),
                     "bos_token_id of config.json"),
    "llama 2": ((["<s>", "</s>"], "<s>"), {"config": {"bos_token_id": 3, "eos_token_id": 4}},
                3, (3, 4), "puts it before every text"),
    # An early conversion of Llama named the wrong ids in config.json.
    "wrong ids": ((["<s>", "</s>"], "<s>"), {"config": {"bos_token_id": 0, "eos_token_id": 4}},
                  3, (3, 4), "puts it before every text"),
    "llama 3 chat": ((["<|begin_of_text|>", END, "<|eot_id|>"], "<|begin_of_text|>"),
                     {"config": {"bos_token_id": 3, "eos_token_id": [4, 5]}}, 3, (3, 4, 5),
                     "puts it before every text"),
    "qwen": (([END, "<|im_start|>", IM_END],),
             {"config": {"bos_token_id": 3, "eos_token_id": 3},
              "tokenizer_config": {"bos_token": None, "pad_token": END}}, 3, (3,),
             "bos_token_id of config.json"),
    "qwen chat, no id": (([END, "<|im_start|>", IM_END],),
                         {"config": {"eos_token_id": 5},
                          "tokenizer_config": {"bos_token": None, "pad_token": END}}, 3, (3, 5),
                         "stands between documents"),
    "gemma 3 chat": ((["<pad>", "<eos>", "<bos>", "<end_of_turn>"], "<bos>"),
                     {"config": {"eos_token_id": [4, 6],
                                 "text_config": {"bos_token_id": 5, "pad_token_id": 3}}},
                     5, (3, 4, 5, 6), "puts it before every text"),
    "gemma without template": ((["<pad>", "<eos>", "<bos>"],),
                               {"config": {"text_config": {"bos_token_id": 5}}}, 5, (5,),
                               "bos_token_id of config.json"),
    "only an eos": ((["</s>"],), {"config": {"eos_token_id": 3}}, 3, (3,), "EOS serves as one"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_bos_of_each_family(tmp_path, name):
    tokens, configs, bos, special, why = FAMILIES[name]
    tokenizer = family(tmp_path, *tokens, **configs)
    assert (tokenizer.bos, tokenizer.special_tokens) == (bos, special)
    provenance = tokenizer.bos_provenance()
    assert why in provenance["why"] and provenance["id"] == bos
    assert provenance["token"] == tokenizer.decode([bos])
    contexts = lm.pack(["abab", "bb"], tokenizer, 4)
    np.testing.assert_array_equal(contexts, [[bos, 0, 1, 0], [bos, 1, bos, 1]])


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


@pytest.mark.parametrize("module, suffix", [(bz2, ".bz2"), (lzma, ".xz"), (gzip, ".gz")])
def test_compressed_files_by_their_suffix(tmp_path, module, suffix):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(module.compress('{"text": "семь"}\n'.encode()))
    (tmp_path / f"b.json{suffix}").write_bytes(module.compress(b'["eight"]'))
    (tmp_path / f"c{suffix}").write_bytes(module.compress(b"nine"))
    (tmp_path / f"d.png{suffix}").write_bytes(module.compress(b"\x89PNG\xff\xfe"))
    assert list(lm.read_texts(tmp_path)) == ["семь", "eight", "nine"]


def test_zstandard_of_several_frames_and_a_truncated_one(tmp_path):
    compress = pytest.importorskip("zstandard").ZstdCompressor().compress
    lines = [json.dumps({"text": f"{i} " + _NOISE.decode()}) + "\n" for i in range(300)]
    halves = ["".join(lines[:100]).encode(), "".join(lines[100:]).encode()]
    whole = compress(halves[0]) + compress(halves[1])
    file = tmp_path / "x.jsonl.zst"
    file.write_bytes(whole)
    assert [text.split()[0] for text in lm.read_texts(file)] == [str(i) for i in range(300)]
    for damaged in (whole[:-30], b"not zstandard"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot read .*x.jsonl.zst"):
            list(lm.read_texts(file))


def test_zstandard_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_jax.lm.compressed.zstandard", None)
    (tmp_path / "x.txt.zst").write_bytes(b"")
    with pytest.raises(UserError, match=r"x.txt.zst needs .* pip install 'sae-jax\[lm\]'"):
        list(lm.read_texts(tmp_path / "x.txt.zst"))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_datasets_by_path(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = [f"text {i}" for i in range(20)]
    rows = datasets.Dataset.from_dict({"text": texts})
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "folder").mkdir()
    rows.to_json(str(tmp_path / "folder" / "train.jsonl"))
    for source in ("rows.parquet", "saved", "splits:test", "folder:train"):
        assert list(lm.read_texts(f"datasets:{tmp_path / source}")) == texts, source
    assert next(lm.read_texts(f"datasets:{tmp_path}/rows.parquet", field="text")) == "text 0"
    for source, message in (
        ("splits:dev", "splits:dev does not open"),
        ("folder:dev", "folder:dev does not open"),
        ("rows.parquet:train[:10]", "write datasets:.*/rows.parquet:train and limit it"),
    ):
        with pytest.raises(UserError, match=message):
            list(lm.read_texts(f"datasets:{tmp_path / source}"))
    with pytest.raises(UserError, match="row 0 has no text in field 'body'; it has text"):
        list(lm.read_texts(f"datasets:{tmp_path / 'saved'}", field="body"))


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
        ("x.jsonl", b'{"text": "a"}\n{"te', "x.jsonl, line 2 is not valid JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "x.jsonl, line 2 is not valid JSON"),
        ("x.jsonl", b"null", "line 1 has no text in field 'text'; it is None"),
        ("x.txt", b"good \xff", "x.txt, line 1 is not UTF-8 text .byte 5"),
        ("x.txt", b"good\n" * 9000 + b"\xe9\n", "x.txt, line 9001 is not UTF-8 text .byte 45000"),
        ("x.txt.gz", b"not gzip", "cannot read .*x.txt.gz"),
        ("x.txt.gz", gzip.compress(_NOISE)[:-30], "cannot read .*x.txt.gz"),
        ("x.txt.bz2", bz2.compress(_NOISE)[:-30], "cannot read .*x.txt.bz2"),
        ("x.txt.xz", lzma.compress(_NOISE)[:-30], "cannot read .*x.txt.xz"),
        ("x.txt.xz", b"not xz", "cannot read .*x.txt.xz"),
    ],
)
def test_sources_that_do_not_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(lm.read_texts(tmp_path / name))


def test_files_as_they_are_found(tmp_path):
    """Suffixes in capitals, .ndjson, JSON lines in a .json, marks, null, halves of a character."""
    line = b'{"text": "one", "url": "x"}\n'
    files = {
        "a.JSONL": (line, ["one"]),
        "b.ndjson": (line, ["one"]),
        "c.json": (3 * line, ["one"] * 3),
        "d.JSON.GZ": (gzip.compress(2 * line), ["one"] * 2),
        "e.json": (b'[\n "two",\n {"text": "three"}\n]', ["two", "three"]),
        "f.jsonl": (b"\xef\xbb\xbf" + line, ["one"]),
        "g.txt": (b"\xef\xbb\xbffour\r\nfive", ["four\nfive"]),
        "h.json": (b"\xef\xbb\xbf" + b'["six"]', ["six"]),
        "i.jsonl": (b'{"text": null}\n' + line, ["one"]),
        "j.jsonl": (b'{"text": "\\ud83d\\ude42 \\ud83d"}\n', ["\U0001f642 \ud83d"]),
        "k.json": (json.dumps(["UTF-16"]).encode("utf-16"), ["UTF-16"]),
    }
    for name, (content, texts) in files.items():
        (tmp_path / name).write_bytes(content)
        assert list(lm.read_texts(tmp_path / name)) == texts, name


def test_a_half_of_a_character_is_a_replacement_character(tokenizer, tmp_path):
    """tiktoken #82: a lone surrogate, which no tokenizer takes, after all the work."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({"\ufffd": 0, "\U0001f642": 1, "a": 2}, [])
    )
    tokenizer = dataclasses.replace(tokenizer, backend=backend)
    assert tokenizer.encode("a\ud83d\ude42a\ud83da") == [2, 1, 2, 0, 2]
    np.testing.assert_array_equal(lm.pack(["a\ud83d"], tokenizer, 3), [[BOS, 2, 0]])


def test_links_to_directories_are_followed(tmp_path):
    """Also in a circle, and each directory once."""
    real, folder = tmp_path / "real", tmp_path / "folder"
    (real / "sub").mkdir(parents=True)
    folder.mkdir()
    (real / "a.txt").write_text("linked")
    (real / "sub" / "c.txt").write_text("below")
    (folder / "b.txt").write_text("own")
    (folder / "link").symlink_to(real)
    (folder / "link2").symlink_to(real)
    (real / "sub" / "up").symlink_to(folder)
    assert list(lm.read_texts(folder)) == ["own", "linked", "below"]


def test_a_mistake_is_found_before_the_first_document(tmp_path):
    """A file of a directory that is half text is not half used, and not skipped."""
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"line\n" * 100_000 + b"caf\xe9\n")
    with pytest.raises(UserError, match="b.txt, line 100001 is not UTF-8 text .byte 500003.; save"):
        next(lm.read_texts(tmp_path))
    (tmp_path / "b.txt").unlink()
    lines = b'{"text": "x"}\n' * 1000
    (tmp_path / "z.jsonl").write_bytes(lines + b'{"text": "abc\n' + lines)
    with pytest.raises(UserError, match="z.jsonl, line 1001 is not valid JSON"):
        next(lm.read_texts([str(tmp_path)]))


def test_home_is_expanded(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a, b.txt").write_text("one")
    assert list(lm.read_texts("~/a, b.txt")) == ["one"]
    assert lm.load_tokenizer("~").bos == tokenizer.bos


@pytest.mark.parametrize("value", ["x", [0], 10**12, 99, {"id": 0}, 1.5])
def test_a_bos_that_is_none_is_refused(tmp_path, value):
    with pytest.raises(UserError, match="bos_token_id|has no token 99, which is to start every"):
        letters(tmp_path, config={"bos_token_id": value})


@pytest.mark.parametrize(
    "configs",
    [
        {"config": {"eos_token_id": {"id": 2}}},
        {"config": {"eos_token_id": [2, "x"]}},
        {"config": {"text_config": 3}},
        {"tokenizer_config": {"bos_token": 3}},
        {"generation_config": {"pad_token_id": 2**31}},
    ],
)
def test_special_tokens_of_a_wrong_type_are_refused(tmp_path, configs):
    with pytest.raises(UserError, match="config.json is not as it must be"):
        letters(tmp_path, **configs)


def test_ids_below_zero_name_no_token(tmp_path):
    """As pad_token_id of early conversions of Llama."""
    tokenizer = letters(tmp_path, config={"bos_token_id": 0, "pad_token_id": -1})
    assert tokenizer.pad is None and tokenizer.special_tokens == (0,)


PIECES = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
TEMPLATE = {"type": "TemplateProcessing", "single": PIECES, "pair": []}
HUGE = {"<s>": {"id": "<s>", "ids": [2**32 - 1], "tokens": ["<s>"]}}
WRONG_TEMPLATES = {
    "undefined, a panic": (TEMPLATE | {"special_tokens": {}}, "puts <s> into every text"),
    "undefined, inside": (
        {"type": "Sequence", "processors": [TEMPLATE | {"special_tokens": {}}]},
        "puts <s> into every text",
    ),
    "huge": (TEMPLATE | {"special_tokens": HUGE}, "has no token 4294967295"),
    "no template": ({"type": "TemplateProcessing"}, "is not a tokenizer of the tokenizers"),
}


@pytest.mark.parametrize("name", WRONG_TEMPLATES)
def test_templates_that_cannot_be_are_refused(tmp_path, name, tokenizer):
    processor, message = WRONG_TEMPLATES[name]
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(values | {"post_processor": processor}))
    with pytest.raises(UserError, match=message):
        lm.load_tokenizer(tmp_path)


def test_a_panic_of_the_package_is_a_mistake_in_words(tokenizer, monkeypatch):
    """pyo3's PanicException is no Exception; whatever else is none goes through."""

    class PanicException(BaseException):
        pass

    class Backend:
        def encode_batch_fast(self, texts, add_special_tokens):
            raise {"a": PanicException("no entry"), "b": KeyboardInterrupt()}[texts[0]]

    broken = dataclasses.replace(tokenizer, backend=Backend())
    with pytest.raises(UserError, match="is not a tokenizer of the tokenizers package: no entry"):
        broken.encode("a")
    with pytest.raises(KeyboardInterrupt):
        broken.encode("b")


def test_missing_sources(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no text at .*/nowhere.txt; give a file"):
        list(lm.read_texts(tmp_path / "nowhere.txt"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'sae-jax\[lm\]'"):
        list(lm.read_texts("datasets:some/name"))


def test_files_of_a_directory_come_in_the_order_of_their_parts(tmp_path):
    for name in ("b/x", "a.txt", "a/y", "a/b/z"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("text")
    names = [path.relative_to(tmp_path) for path in lm.text_files(tmp_path)]
    assert names == [pathlib.Path(name) for name in ("a/b/z", "a/y", "a.txt", "b/x")]
