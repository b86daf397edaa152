"""Generation: cached texts beside texts recomputed token by token, sampling beside exact
distributions, edits within the step, stopping, and prompts of chats."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.lm import sampling

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "lm"
MODELS = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
QUICK = "gemma3"  # windows of 3, two kinds of rope, one key/value head
SLOW = ("gemma2", "gpt2", "gpt_neox", "qwen2_yarn")  # CI; the others by hand
NEW, WIDTH = 14, 16
PROMPTS = [[1, 7, 22], [3, 9, 9, 30, 2, 17, 11, 38, 5], [14, 0, 8, 31, 25, 6]]
MASK = np.arange(9)[None] % 4 == np.arange(3)[:, None]


def is_odd(position):
    return position % 2 == 1


def mixed(x, read):
    """Depends on a site's past, on the position and on the token."""
    shift = jnp.cos(read["positions"] + read["tokens"])[..., None]
    return x + 0.3 * read["mlp_in.0"] * shift


def edits_of(strength):
    """One program for all strengths; 0 is no edit."""
    direction = strength * np.random.default_rng(1).normal(size=16)
    push = lm.add_direction(direction)
    edits = {
        "resid_pre.0": lm.at(is_odd, push),
        "attn_out.0": lm.at(MASK, push),
        "resid_post.1": push,
    }
    return edits | {"mlp_out.0": lm.reading(["mlp_in.0", "positions", "tokens"], mixed)}


def recomputed(model, edits, count=NEW):
    """The likeliest tokens, from the whole text again for each."""
    texts = np.zeros((len(PROMPTS), 2 * WIDTH), np.int32)
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    for row, prompt in zip(texts, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    if edits:
        mask = np.zeros(texts.shape, bool)
        mask[:, : MASK.shape[1]] = MASK & (np.arange(MASK.shape[1])[None] < lengths[:, None])
        edits = edits | {"attn_out.0": lm.at(mask, edits["attn_out.0"].edit)}
    rows = np.arange(len(texts))
    for step in range(count):
        logits, _ = model.forward(texts, edits=edits)
        texts[rows, lengths + step] = np.asarray(logits)[rows, lengths + step - 1].argmax(-1)
    return [row[n : n + count].tolist() for row, n in zip(texts, lengths, strict=True)]


def tokens_of(model, prompts=PROMPTS, **options):
    options = {"max_new_tokens": NEW, "stop_at_eos": False} | options
    return [text.tokens for text in lm.generate(model, prompts, **options)]


@pytest.fixture(scope="module")
def model():
    return lm.open_model(FIXTURES / QUICK)


@pytest.fixture(scope="module")
def texts(model):
    return tokens_of(model, edits=edits_of(0.5))


def test_cached_text_equals_recomputed_text_with_edits(model, texts):
    assert texts == recomputed(model, edits_of(0.5))
    assert len({tuple(text) for text in texts}) == 3 and len(set(texts[1])) > 3
    assert tokens_of(model, edits=edits_of(2.0)) == recomputed(model, edits_of(2.0)) != texts


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else pytest.mark.long) for n in MODELS],
)
def test_every_family_writes_the_same_cached_and_recomputed(name):
    model = lm.open_model(FIXTURES / name)
    assert tokens_of(model) == recomputed(model, None)
    edits = edits_of(0.5)
    assert tokens_of(model, edits=edits) == recomputed(model, edits)


