"""The page: whole characters, nothing from outside, nothing of the texts taken as HTML."""

import html
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import world

from sae_jax import interpret, lm
from sae_jax.evaluate.metrics import activation_scale
from sae_jax.evaluate.report import evaluate
from sae_jax.evaluate.sources import HeldOutRows
from sae_jax.interpret.text import pieces, token_text
from sae_jax.sae import ReLU, ReLUConfig, TopK, TopKConfig, resolve

SITE = "mlp_act.0"


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("page") / "model"
    world.make_model(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(model_directory):
    return lm.load_tokenizer(model_directory)


@pytest.fixture(scope="module")
def store(tmp_path_factory, model_directory):
    path = tmp_path_factory.mktemp("page_store") / "store"
    sites = (SITE, "mlp_in.0", "mlp_out.0")
    return lm.harvest(model_directory, world.TEXTS * 40, path, sites=sites, context_length=32)


@pytest.fixture(scope="module")
def page(tmp_path_factory, model_directory, tokenizer, store):
    rng = np.random.default_rng(0)
    width, d_sae = 64, 96
    w_dec = rng.normal(size=(d_sae, width))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    parameters = {
        "w_enc": w_dec.T, "w_dec": w_dec, "b_enc": np.zeros(d_sae), "b_dec": np.zeros(width)
    }  # fmt: skip
    config = resolve(TopKConfig(d_sae=d_sae, k=8), width)
    sae = TopK.from_parameters(
        config, {name: jnp.asarray(v, jnp.float32) for name, v in parameters.items()}
    )
    model = lm.open_model(model_directory)
    source = HeldOutRows(store, SITE, tokens=2000, holdout_fraction=0.2)
    evaluation = evaluate(sae, source, model, spliced_tokens=500)
    out = tmp_path_factory.mktemp("page") / "index.html"
    interpret.write_page(out, sae, evaluation, store, tokenizer, model)
    return out.read_text(encoding="utf-8")


def cards(page):
    return re.findall(r"<article.*?</article>", page, flags=re.DOTALL)


@pytest.mark.slow
def test_thirty_latents_across_the_densities_each_with_text_and_its_token_marked(page):
    found = cards(page)
    assert len(found) == 30
    densities = [float(re.search(r'data-density="([^"]+)"', card)[1]) for card in found]
    assert densities == sorted(densities) and densities[0] < densities[-1]
    for card in found:
        examples = re.findall(r'<p class="example" dir="auto">.*?</p>', card, flags=re.DOTALL)
        assert examples and all(example.count("<mark ") == 1 for example in examples)
        assert "speaks for" in card


def test_opens_with_metrics_and_figures(page):
    head = page[: page.index("<article")]
    assert "of the variance explained" in head and "against zero ablation" in head
    assert head.count("<svg") == 2


def test_needs_nothing_from_outside(page):
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)  # names of XML, never fetched
    assert not re.findall(r"https?://|(?:src|href)=.(?!data:|#)|@import|url\((?!#)", without_names)


def test_texts_are_escaped_and_their_characters_whole(page):
    examples = "".join(re.findall(r'<p class="example".*?</p>', page, flags=re.DOTALL))
    assert set(re.findall(r"</?(\w+)", examples)) == {"p", "span", "mark"}
    shown = html.unescape(re.sub(r"</?(?:p|span|mark)[^>]*>", "", examples))
    assert "\N{REPLACEMENT CHARACTER}" not in shown
    for part in ("<b>", "& the", "שלום", "日本語", "🙂", "Straße", "↵⇥"):
        assert part in shown, part


@pytest.mark.parametrize(
    "kind, widths, head, speaks",
    [
        ("transcoder", (16, 16), "from <b>mlp_in.0</b> to <b>mlp_out.0</b>", True),
        ("crosscoder", ((16, 16),), "on <b>mlp_in.0, mlp_out.0</b>", False),
    ],
)
@pytest.mark.slow
def test_other_kinds_have_examples_of_what_they_read(
    model_directory, tokenizer, store, tmp_path, kind, widths, head, speaks
):
    """The text of the keep_top_k example is that of the row with the highest activation."""
    config = resolve(ReLUConfig(kind=kind, d_sae=6), *widths)
    parameters = ReLU.init_parameters(jax.random.key(0), config, jnp.zeros(config.d_out))
    sae = ReLU.from_parameters(config, parameters)
    rows = HeldOutRows(store, "mlp_in.0,mlp_out.0", tokens=2000, holdout_fraction=0.2)
    out = tmp_path / "index.html"
    interpret.write_page(
        out, sae, evaluate(sae, rows), store, tokenizer, lm.open_model(model_directory)
    )
    shown = out.read_text(encoding="utf-8")
    assert head in re.sub(r"\s+", " ", shown)
    assert ("speaks for" in shown) == speaks == ("No output tokens" not in shown)
    x = np.concatenate([store.read(s, slice(0, None)) for s in rows.site_names], axis=1)
    x, _ = sae.split(x.astype(np.float32))
    latents = np.array(sae.encode(x) * activation_scale(sae))
    latents[store.excluded.read().result() != 0] = 0.0
    for card in cards(shown):
        latent = int(re.search(r'data-index="(\d+)"', card)[1])
        first = re.search(r'<p class="example" dir="auto">.*?</p>', card, flags=re.DOTALL)[0]
        peak = float(re.search(r'<mark [^>]*title="([^"]+)"', first)[1])
        assert peak == pytest.approx(latents[:, latent].max(), rel=0.01)
    assert len(cards(shown)) == 6


