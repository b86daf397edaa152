"""An SAE inside its language model: cases with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import world

from sae_jax import lm
from sae_jax.config import SAEConfig, UserError
from sae_jax.evaluate import LanguageModel, measure_spliced
from sae_jax.sae import ReLU, resolve

SITE, D, T = "resid_post.0", 16, 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("spliced") / "model"
    world.make_model(directory, num_layers=2)
    return LanguageModel.load(directory)


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
    return ReLU(resolve(SAEConfig(architecture="relu", d_sae=2 * D), D), parameters)


def test_a_perfect_sae_recovers_everything(model, tokens):
    where = np.ones(tokens.shape, bool)
    found = measure_spliced(make_sae(), model, SITE, tokens, where, np.zeros(D))
    assert found["ce_spliced"] == pytest.approx(found["ce_clean"], rel=1e-5)
    assert found["kl_spliced"] == pytest.approx(0, abs=1e-5)
    assert found["ce_recovered_zero"] == pytest.approx(1, abs=1e-4)
    assert found["predicted"] == 5 * (T - 1) and found["replaced"] == 5 * T


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_an_sae_that_is_the_ablation_recovers_nothing(model, tokens, ablation):
    mean = np.random.default_rng(1).normal(size=D)
    sae = make_sae(gain=0.0, b_dec=mean if ablation == "mean" else 0.0)
    where = np.ones(tokens.shape, bool)
    found = measure_spliced(sae, model, SITE, tokens, where, mean)
    assert found["ce_spliced"] == pytest.approx(found[f"ce_{ablation}"], rel=1e-6)
    assert found["kl_spliced"] == pytest.approx(found[f"kl_{ablation}"], rel=1e-6)
    assert found[f"ce_recovered_{ablation}"] == pytest.approx(0, abs=1e-5)


def test_only_chosen_positions_are_replaced_and_counted(model, tokens):
    """Against the model run by hand, on sequences one by one."""
    where = np.random.default_rng(2).random(tokens.shape) < 0.5
    found = measure_spliced(make_sae(gain=0.5), model, SITE, tokens, where, np.zeros(D))
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
    whole = measure_spliced(make_sae(0.7), model, SITE, tokens, where, np.zeros(D))
    monkeypatch.setattr("sae_jax.evaluate.sources._LOGITS", 2 * T * model.config.vocab_size)
    assert model.sequences_at_once(*tokens.shape) == 2
    assert measure_spliced(make_sae(0.7), model, SITE, tokens, where, np.zeros(D)) == pytest.approx(
        whole, rel=1e-4
    )


def test_nothing_to_replace_is_a_mistake_in_words(model, tokens):
    with pytest.raises(UserError, match="no position to splice"):
        measure_spliced(make_sae(), model, SITE, tokens, np.zeros(tokens.shape, bool), np.zeros(D))