@pytest.mark.parametrize(
    "name, options",
    [
        pytest.param(QUICK, {"scan": True}, marks=pytest.mark.slow),
        pytest.param(QUICK, {"shape": (2, 2)}, marks=pytest.mark.slow),
        *(
            pytest.param(name, {"shape": shape, "scan": scan}, marks=pytest.mark.long)
            for name in ("gemma2", "gpt2", "gpt_neox", "llama_head_dim")
            for shape in ((2, 2), (1, 4), (4, 1))
            for scan in (False, True)
        ),
    ],
)
def test_a_mesh_and_a_loop_over_layers_change_no_text(name, options):
    shape = options.pop("shape", None)
    mesh = jax.make_mesh(shape, ("data", "model")) if shape else None
    one, other = (lm.open_model(FIXTURES / name, **o) for o in ({}, options | {"mesh": mesh}))
    drawn = {"temperature": 0.8, "top_p": 0.9, "samples": 2, "edits": edits_of(0.5)}
    for settings in ({}, drawn):
        assert tokens_of(one, **settings) == tokens_of(other, **settings)


@pytest.mark.slow
def test_a_text_depends_on_its_prompt_seed_and_sample_alone(model):
    drawn = {"temperature": 1.0, "top_p": 0.95, "samples": 2}
    together = tokens_of(model, seed=3, **drawn)
    assert together == tokens_of(model, seed=3, **drawn)
    assert together == tokens_of(model, seed=3, batch_size=1, **drawn)
    alone = [tokens_of(model, [prompt], seed=3, **drawn) for prompt in PROMPTS]
    assert together == sum(alone, [])
    assert together[0] != together[1]
    assert together != tokens_of(model, seed=4, **drawn)


@pytest.mark.slow
def test_bfloat16_writes_what_it_recomputes():
    model = lm.open_model(FIXTURES / "llama_tied_gqa", dtype="bfloat16")
    assert tokens_of(model) == recomputed(model, None)


@pytest.fixture
def ending(tmp_path, texts):
    """The model with two tokens that end a text, both in the first text without them."""

    def model(*eos):
        shutil.copytree(FIXTURES / QUICK, tmp_path / "model")
        file = tmp_path / "model" / "generation_config.json"
        file.write_text(json.dumps({"eos_token_id": list(eos) if len(eos) > 1 else eos[0]}))
        return lm.open_model(tmp_path / "model")

    return model


def test_a_text_ends_after_eos_and_at_the_end_of_the_context(ending, texts):
    eos = texts[0][3], texts[1][5]
    options = {"edits": edits_of(0.5), "max_new_tokens": NEW}
    streamed = {}
    made = lm.generate(
        ending(*eos), PROMPTS, on_token=lambda i, t: streamed.setdefault(i, []).append(t), **options
    )
    for i, (text, whole) in enumerate(zip(made, texts, strict=True)):
        end = next((n for n, token in enumerate(whole) if token in eos), NEW - 1)
        assert text.tokens == whole[: end + 1] == streamed[i]
        assert text.stopped == ("eos" if whole[end] in eos else "max_new_tokens")
        assert text.prompt == PROMPTS[i] and text.text is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", QUICK])
def test_a_text_stops_at_the_models_longest_context(name):
    model = lm.open_model(FIXTURES / name)
    made = lm.generate(model, PROMPTS, max_new_tokens=60, stop_at_eos=False)
    assert [len(text.tokens) for text in made] == [32 - len(prompt) for prompt in PROMPTS]
    assert {text.stopped for text in made} == {"max_context"}


# ------------------------------------------------------------------------------------- sampling


def drawn(logits, count, **settings):
    rules = sampling.Rules(**{"max_new_tokens": 1, "top_p": 1.0, "seed": 5, "eos": ()} | settings)
    rows = jnp.tile(jnp.float32(logits)[None], (count, 1))
    return np.asarray(rules.next_tokens(rows, np.arange(count), np.int32(2)))


