"""Output tokens and ablations: equal to what the model does, in closed form where there is one."""

import pathlib

import hand_built
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import world

from sae_jax import interpret, lm
from sae_jax.errors import UserError
from sae_jax.interpret import ablation, effects
from sae_jax.interpret import placed as placed_module
from sae_jax.interpret.ablation import ablation_effects_of
from sae_jax.interpret.placed import Placed
from sae_jax.sae import ReLU, ReLUConfig, resolve

MODELS = pathlib.Path(__file__).parent / "fixtures" / "lm"
TOKENS = np.array([[1, 7, 3, 12, 5, 9]])


def relu_sae(w_dec, w_enc=None, kind="autoencoder", d_in=None, **parameters):
    """A ReLU SAE of given rows (d_sae, d_out), which by default reads what it writes."""
    d_sae, d_out = w_dec.shape
    w_enc = w_dec.T if w_enc is None else w_enc
    target = d_out if kind == "transcoder" else None
    config = resolve(ReLUConfig(kind=kind, d_sae=d_sae), (len(w_enc),), target)
    arrays = {"w_enc": w_enc, "w_dec": w_dec, "b_enc": np.zeros(d_sae), "b_dec": np.zeros(d_out)}
    arrays = {name: jnp.asarray(a, jnp.float32) for name, a in (arrays | parameters).items()}
    return ReLU.from_parameters(config, arrays)


def direct_path(model, site, row):
    """What a step along `row` at the last layer's `site` adds to the last position's logits (V,),
    times the last norm's scale, with that scale frozen.

    It is the derivative of the model's own logits, with the MLP held where it is, less what comes
    from the change of the norm's scale.
    """
    last = model.config.num_layers - 1
    held, norm = f"mlp_out.{last}", f"resid_post.{last}"
    _, taps = model.forward(TOKENS, taps=(held,))
    edits = {} if site.startswith("mlp") else {held: lm.put(taps[held])}

    def run(step):
        edit = lm.add_direction(step * jnp.asarray(row, jnp.float32))
        logits, seen = model.forward(TOKENS, taps=(norm,), edits=edits | {site: edit})
        if model.config.logit_softcap:
            cap = model.config.logit_softcap
            logits = cap * jnp.arctanh(logits / cap)
        return logits[0, -1], seen[norm][0, -1]

    (logits, x), (change, dx) = jax.jvp(run, (0.0,), (1.0,))
    if model.config.norm == "layer":
        x, dx = x - x.mean(), dx - dx.mean()
    square = (x @ x) / len(x) + model.config.norm_eps
    offset = 0.0
    if "b_final_norm" in model.params:
        unembed = model.params["embed"].T if model.config.tie_embeddings else None
        unembed = model.params["unembed"] if unembed is None else unembed
        offset = model.params["b_final_norm"] @ unembed
    return np.asarray((change + (logits - offset) * (x @ dx) / len(x) / square) * square**0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, site",
    [
        ("llama_tied_gqa", "mlp_act"),
        ("gemma2", "z"),
        ("gpt_neox", "mlp_out"),
    ],
)
def test_output_tokens_are_finite_differences_of_the_logits_with_the_norm_frozen(name, site):
    """Tied and untied, RMSNorm and LayerNorm, with Gemma's norms after attention and the MLP."""
    model = lm.JaxModel(MODELS / name)
    site = f"{site}.{model.config.num_layers - 1}"
    width = model.site_width(site)
    w_dec = np.random.default_rng(0).normal(size=(3, width)).astype(np.float32)
    used = np.arange(model.vocab_size) % 5 != 0
    found = interpret.output_tokens(relu_sae(w_dec), model, site, np.array([2, 0]), 4, used)
    for place, latent in enumerate([2, 0]):
        row = w_dec[latent] / np.linalg.norm(w_dec[latent])
        if model.config.post_norms and site.startswith(("mlp_act", "z")):
            row = through_post_norm(model, site, row)
            at = "mlp_out" if site.startswith("mlp") else "attn_out"
            values = direct_path(model, f"{at}.{model.config.num_layers - 1}", row)
        else:
            values = direct_path(model, site, row)
        values = values - np.median(values[used])
        order = np.argsort(np.where(used, -values, np.inf))
        np.testing.assert_array_equal(found.promoted[place], order[:4])
        close = {"rtol": 2e-3, "atol": 2e-3 * np.abs(values).max()}
        np.testing.assert_allclose(found.promoted_values[place], values[order[:4]], **close)
        least = order[used.sum() - 4 : used.sum()][::-1]
        np.testing.assert_array_equal(found.suppressed[place], least)
        np.testing.assert_allclose(found.suppressed_values[place], values[least], **close)


