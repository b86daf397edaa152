"""An SAE inside its language model: cases with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import world

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.evaluate import batching
from sae_jax.evaluate.report import evaluate
from sae_jax.evaluate.sources import ModelRows
from sae_jax.evaluate.spliced import measure_spliced
from sae_jax.sae import ReLU, ReLUConfig, resolve

SITE, D, T = "resid_post.0", 16, 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("spliced") / "model"
    world.make_model(directory, num_layers=2)
    return lm.open_model(directory)


@pytest.fixture(scope="module")
def tokens(model):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, model.config.vocab_size, (5, T)).astype(np.int32)
    tokens[:, 0] = 0
    return tokens


def make_sae(gain=1.0, b_dec=0.0):
    """x_hat = gain * x + b_dec."""
    eye = jnp.eye(D)
    parameters = {
        "w_enc": jnp.concatenate([eye, -eye], axis=1),
        "w_dec": gain * jnp.concatenate([eye, -eye]),
        "b_enc": jnp.zeros(2 * D),
        "b_dec": jnp.full(D, b_dec) if np.isscalar(b_dec) else jnp.asarray(b_dec, jnp.float32),
    }
    return ReLU.from_parameters(resolve(ReLUConfig(d_sae=2 * D), D), parameters)


def measure(sae, model, tokens, where, mean=None):
    """At the only site, with zero for the mean."""
    mean = np.zeros(D) if mean is None else mean
    (found,) = measure_spliced([sae], model, (SITE,), tokens, where, mean)
    return found[SITE]


def test_a_perfect_sae_recovers_everything(model, tokens):
    where = np.ones(tokens.shape, bool)
    found = measure(make_sae(), model, tokens, where)
    assert found["ce_spliced"] == pytest.approx(found["ce_clean"], rel=1e-5)
    assert found["kl_spliced"] == pytest.approx(0, abs=1e-5)
    assert found["ce_recovered_zero"] == pytest.approx(1, abs=1e-4)
    assert found["predicted"] == 5 * (T - 1) and found["replaced"] == 5 * T


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_an_sae_that_is_the_ablation_recovers_nothing(model, tokens, ablation):
    mean = np.random.default_rng(1).normal(size=D)
    sae = make_sae(gain=0.0, b_dec=mean if ablation == "mean" else 0.0)
    where = np.ones(tokens.shape, bool)
    found = measure(sae, model, tokens, where, mean)
    assert found["ce_spliced"] == pytest.approx(found[f"ce_{ablation}"], rel=1e-6)
    assert found["kl_spliced"] == pytest.approx(found[f"kl_{ablation}"], rel=1e-6)
    assert found[f"ce_recovered_{ablation}"] == pytest.approx(0, abs=1e-5)


def test_only_chosen_positions_are_replaced_and_counted(model, tokens):
    """Against the model run by hand, on sequences one by one."""
    where = np.random.default_rng(2).random(tokens.shape) < 0.5
    found = measure(make_sae(gain=0.5), model, tokens, where)
    ce, kl = {"clean": [], "spliced": []}, []
    for row, mask in zip(tokens, where, strict=True):

        def edit(x, mask=mask):
            return jnp.where(mask[None, :, None], 0.5 * x, x)

        log_p = {}
        for name, edits in (("clean", None), ("spliced", {SITE: edit})):
            logits, _ = lm.forward(model.params, row[None], model.config, edits=edits)
            log_p[name] = np.asarray(jax.nn.log_softmax(logits), np.float64)[0]
            ce[name] += [-log_p[name][t, row[t + 1]] for t in range(T - 1) if mask[t]]
        both = np.exp(log_p["clean"]) * (log_p["clean"] - log_p["spliced"])
        kl += list(both.sum(-1)[mask])
    assert found["ce_clean"] == pytest.approx(np.mean(ce["clean"]), rel=1e-5)
    assert found["ce_spliced"] == pytest.approx(np.mean(ce["spliced"]), rel=1e-5)
    assert found["kl_spliced"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert found["replaced"] == where.sum() and found["predicted"] == where[:, :-1].sum()


def test_the_last_short_batch_counts_like_the_others(model, tokens, monkeypatch):
    where = np.ones(tokens.shape, bool)
    whole = measure(make_sae(0.7), model, tokens, where)
    monkeypatch.setattr(batching, "_LOGITS", 2 * T * model.config.vocab_size)
    assert batching.sequences_at_once(model.vocab_size, *tokens.shape) == 2
    assert measure(make_sae(0.7), model, tokens, where) == pytest.approx(whole, rel=1e-4)


def test_nothing_to_replace_is_a_mistake_in_words(model, tokens):
    with pytest.raises(UserError, match="no position to splice"):
        measure(make_sae(), model, tokens, np.zeros(tokens.shape, bool))


# ------------------------------------------------------------- transcoders and crosscoders

MLP_IN, MLP_OUT, RESIDUAL = "mlp_in.1", "mlp_out.1", ("resid_post.0", "resid_post.1")


@pytest.fixture(scope="module")
def mlp_model(tmp_path_factory):
    """Two layers with a ReLU MLP and all of its biases."""
    config = lm.DecoderConfig(
        vocab_size=40, d_model=D, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=D // 2,
        d_mlp=3 * D, max_context=T, activation="relu", gated_mlp=False, mlp_bias=True,
    )  # fmt: skip
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape), lm.layout(config))
    directory = tmp_path_factory.mktemp("mlp_model")
    lm.save_model(directory, config, params, np.float32)
    return lm.open_model(directory)


@pytest.fixture(scope="module")
def some_tokens():
    return np.random.default_rng(4).integers(0, 40, (3, T)).astype(np.int32)


def mlp_as_transcoder(model, scale=1.7, target_scale=0.3):
    """The MLP of layer 1, exactly: it is a ReLU transcoder of d_mlp latents."""
    p = model.params["layers"][1]
    parameters = {
        "w_enc": p["w_up"] / scale,
        "b_enc": p["b_up"],
        "w_dec": p["w_down"] * target_scale,
        "b_dec": p["b_down"] * target_scale,
    }
    config = resolve(ReLUConfig(kind="transcoder", d_sae=3 * D), D, D)
    return ReLU.from_parameters(config, parameters, scale, target_scale)


@pytest.mark.slow
def test_the_mlp_itself_is_a_perfect_transcoder(mlp_model, some_tokens):
    sae = mlp_as_transcoder(mlp_model)
    source = ModelRows(mlp_model, (MLP_IN, MLP_OUT), some_tokens, what="tokens")
    found = evaluate(sae, source, mlp_model)
    assert found.rows.scalars["fvu"] == pytest.approx(0, abs=1e-9)
    assert found.rows.scalars["norm_ratio"] == pytest.approx(1, rel=1e-5)
    assert found.spliced["ce_spliced"] == pytest.approx(found.spliced["ce_clean"], rel=1e-5)
    assert found.spliced["ce_recovered_zero"] == pytest.approx(1, abs=1e-4)
    assert found.spliced["ce_recovered_mean"] == pytest.approx(1, abs=1e-4)
    assert (found.settings["site"], found.settings["target_site"]) == (MLP_IN, MLP_OUT)
    assert found.sites == {}


def run_by_hand(model, tokens, where, edits):
    """(cross-entropy, KL to the untouched model) over `where`, in float64."""
    log_p = []
    for each in ({}, edits):
        logits, _ = lm.forward(model.params, tokens, model.config, edits=each)
        log_p.append(np.asarray(jax.nn.log_softmax(logits), np.float64))
    following = np.take_along_axis(log_p[1][:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    kl = (np.exp(log_p[0]) * (log_p[0] - log_p[1])).sum(-1)
    return -following[where[:, :-1]].mean(), kl[where].mean()


def test_a_transcoder_replaces_its_target_by_what_it_makes_of_its_input(mlp_model, some_tokens):
    """Input and output taken in one pass of the model, and the ablations at the target."""
    sae = mlp_as_transcoder(mlp_model)
    sae.w_dec[...] *= 0.4
    where = np.random.default_rng(5).random(some_tokens.shape) < 0.6
    mean = np.random.default_rng(6).normal(size=D)
    sites = (MLP_IN, MLP_OUT)
    found = measure_spliced([sae], mlp_model, sites, some_tokens, where, mean)[0][MLP_OUT]
    seen = {}

    def look(x):
        seen["x"] = x
        return x

    replacements = {
        "spliced": lambda y: sae(seen["x"]),
        "zero": jnp.zeros_like,
        "mean": lambda y: jnp.broadcast_to(jnp.asarray(mean, jnp.float32), y.shape),
    }
    for name, replace in replacements.items():
        edits = {
            MLP_IN: look,
            MLP_OUT: lambda y, replace=replace: jnp.where(where[:, :, None], replace(y), y),
        }
        ce, kl = run_by_hand(mlp_model, some_tokens, where, edits)
        assert found[f"ce_{name}"] == pytest.approx(ce, rel=1e-5)
        assert found[f"kl_{name}"] == pytest.approx(kl, rel=1e-4)


@pytest.mark.slow
def test_a_crosscoder_is_spliced_in_at_each_site_in_turn(mlp_model, some_tokens):
    """One that predicts each of two sites from the other: y_hat = (x_1, x_0)."""
    eye = jnp.eye(2 * D)
    w_enc = jnp.concatenate([eye, -eye], axis=1)
    parameters = {
        "w_enc": w_enc, "b_enc": jnp.zeros(4 * D), "b_dec": jnp.zeros(2 * D),
        "w_dec": jnp.roll(w_enc.T, D, axis=1),
    }  # fmt: skip
    config = ReLUConfig(kind="crosscoder", d_sae=4 * D)
    scale = jnp.repeat(jnp.asarray([2.0, 0.5]), D)
    parameters["w_dec"] *= scale / jnp.roll(scale, D)
    sae = ReLU.from_parameters(resolve(config, (D, D)), parameters, scale)
    source = ModelRows(mlp_model, RESIDUAL, some_tokens, what="tokens")
    found = evaluate(sae, source, mlp_model)
    where = np.ones(some_tokens.shape, bool)
    _, x = lm.forward(mlp_model.params, some_tokens, mlp_model.config, taps=RESIDUAL)
    rows = [np.asarray(x[site], np.float64).reshape(-1, D) for site in RESIDUAL]
    for site, other, y, y_hat in zip(RESIDUAL, RESIDUAL[::-1], rows, rows[::-1], strict=True):
        values = found.sites[site]
        ce, kl = run_by_hand(mlp_model, some_tokens, where, {site: lambda _, other=other: x[other]})
        assert values["ce_spliced"] == pytest.approx(ce, rel=1e-5)
        assert values["kl_spliced"] == pytest.approx(kl, rel=1e-4)
        fvu = ((y - y_hat) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        assert values["fvu"] == pytest.approx(fvu, rel=1e-4)
    for name, mean in found.spliced.items():
        assert mean == pytest.approx(np.mean([found.sites[site][name] for site in RESIDUAL]))
    assert all(f"At {site}" in found.table() for site in RESIDUAL)


@pytest.mark.parametrize(
    "kind, sites, message",
    [
        ("transcoder", (MLP_IN,), "mlp_in.1 of the model is 16 wide, but the transcoder was"),
        ("transcoder", ("mlp_act.1", MLP_OUT), "48 and 16 wide, but .* trained on 16 and 16"),
        ("crosscoder", RESIDUAL[:1], "16 wide, but the crosscoder was trained on 16 and 16"),
        ("autoencoder", RESIDUAL, "resid_post.0,resid_post.1 of the model is 16 and 16 wide"),
        ("transcoder", (MLP_IN, MLP_IN), "site mlp_in.1 of the model is named twice"),
        ("transcoder", (MLP_IN, "mlp.1"), "unknown site 'mlp.1'"),
    ],
)
def test_sites_that_do_not_fit_are_refused(mlp_model, some_tokens, kind, sites, message):
    widths = {"transcoder": (D, D), "crosscoder": ((D, D),), "autoencoder": (D,)}[kind]
    config = resolve(ReLUConfig(kind=kind, d_sae=8), *widths)
    parameters = ReLU.init_parameters(jax.random.key(0), config, jnp.zeros(config.d_out))
    with pytest.raises(UserError, match=message):
        source = ModelRows(mlp_model, sites, some_tokens, what="tokens")
        evaluate(ReLU.from_parameters(config, parameters), source, mlp_model)