def test_tokens_are_drawn_with_the_models_probabilities():
    """Chi-square on 7 tokens, of which top_p=0.8 keeps the three likeliest."""
    probabilities = np.array([0.05, 0.3, 0.02, 0.35, 0.2, 0.05, 0.03])
    for temperature in (0.7, 1.5):
        logits = temperature * np.log(probabilities)
        counts = np.bincount(drawn(logits, 4000, temperature=temperature), minlength=7)
        assert stats.chisquare(counts, 4000 * probabilities).pvalue > 1e-3
        kept = np.where(probabilities >= 0.2, probabilities, 0) / 0.85
        counts = np.bincount(drawn(logits, 4000, temperature=temperature, top_p=0.8), minlength=7)
        assert counts[kept == 0].sum() == 0
        assert stats.chisquare(counts[kept > 0], 4000 * kept[kept > 0]).pvalue > 1e-3
    assert set(drawn(logits, 4000, temperature=0.0)) == {3}


def test_the_likeliest_are_those_of_a_sort():
    rng = np.random.default_rng(0)
    logits = np.float32(3 * rng.normal(size=(50, 30)))
    logits[:, 10:20] = np.round(logits[:, 10:20])  # some are equal
    probability = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    above = np.where(probability[:, None, :] > probability[:, :, None], probability[:, None], 0)
    likeliest = jax.jit(sampling.likeliest)
    for top_p in (0.01, 0.5, 0.93, 1 - 1e-4):
        kept = np.asarray(likeliest(logits, np.float32(top_p)))
        np.testing.assert_array_equal(kept, above.sum(-1) < top_p)


# ------------------------------------------------------------------------- edits and user errors


def test_an_edit_reads_what_comes_before_it_in_a_forward_pass(model):
    """It is given the replacement where that site is edited too."""

    def run(tokens):
        edits = {
            "mlp_in.0": lambda x: 2 * x,
            "mlp_out.0": lm.reading("mlp_in.0", lambda x, read: 3 * read["mlp_in.0"]),
        }
        return model.forward(tokens, ("mlp_in.0", "mlp_out.0"), edits, logits=False)[1]

    taps = run(np.array(PROMPTS[1:2]))
    np.testing.assert_array_equal(taps["mlp_out.0"], 3 * taps["mlp_in.0"])