def through_post_norm(model, site, row):
    """A row of what the last matrix reads, in what the norm after it gives, its scale left out."""
    p = model.params["layers"][model.config.num_layers - 1]
    matrix, norm = ("w_down", "mlp_post_norm") if site[0] == "m" else ("w_o", "attn_post_norm")
    return row @ np.asarray(p[matrix]).reshape(len(row), -1) * (1 + np.asarray(p[norm]))


def test_values_histogram_and_median_whole_and_in_blocks(monkeypatch):
    """Of an even and an odd number of tokens."""
    model = lm.JaxModel(MODELS / "llama_tied_gqa")
    w_dec = np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32)
    sae, latents = relu_sae(w_dec), np.arange(9)
    for used in (np.ones(model.vocab_size, bool), np.arange(model.vocab_size) > 0):
        found = interpret.output_tokens(sae, model, "resid_post.0", latents, 3, used)
        rows = w_dec / np.linalg.norm(w_dec, axis=1, keepdims=True)
        p = model.params
        values = (rows * np.asarray(p["final_norm"])) @ np.asarray(p["embed"]).T[:, used]
        values -= np.median(values, axis=1, keepdims=True)
        order = np.argsort(-values, axis=1)
        np.testing.assert_array_equal(found.promoted, np.flatnonzero(used)[order[:, :3]])
        np.testing.assert_array_equal(found.suppressed, np.flatnonzero(used)[order[:, :-4:-1]])
        ranked = np.take_along_axis(values, order, axis=1)
        np.testing.assert_allclose(found.promoted_values, ranked[:, :3], rtol=1e-3)
        np.testing.assert_allclose(found.suppressed_values, ranked[:, :-4:-1], rtol=1e-3)
        np.testing.assert_allclose(found.high, ranked[:, 0], rtol=1e-3)
        np.testing.assert_allclose(found.low, ranked[:, -1], rtol=1e-3)
        for row, counts, low, high in zip(
            values, found.histogram, found.low, found.high, strict=True
        ):
            expected = np.histogram(row, effects.BINS, (low, high))[0]
            assert counts.sum() == used.sum() and np.abs(counts - expected).sum() <= 4
        monkeypatch.setattr(effects, "_LOGITS", 2 * model.vocab_size)  # of the second


def test_tokens_that_text_never_has_are_left_out():
    vocab = {"<s>": 0, "a": 1, "<unused3>": 2, "<0x61>": 3, "<0xC3>": 4, "<0x1D>": 5, "b": 6}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<s>"))
    backend.add_special_tokens(["<end>"])
    tokenizer = lm.Tokenizer(backend, 0, None, None, "small", (0,), "")
    assert np.flatnonzero(interpret.used_tokens(tokenizer, 10)).tolist() == [1, 6]
    counts = np.array([9, 0, 9, 0, 2, 0, 5, 9, 9, 9])
    assert np.flatnonzero(interpret.used_tokens(tokenizer, 10, counts)).tolist() == [4, 6]
    with pytest.raises(UserError, match="counts of .* not of a vocabulary of 10"):
        interpret.used_tokens(tokenizer, 10, counts[:3])


def test_where_there_are_no_output_tokens():
    model = lm.JaxModel(MODELS / "llama_tied_gqa")
    sae = relu_sae(np.ones((2, 16)))
    assert interpret.output_tokens(sae, model, "mlp_in.0", np.arange(2)) is None
    with pytest.raises(UserError, match="width 16, but mlp_act.0 has"):
        interpret.output_tokens(sae, model, "mlp_act.0", np.arange(2))
    with pytest.raises(UserError, match="no token counts"):
        none = np.zeros(model.vocab_size, bool)
        interpret.output_tokens(sae, model, "resid_post.0", np.arange(2), used=none)