@pytest.mark.parametrize("text", world.TEXTS)
def test_pieces_give_back_the_text_and_cover_the_tokens(tokenizer, text):
    ids = np.array(tokenizer.encode(text))
    found = pieces(tokenizer, ids)
    assert "".join(p.text for p in found) == text.replace("\n", "↵").replace("\t", "⇥")
    assert [p.start for p in found] == [0] + [p.stop for p in found[:-1]]
    assert found[-1].stop == len(ids)


def test_a_character_that_a_window_cuts_is_shown_whole(tokenizer):
    ids = np.array(tokenizer.encode("a🙂b"))
    inside = next(p for p in pieces(tokenizer, ids) if p.text == "🙂")
    assert inside.stop - inside.start > 1, "the test needs a character of several tokens"
    cut = inside.start + 1
    assert [p.text for p in pieces(tokenizer, ids, cut, len(ids))] == ["🙂", "b"]
    assert [p.text for p in pieces(tokenizer, ids, 0, cut)] == ["a", "🙂"]


def test_bytes_of_no_character_do_not_spoil_those_that_follow(tokenizer):
    ids = np.array(tokenizer.encode("🙂ab日本語"))[1:]
    assert "".join(p.text for p in pieces(tokenizer, ids)).endswith("ab日本語")


def test_a_context_that_begins_or_ends_inside_a_character(tokenizer):
    """The tokens of its bytes go by their names, and are no part of the text beside them."""
    (first, second, third) = world_tokens = tokenizer.encode("世")
    names = [tokenizer.backend.id_to_token(i) for i in world_tokens]
    for stray in ([third], [second, third], [first, second], [first], [third, first]):
        ids = np.array([tokenizer.bos, *stray, *tokenizer.encode("xyz"), *world_tokens, first])
        found = pieces(tokenizer, ids)
        of_stray = [names[world_tokens.index(i)] for i in stray]
        assert [p.text for p in found] == ["<|bos|>", *of_stray, *"xyz", "世", names[0]], stray
        assert [p.stop - p.start for p in found] == [1] * (len(stray) + 4) + [3, 1]


def test_the_replacement_character_itself_is_shown(tokenizer):
    text = "a\ufffdb\ufffd\ufffdc"
    found = pieces(tokenizer, np.array(tokenizer.encode(text)))
    assert [p.text for p in found] == list(text)


def test_every_byte_of_text_is_found_again(tokenizer):
    """Of a tokenizer that writes bytes as characters, and a character at each of UTF-8's ends."""
    text = "".join(map(chr, (*range(0x21, 0x7F), *range(0xA1, 0x800), 0x800, 0xD7FF, 0xE000,
                             0xFFFF, 0x10000, 0x10FFFF)))  # fmt: skip
    found = pieces(tokenizer, np.array(tokenizer.encode(text)))
    assert "".join(p.text for p in found) == text


def test_a_tokenizer_that_falls_back_to_bytes():
    """Llama's: one token a byte, and a run of bytes is broken as a whole or not at all."""
    vocab = {"<s>": 0, "▁a": 1} | {f"<0x{i:02X}>": i + 2 for i in range(256)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<s>"))
    decoders = tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    fallback = lm.Tokenizer(backend, 0, None, None, "fallback", (0,), "")
    ids = np.array([0, 1, *(byte + 2 for byte in "世界人🙂".encode()), 1])
    assert [p.text for p in pieces(fallback, ids)] == ["<s>", " a", *"世界人🙂", " a"]
    assert "".join(p.text for p in pieces(fallback, ids[3:])).endswith("界人🙂 a")


def test_a_token_that_is_part_of_a_character_goes_by_its_name(tokenizer):
    (first, *_) = tokenizer.encode("🙂")
    assert token_text(tokenizer, first) == tokenizer.backend.id_to_token(first)
    (word,) = tokenizer.encode(" the")[:1]
    assert token_text(tokenizer, word).startswith(" ")


def test_output_tokens_are_those_of_the_decoder_row_through_the_model(model_directory):
    """The direct path: for the one-layer model, the change of the logits when the row is added to
    what the last norm reads, up to the norm's scale and a constant."""
    model = lm.open_model(model_directory)
    rng = np.random.default_rng(0)
    w_dec = rng.normal(size=(10, 64)).astype(np.float32)
    parameters = {
        "w_enc": w_dec.T, "w_dec": w_dec, "b_enc": np.zeros(10), "b_dec": np.zeros(64)
    }  # fmt: skip
    config = resolve(TopKConfig(d_sae=10, k=2), 64)
    sae = TopK.from_parameters(
        config, {name: jnp.asarray(v, jnp.float32) for name, v in parameters.items()}
    )
    every = np.ones(model.vocab_size, bool)
    found = interpret.output_tokens(sae, model, SITE, np.array([4]), count=5, used=every)
    p = {name: np.asarray(model.params[name], np.float64) for name in ("final_norm", "unembed")}
    w_down = np.asarray(model.params["layers"][0]["w_down"], np.float64)
    logits = (w_dec[4] @ w_down * p["final_norm"]) @ p["unembed"]
    assert found.promoted[0].tolist() == np.argsort(-logits)[:5].tolist()
    assert found.suppressed[0].tolist() == np.argsort(logits)[:5].tolist()
    assert interpret.output_tokens(sae, model, "mlp_in.0", np.array([4])) is None
