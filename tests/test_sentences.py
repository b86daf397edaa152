"""Sentence encoders: the vectors of transformers and of the model's authors, whatever the batch."""

import json

import hub_server
import numpy as np
import pytest
import tiny_bert
from hub_server import Repo, files_of

from sae_jax.errors import UserError
from sae_jax.lm.sentences import open_sentence_encoder

TEXTS = [
    "a man is eating food .",
    "a man is eating a piece of bread .",
    "cats",
    "",
    "the cat sat on the mat , on the mat , on the mat , on the mat , on the mat , on the mat .",
    "words that it does not know \ud800",
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return open_sentence_encoder(tiny_bert.write(tmp_path_factory.mktemp("bert") / "model"))


def test_padding_and_the_batch_change_nothing(encoder):
    together = encoder.encode(TEXTS)
    assert together.shape == (6, 24) and together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for size in (1, 4):
        np.testing.assert_allclose(encoder.encode(TEXTS, batch_size=size), together, atol=1e-6)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, together, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 1e-2
    assert encoder.encode([]).shape == (0, 24)


def test_what_the_files_say_of_sentences(tmp_path, encoder):
    cls = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    other = open_sentence_encoder(tiny_bert.write(tmp_path / "cls", pooling=cls, prefix="bert."))
    assert (encoder.pooling, other.pooling) == ("mean", "cls")
    assert np.abs(other.encode(TEXTS) - encoder.encode(TEXTS)).max() > 1e-2
    sentences = {"max_seq_length": 6, "do_lower_case": True}
    bare = tiny_bert.write(tmp_path / "bare", pooling=None, modules=None, sentences=sentences)
    short = open_sentence_encoder(bare)
    assert (encoder.max_length, short.max_length, short.pooling) == (40, 6, "mean")
    np.testing.assert_allclose(
        short.encode(["A MAN is eating food , the cat sat"]),
        encoder.encode(["a man is eating"]),
        atol=1e-6,
    )


QUERY = "encoder.layer.1.attention.self.query.weight"
WRONG = {
    "another architecture": ({"config": {"model_type": "mpnet"}}, "'mpnet'.*all-MiniLM-L6-v2"),
    "no field": ({"config": {"model_type": "bert"}}, "vocab_size"),
    "activation": ({"hidden_act": "gelv"}, "hidden_act.*'gelv'.*gelu"),
    "positions": ({"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi' is not"),
    "code of its own": ({"auto_map": {"AutoModel": "a.B"}}, "auto_map.* is not implemented"),
    "heads": ({"num_attention_heads": 5}, "5 heads do not divide hidden_size 24"),
    "layers": ({"num_hidden_layers": 4}, "no tensor encoder.layer.3.attention.self.query.weight"),
    "many layers": ({"num_hidden_layers": 9_000}, "9,000 layers"),
    "vocabulary": ({"vocab_size": 9}, r"word_embeddings.*\(22, 24\), not \(9, 24\)"),
    "no tensor": ({"tensors": {QUERY: None}}, f"no tensor {QUERY}"),
    "another tensor": ({"tensors": {"dense.weight": np.ones(2)}}, "a tensor dense.weight"),
    "pooling": ({"pooling": {"pooling_mode_max_tokens": True}}, "pooling_mode_max_tokens is not"),
    "two poolings": ({"pooling": {**tiny_bert.MODES, "pooling_mode_cls_token": True}}, " and "),
    "a module": ({"modules": ["Transformer", "Pooling", "Dense"]}, "models.Dense.*not implemented"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_what_is_not_implemented_is_named(tmp_path, change, message):
    parts = {k: v for k, v in change.items() if k in ("config", "pooling", "modules", "tensors")}
    folder = tiny_bert.write(
        tmp_path / "model", **{k: v for k, v in parts.items() if k != "config"}
    )
    config = parts.get("config", {**tiny_bert.CONFIG, **change} if not parts else None)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        open_sentence_encoder(folder)


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    folder = tiny_bert.write(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        open_sentence_encoder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors in"):
        open_sentence_encoder(folder)
    with pytest.raises(UserError, match=r"no config\.json in"):
        open_sentence_encoder(tmp_path)


def test_a_name_on_the_hub(tmp_path, monkeypatch, encoder):
    cls = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    folder = tiny_bert.write(tmp_path / "model", pooling=cls, sentences={"max_seq_length": 9})
    with hub_server.running() as server:
        hub_server.use(server, monkeypatch, tmp_path / "cache")
        server.repos["org/encoder"] = Repo(files_of(folder) | {"pytorch_model.bin": b"large"})
        found = open_sentence_encoder("hf://org/encoder")
        assert (found.pooling, found.max_length) == ("cls", 9)
        assert "pytorch_model.bin" not in server.sent()
        np.testing.assert_array_equal(
            found.encode(TEXTS), open_sentence_encoder(folder).encode(TEXTS)
        )


@pytest.mark.peers
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_act": "gelu_new", "num_attention_heads": 2, "layer_norm_eps": 1e-5},
        {"hidden_act": "relu", "num_hidden_layers": 1, "type_vocab_size": 1},
    ],
)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_equals_transformers(tmp_path, changes, pooling):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    modes = {f"pooling_mode_{m}": m.startswith(pooling) for m in ("cls_token", "mean_tokens")}
    folder = tiny_bert.write(tmp_path / "model", {**tiny_bert.CONFIG, **changes}, modes)
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = tiny_bert.tokenizer()
    tokenizer.enable_truncation(40)
    texts = TEXTS[:-1]
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(texts)
    ids, mask = (torch.tensor([getattr(e, n) for e in encoded]) for n in ("ids", "attention_mask"))
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weight = mask[..., None] / mask.sum(1)[:, None, None]
    pooled = (hidden * weight).sum(1) if pooling == "mean" else hidden[:, 0]
    expected = torch.nn.functional.normalize(pooled).numpy()
    np.testing.assert_allclose(open_sentence_encoder(folder).encode(texts), expected, atol=1e-5)


PUBLISHED = [
    # Cosines of all-MiniLM-L6-v2 in the documentation of sentence-transformers (its front page,
    # and of pairs within a list), and of Hugging Face's inference API.
    ("The weather is lovely today.", "It's so sunny outside!", 0.6660),
    ("The weather is lovely today.", "He drove to the stadium.", 0.1046),
    ("It's so sunny outside!", "He drove to the stadium.", 0.1411),
    ("A man is eating food.", "A man is eating a piece of bread.", 0.7553),
    ("That is a happy person", "That is a happy dog", 0.6946),
    ("That is a happy person", "That is a very happy person", 0.9429),
    ("That is a happy person", "Today is a sunny day", 0.2569),
]


@pytest.mark.slow
@pytest.mark.skipif(
    not tiny_bert.MINILM.is_dir(), reason="no all-MiniLM-L6-v2: MINILM says where it is"
)
def test_published_vectors():
    encoder = open_sentence_encoder(tiny_bert.MINILM)
    assert (encoder.width, encoder.max_length) == (384, 256)
    first, second = (encoder.encode([pair[side] for pair in PUBLISHED]) for side in (0, 1))
    found = (first * second).sum(axis=1)
    np.testing.assert_allclose(found, [pair[2] for pair in PUBLISHED], atol=6e-5)