@pytest.mark.parametrize(
    "edits, message",
    [
        ({"mlp_in.0": lm.reading("mlp_out.0", mixed)}, "mlp_in.0 reads mlp_out.0, which does not"),
        ({"mlp_in.0": lm.reading("mlp_in.0", mixed)}, "mlp_in.0 reads mlp_in.0, which does not"),
        ({"mlp_in.0": lm.reading("mlp_in.9", mixed)}, "unknown site 'mlp_in.9'"),
        ({"mlp_in.7": lm.add_direction(np.ones(16))}, "unknown site 'mlp_in.7'"),
        ({"z.0": lm.put(np.ones((3, 9, 32)))}, "must treat each row and position by itself"),
        ({"z.0": lm.at(MASK[:, :8], jnp.zeros_like)}, r"has shape \(3, 8\); in generation it is"),
    ],
)
def test_edits_that_cannot_be_right_are_refused(model, edits, message):
    with pytest.raises(UserError, match=message):
        lm.generate(model, PROMPTS, edits=edits)


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[]], {}, "prompt 0 has no tokens"),
        ([[3], [40]], {}, "prompt 1 has token 40; the model has 0 to 39"),
        ([[1] * 32], {}, "prompt 0 has 32 tokens, which leaves no room"),
        ("text", {}, "no tokenizer.json"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_settings_and_prompts_out_of_range_are_refused(model, prompts, options, message):
    with pytest.raises(UserError, match=message):
        lm.generate(model, prompts, **options)


def test_reading_takes_a_function_and_sites():
    with pytest.raises(UserError, match="put lm.at around lm.reading"):
        lm.reading("mlp_in.0", lm.at(is_odd, jnp.zeros_like))
    with pytest.raises(UserError, match="names no site"):
        lm.reading((), mixed)


# ---------------------------------------------------------------------------------------- chats

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant') %}
        {{- raise_exception("no role " + message.role) }}
    {%- endif %}
    {%- if message.content == 'stop' %}{% break %}{% endif %}
    {% generation %}{{- message | tojson }}{% endgeneration %}
{% endfor %}
{{ strftime_now("%Y")[:1] }}{{ eos_token }}{{ missing }}"""
CHAT = [{"role": "user", "content": '<ü> & "1"'}, {"role": "assistant", "content": "Yes"}]


def write_chat(directory, template, file=None, bos=None):
    bos = bos or {"__type": "AddedToken", "content": "<s>"}  # as older files have it
    fields = {"bos_token": bos, "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps(fields | ({} if template is None else {"chat_template": template}))
    )
    if file is not None:
        (directory / "chat_template.jinja").write_text(file)
    return directory


def test_a_chat_is_written_by_the_models_template(tmp_path):
    write_chat(tmp_path, CHATML)
    turns = '<|im_start|>user\n<ü> & "1"<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n'
    assert lm.chat_prompt(tmp_path, CHAT) == turns + "<|im_start|>assistant\n"
    assert lm.chat_prompt(tmp_path, CHAT, add_generation_prompt=False) == turns
    assert lm.chat_prompt(tmp_path, "Hi").startswith("<|im_start|>user\nHi<|im_end|>")
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    write_chat(tmp_path, named)
    assert lm.chat_prompt(str(tmp_path), CHAT, add_generation_prompt=False) == turns
    write_chat(tmp_path, CHATML, file=STRICT)
    written = lm.chat_prompt(tmp_path, [*CHAT, {"role": "user", "content": "stop"}])
    assert written.startswith('<s>{"role": "user", "content": "<ü> & \\"1\\""}')
    assert written.endswith("2</s>") and "stop" not in written


@pytest.mark.parametrize(
    "template, messages, message",
    [
        (None, CHAT, "has no chat template"),
        ([{"name": "tool_use", "template": "x"}], CHAT, "tool_use, and no default"),
        ("{% if %}", CHAT, "tokenizer_config.json fails on these messages: Expected an expression"),
        (STRICT, [{"role": "system", "content": ""}], "fails on these messages: no role system"),
        (CHATML, [{"content": "x"}], "message 0 of the chat has no role"),
        ("{{ messages.__class__.__mro__ }}", CHAT, "unsafe"),
        ("{{ messages[9].content }}", CHAT, "fails on these messages"),
    ],
)
def test_a_template_that_is_missing_or_fails_is_named(tmp_path, template, messages, message):
    with pytest.raises(UserError, match=message):
        lm.chat_prompt(write_chat(tmp_path, template), messages)


# ----------------------------------------------------------------------------- beside transformers


@pytest.mark.peers
@pytest.mark.parametrize("name", [QUICK, "gpt2"])
def test_transformers_models_write_the_same(name):
    """Greedy, drawn, edited: torch:MODEL gives the texts of our decoder."""
    pytest.importorskip("transformers")
    ours, theirs = (lm.open_model(f"{kind}{FIXTURES / name}") for kind in ("", "torch:"))
    drawn = {"temperature": 0.8, "top_p": 0.9, "samples": 2, "edits": edits_of(0.5)}
    for settings in ({}, {"edits": edits_of(0.5)}, drawn):
        assert tokens_of(ours, **settings) == tokens_of(theirs, **settings)
    later = {"mlp_in.0": lm.reading("mlp_out.0", mixed)}
    with pytest.raises(UserError, match="mlp_in.0 reads mlp_out.0, which does not"):
        tokens_of(theirs, edits=later)


@pytest.mark.peers
@pytest.mark.parametrize("template", [CHATML, STRICT])
@pytest.mark.parametrize("start", [True, False])
def test_chats_equal_those_of_transformers(tmp_path, template, start):
    transformers = pytest.importorskip("transformers")
    import tokenizers

    vocab = {"<s>": 0, "</s>": 1, "a": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    write_chat(tmp_path, template, bos="<s>")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=start)
    assert lm.chat_prompt(tmp_path, CHAT, add_generation_prompt=start) == expected
