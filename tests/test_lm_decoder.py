"""The decoder against transformers' stored results, and against itself."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax import lm
from sae_jax.errors import UserError

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "lm"
STORIES = pathlib.Path(__file__).parents[2] / "shared" / "data" / "models" / "stories260K"
MODELS = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
QUICK = ("gemma3", "gpt2", "llama_tied_gqa")
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model at {STORIES}")

# Attention, then a ReLU MLP of width 4d: the transformer of Towards Monosemanticity.
ONE_LAYER = lm.DecoderConfig(
    vocab_size=40, d_model=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, d_mlp=64,
    max_context=32, activation="relu", gated_mlp=False,
)  # fmt: skip


forward = jax.jit(lm.forward, static_argnames=("config", "taps", "logits"))  # without edits


def all_sites(config):
    names = [name for name in lm.SITES if not (config.parallel and name == "resid_mid")]
    return tuple(f"{name}.{layer}" for layer in range(config.num_layers) for name in names)


def relative_error(ours, theirs):
    return np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max()


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: np.float32(0.2 * rng.normal(size=leaf.shape)), lm.layout(config)
    )


def on_mesh(params, tokens, config, mesh):
    def put(leaf, x):
        return jax.device_put(x, NamedSharding(mesh, leaf.spec(mesh.shape["model"])))

    params = jax.tree.map(put, lm.layout(config), params)
    return params, jax.device_put(tokens, NamedSharding(mesh, P("data", None)))


def model_and_tokens(name):
    directory = FIXTURES / name
    expected = np.load(directory / "expected.npz")
    return lm.load_config(directory), lm.load_params(directory), expected


LIKE_ANOTHER = ("gpt2_scaled", "gpt_neox_serial", "llama_biases", "mistral", "qwen2")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in LIKE_ANOTHER else ()) for n in MODELS],
)
def test_every_switch_agrees_with_transformers_at_every_site(name):
    config, params, expected = model_and_tokens(name)
    sites = all_sites(config)
    logits, taps = forward(params, expected["tokens"], config, sites)
    assert relative_error(logits, expected["logits"]) < 1e-5
    for site in sites:
        assert taps[site].shape[-1] == lm.site_width(config, site)
        assert relative_error(taps[site], expected[site]) < 1e-5, site


@needs_stories
def test_stories260K_agrees_with_transformers():
    expected = np.load(FIXTURES / "stories260K.npz")
    config, params = lm.load_config(STORIES), lm.load_params(STORIES)
    sites = tuple(name for name in expected.files if "." in name)
    logits, taps = forward(params, expected["tokens"], config, sites)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=0)
    for site in sites:
        np.testing.assert_allclose(taps[site], expected[site], atol=1e-4, rtol=0)


@needs_stories
def test_stories260K_tells_a_story():
    config, params = lm.load_config(STORIES), lm.load_params(STORIES)
    tokenizer = lm.load_tokenizer(STORIES)
    ids = [tokenizer.bos, *tokenizer.encode("Once upon a time")]
    run = jax.jit(lambda tokens: lm.forward(params, tokens, config)[0].argmax(-1))
    for _ in range(48):
        padded = np.pad(np.array([ids]), ((0, 0), (0, 64 - len(ids))))
        ids.append(int(run(padded)[0, len(ids) - 1]))
    text = tokenizer.decode(ids[1:])
    assert "there was a little girl named Lily. She loved to play outside" in text


def test_one_layer_mlp_is_relu_of_what_it_reads():
    params = random_params(ONE_LAYER)
    tokens = np.arange(24).reshape(2, 12)
    _, taps = forward(params, tokens, ONE_LAYER, all_sites(ONE_LAYER))
    layer, taps = params["layers"][0], jax.device_get(taps)
    act = np.maximum(taps["mlp_in.0"] @ layer["w_up"], 0)
    np.testing.assert_allclose(taps["mlp_act.0"], act, atol=1e-5)
    assert act.shape == (2, 12, 64) and 0.1 < (act > 0).mean() < 0.9
    np.testing.assert_allclose(taps["mlp_out.0"], act @ layer["w_down"], atol=1e-5)
    resid_mid = taps["resid_pre.0"] + taps["attn_out.0"]
    np.testing.assert_allclose(taps["resid_mid.0"], resid_mid, atol=1e-6)
    np.testing.assert_allclose(taps["resid_post.0"], resid_mid + taps["mlp_out.0"], atol=1e-6)


def test_later_tokens_do_not_reach_earlier_ones():
    config, params, expected = model_and_tokens("llama_tied_gqa")
    changed = expected["tokens"].copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % config.vocab_size
    before, _ = forward(params, expected["tokens"], config)
    after, _ = forward(params, changed, config)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5:] - after[:, 5:]).max() > 0.1


@pytest.mark.parametrize("site", [f"{name}.1" for name in lm.SITES])
@pytest.mark.slow
def test_edits(site):
    """Putting back what was there changes nothing; zero in its place changes the logits, and is
    what a tap there then shows."""
    config, params, expected = model_and_tokens(MODELS[0])
    tokens = expected["tokens"]

    @jax.jit
    def run(params, tokens, put_back):
        clean, _ = lm.forward(params, tokens, config)
        same, _ = lm.forward(params, tokens, config, edits={site: lambda x: put_back})
        return clean, same, *lm.forward(params, tokens, config, (site,), {site: jnp.zeros_like})

    clean, same, zero, zero_taps = run(params, tokens, expected[site])
    np.testing.assert_allclose(clean, same, atol=1e-4)
    assert np.abs(clean - zero).max() > 0.01
    assert not np.any(zero_taps[site])


def test_an_edit_of_another_shape_and_an_unknown_site_are_refused():
    config, params, expected = model_and_tokens(MODELS[0])
    with pytest.raises(UserError, match="resid_post.0 turned shape"):
        edits = {"resid_post.0": lambda x: x[:1]}
        lm.forward(params, expected["tokens"], config, edits=edits)
    for site in ("resid_post.3", "resid_post", "resid.0", "mlp_act.-1"):
        with pytest.raises(UserError, match="unknown site"):
            lm.forward(params, expected["tokens"], config, (site,))


def test_without_logits_later_layers_cost_nothing():
    config, params, expected = model_and_tokens(MODELS[0])

    def flops(site):
        run = jax.jit(lambda p, t: lm.forward(p, t, config, (site,), logits=False)[1])
        return run.lower(params, expected["tokens"]).compile().cost_analysis()["flops"]

    assert flops("resid_post.0") < 0.6 * flops("resid_post.1")
    _, taps = forward(params, expected["tokens"], config, ("mlp_in.0",), logits=False)
    assert relative_error(taps["mlp_in.0"], expected["mlp_in.0"]) < 1e-5


def test_bfloat16_is_close():
    _, _, expected = model_and_tokens(MODELS[0])
    config = lm.load_config(FIXTURES / MODELS[0])
    params = lm.load_params(FIXTURES / MODELS[0], jnp.bfloat16)
    logits, taps = forward(params, expected["tokens"], config, ("resid_post.1",))
    assert logits.dtype == jnp.float32 and taps["resid_post.1"].dtype == jnp.bfloat16
    error = np.asarray(logits) - expected["logits"]
    assert np.sqrt((error**2).mean() / (expected["logits"] ** 2).mean()) < 0.05


def sharded_by_hand(name):
    """In CI those whose shapes or kernels no quick one has."""
    few = ("gemma2", "gpt_neox", "llama_head_dim", "mistral_window")
    return pytest.mark.slow if name in few else pytest.mark.long


@pytest.mark.parametrize(
    "name, shape",
    [
        *(
            pytest.param(name, (2, 2), marks=() if name in QUICK else sharded_by_hand(name))
            for name in MODELS
        ),
        ("llama_biases", (1, 4)),
        ("one_layer", (4, 1)),
    ],
)
def test_sharded_equals_unsharded(name, shape):
    """Where `model` does not divide the key/value heads (llama_head_dim, gemma3: one) or the
    vocabulary (gpt2: 41) another axis is sharded."""
    if name == "one_layer":
        config, params = ONE_LAYER, random_params(ONE_LAYER)
        tokens = np.arange(36).reshape(4, 9)
    else:
        config, params, expected = model_and_tokens(name)
        tokens = np.concatenate([expected["tokens"], expected["tokens"][:, ::-1]])
    sites = all_sites(config)

    @jax.jit
    def run(params, tokens):
        edits = {name: lambda x: 1.1 * x for name in ("mlp_in.0", "mlp_act.0", "z.0")}
        logits, taps = lm.forward(params, tokens, config, sites, edits)
        return logits, taps, lm.next_token_loss(logits, tokens)

    whole = run(params, tokens)
    ours = run(*on_mesh(params, tokens, config, jax.make_mesh(shape, ("data", "model"))))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
        assert relative_error(a, np.asarray(b)) < 1e-5
    shard = ours[1]["mlp_act.0"].addressable_shards[0].data.shape
    assert shard == (4 // shape[0], 9, config.d_mlp // shape[1])


@pytest.mark.parametrize(
    "name",
    ["gemma3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma2", "gpt2", "mistral"))],
)
@pytest.mark.slow
def test_looping_over_layers_changes_nothing(name):
    """With taps and edits at some layers only, on one device and on four."""
    config, params, expected = model_and_tokens(name)
    tokens = np.concatenate([expected["tokens"], expected["tokens"][:, ::-1]])
    last = config.num_layers - 1
    stacked = lm.load_params(FIXTURES / name, scan=True)
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    sharded = lm.load_params(FIXTURES / name, mesh=mesh, scan=True)
    for leaf in jax.tree.leaves(sharded["layers"]):
        assert leaf.shape[0] == config.num_layers
    for site in (None, f"mlp_in.{last}"):
        taps, edits = ((site,), {site: lambda x: 0.9 * x}) if site else ((), None)
        run = jax.jit(lambda p, t, taps=taps, edits=edits: lm.forward(p, t, config, taps, edits))
        whole = run(params, tokens)
        here = run(stacked, tokens)
        there = run(sharded, jax.device_put(tokens, NamedSharding(mesh, P("data", None))))
        for ours in (here, there):
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
                assert relative_error(a, np.asarray(b)) < 1e-5


def test_a_loop_over_layers_is_compiled_once():
    config = dataclasses.replace(ONE_LAYER, num_layers=12)
    layers = [random_params(ONE_LAYER)["layers"][0]] * 12
    params = random_params(ONE_LAYER) | {"layers": layers}
    stacked = params | {"layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}
    tokens = np.zeros((1, 8), int)
    sizes = [
        len(jax.jit(lambda p: lm.forward(p, tokens, config)[0]).lower(p).as_text())
        for p in (params, stacked)
    ]
    assert sizes[1] < sizes[0] / 4


def test_a_context_longer_than_the_models_is_refused():
    with pytest.raises(UserError, match="33 tokens is longer than the model's 32"):
        lm.forward(random_params(ONE_LAYER), np.zeros((1, 33), int), ONE_LAYER)


def test_next_token_loss_is_the_cross_entropy():
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(2, 5, 7)), rng.integers(0, 7, (2, 5))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = [[-np.log(probabilities[b, t, tokens[b, t + 1]]) for t in range(4)] for b in range(2)]
    np.testing.assert_allclose(lm.next_token_loss(logits, tokens), wanted, rtol=1e-5)