def test_an_ablation_changes_the_log_probability_of_the_token_that_the_latent_makes(tmp_path):
    """A bigram model: the log-ratio in closed form at what follows A, 0 elsewhere."""
    b, v = 5.0, hand_built.V
    model = hand_built.make_model(tmp_path / "model", 1, hand_built.bigram(b))
    sae = relu_sae(np.eye(hand_built.D)[1:])  # a latent for each part but the constant
    of_a = hand_built.CURRENT + hand_built.WORDS.index("A") - 1
    texts = ("x A B y A", "A B A z A", "y x x z B", "A B A z A", "A B A z A")
    latents, contexts = [of_a] * 4 + [of_a + 1], np.stack([hand_built.ids(t) for t in texts])
    where = np.ones(contexts.shape, bool)
    where[3, 2:] = False
    helped = b - np.log(np.exp(b) + v - 1) + np.log(v)
    hurt = -np.log((np.exp(b) + v - 1) / v)
    expected = np.zeros((5, 6))
    expected[[0, 1, 3], [3, 2, 2]] = helped
    expected[1, 4] = hurt
    found = ablation_effects_of(model, Placed(sae, "resid_post.0"), latents, contexts, where)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert (found[expected == 0] == 0).all()


@pytest.mark.slow
def test_ablations_of_a_transcoder_and_in_batches(tmp_path, monkeypatch):
    """They equal the model's own run with the latent's part taken out of the site it writes."""
    world.make_model(tmp_path / "model", num_layers=2)
    model = lm.JaxModel(tmp_path / "model")
    rng = np.random.default_rng(0)
    sae = relu_sae(rng.normal(size=(24, 16)), rng.normal(size=(16, 24)), "transcoder")
    contexts = rng.integers(1, model.vocab_size, (5, 9))
    latents = rng.integers(0, 24, 5)
    placed = Placed(sae, "mlp_in.1", "mlp_out.1")
    whole = ablation_effects_of(model, placed, latents, contexts)
    clean, taps = model.forward(contexts, taps=("mlp_in.1", "mlp_out.1"))
    f = np.asarray(sae.encode(taps["mlp_in.1"]))[np.arange(5), :, latents]
    new = taps["mlp_out.1"] - f[:, :, None] * np.asarray(sae.w_dec[...])[latents][:, None]
    without, _ = model.forward(contexts, edits={"mlp_out.1": lm.put(new)})
    log_p = [jax.nn.log_softmax(x)[np.arange(5)[:, None], np.arange(8), contexts[:, 1:]]
             for x in (clean, without)]  # fmt: skip
    np.testing.assert_allclose(whole[:, 1:], log_p[0] - log_p[1], atol=1e-4)
    assert np.abs(whole).max() > 0.1 and not whole[:, 0].any()
    monkeypatch.setattr(ablation, "sequences_at_once", lambda *_: 2)
    monkeypatch.setattr(placed_module, "_LATENTS", 24 * 7)
    batched = ablation_effects_of(model, placed, latents, contexts)
    np.testing.assert_allclose(batched, whole, atol=1e-5)
    one = interpret.ablation_effects(
        model, sae, "mlp_in.1", latents[3], contexts[3], target_site="mlp_out.1"
    )
    np.testing.assert_allclose(one, whole[3], atol=1e-5)


@pytest.mark.parametrize(
    "kind, site, target, latent, ids, message",
    [
        ("autoencoder", "mlp_act.0", None, 0, [1], "width 16, but mlp_act.0 of this model has"),
        ("autoencoder", "mlp_out.0", None, 2, [1], "there is no latent 2"),
        ("transcoder", "mlp_in.0", None, 0, [1], "a transcoder needs a target site"),
        ("autoencoder", "mlp_out.0", "mlp_out.0", 0, [1], "an autoencoder has no target site"),
        ("autoencoder", "mlp_out.0", None, 0, [9999], "token 9999 is not of the model's"),
        ("autoencoder", "mlp_out.0", None, 0, [0.5], "token ids are whole numbers"),
    ],
)
def test_ablations_that_make_no_sense_are_refused(kind, site, target, latent, ids, message):
    model = lm.JaxModel(MODELS / "llama_tied_gqa")
    sae = relu_sae(np.ones((2, 16)), kind=kind)
    with pytest.raises(UserError, match=message):
        interpret.ablation_effects(model, sae, site, latent, ids, target_site=target)
