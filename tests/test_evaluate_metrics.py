"""Metrics over rows against plain float64 NumPy."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sae_jax.config import SAEConfig, UserError
from sae_jax.evaluate import measure_rows
from sae_jax.sae import ReLU, TopK, resolve

D, N, ROWS = 12, 40, 1000


def make_sae(kind="relu", scale=1.7, seed=0):
    rng = np.random.default_rng(seed)
    parameters = {
        "w_enc": rng.normal(size=(D, N)) / np.sqrt(D),
        "w_dec": rng.normal(size=(N, D)) / np.sqrt(N),
        "b_enc": 0.3 * rng.normal(size=N) - 0.5,
        "b_dec": rng.normal(size=D),
    }
    parameters["b_enc"][3] = -1e6  # never fires
    if kind == "topk":
        config = SAEConfig(architecture="topk", d_sae=N, k=5, apply_b_dec_to_input=False)
    else:
        config = SAEConfig(architecture="relu", d_sae=N)
    parameters = {name: jnp.asarray(value, jnp.float32) for name, value in parameters.items()}
    return {"relu": ReLU, "topk": TopK}[kind](resolve(config, D), parameters, scale)


def rows_and_mask(mean=3.0, seed=1):
    rng = np.random.default_rng(seed)
    x = (mean + rng.normal(size=(ROWS, D)) * np.linspace(0.1, 2, D)).astype(np.float32)
    return x, rng.random(ROWS) < 0.8


def batches(x, used, sizes):
    start = 0
    for size in sizes:
        yield x[start : start + size], used[start : start + size]
        start += size
    assert start == len(x)


def reference(sae, x, used):
    """Every metric by its formula, in float64."""
    p = {name: np.asarray(value, np.float64) for name, value in sae.parameters().items()}
    x = x[used].astype(np.float64)
    pre = sae.scale * x @ p["w_enc"] + p["b_enc"]
    latents = np.maximum(pre, 0)
    if sae.config.architecture == "topk":
        latents[pre < np.sort(pre, axis=1)[:, -sae.config.k, None]] = 0
    x_hat = (latents @ p["w_dec"] + p["b_dec"]) / sae.scale
    activations = latents * np.linalg.norm(p["w_dec"], axis=1) / sae.scale
    error = ((x - x_hat) ** 2).sum(1)
    norm, norm_hat = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    dot = (x * x_hat).sum(1)
    fvu = error.sum() / ((x - x.mean(0)) ** 2).sum()
    fired = activations > 0
    scalars = {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "mse": error.mean(),
        "cosine_similarity": (dot / norm / norm_hat).mean(),
        "norm_in": norm.mean(),
        "norm_out": norm_hat.mean(),
        "norm_ratio": (norm_hat / norm).mean(),
        "relative_reconstruction_bias": (norm_hat**2).mean() / dot.mean(),
        "l0": fired.sum(1).mean(),
        "l1": activations.sum(1).mean(),
        "dead_fraction": (~fired.any(0)).mean(),
    }
    with np.errstate(invalid="ignore"):
        mean_activation = np.nan_to_num(activations.sum(0) / fired.sum(0))
    return scalars, fired.mean(0), mean_activation, activations.max(0), x.mean(0)


@pytest.mark.parametrize("kind", ["relu", "topk"])
@pytest.mark.parametrize("sizes", [(ROWS,), (300, 300, 300, 100), (1, 7, 992)], ids=str)
def test_metrics_are_their_formulas_however_the_rows_are_cut(kind, sizes):
    sae = make_sae(kind)
    x, used = rows_and_mask()
    used[:1] = False  # a first batch in which nothing counts
    metrics = measure_rows(sae, batches(x, used, sizes))
    scalars, density, mean_activation, max_activation, mean = reference(sae, x, used)
    assert metrics.rows == used.sum()
    assert metrics.scalars == pytest.approx(scalars, rel=2e-5)
    np.testing.assert_allclose(metrics.density, density)
    np.testing.assert_allclose(metrics.mean_activation, mean_activation, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.max_activation, max_activation, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.mean, mean, rtol=1e-5)


def test_fvu_stays_exact_where_the_mean_is_a_thousand_times_the_spread():
    sae = make_sae(scale=0.01)
    x, used = rows_and_mask(mean=3000.0)
    metrics = measure_rows(sae, batches(x, used, (250,) * 4))
    assert metrics.scalars["fvu"] == pytest.approx(reference(sae, x, used)[0]["fvu"], rel=1e-4)


def test_rows_that_do_not_count_may_hold_anything():
    sae = make_sae()
    x, used = rows_and_mask()
    spoiled = np.where(used[:, None], x, np.nan)
    clean = measure_rows(sae, batches(x, used, (500, 500)))
    assert measure_rows(sae, batches(spoiled, used, (500, 500))).scalars == clean.scalars


def test_bfloat16_rows_are_taken_as_the_numbers_that_they_are():
    sae = make_sae()
    x, used = rows_and_mask()
    x = x.astype(ml_dtypes.bfloat16)
    exact = measure_rows(sae, batches(x.astype(np.float32), used, (ROWS,)))
    assert measure_rows(sae, batches(x, used, (ROWS,))).scalars == exact.scalars


def identity_sae():
    """x_hat = x exactly: latents are the positive and the negative parts of x."""
    eye = jnp.eye(D)
    parameters = {
        "w_enc": jnp.concatenate([eye, -eye], axis=1),
        "w_dec": jnp.concatenate([eye, -eye]),
        "b_enc": jnp.zeros(2 * D),
        "b_dec": jnp.zeros(D),
    }
    return ReLU(resolve(SAEConfig(architecture="relu", d_sae=2 * D), D), parameters)


def test_a_perfect_sae():
    x, used = rows_and_mask(mean=0.0)
    scalars = measure_rows(identity_sae(), batches(x, used, (ROWS,))).scalars
    perfect = {"fvu": 0, "mse": 0, "cosine_similarity": 1, "norm_ratio": 1, "l0": D}
    perfect |= {"relative_reconstruction_bias": 1, "explained_variance": 1}
    assert {name: scalars[name] for name in perfect} == pytest.approx(perfect, abs=1e-6)


def test_an_sae_that_gives_the_mean_has_fvu_one_and_is_all_dead():
    x, used = rows_and_mask()
    sae = identity_sae()
    sae.w_enc[...] *= 0
    sae.b_dec[...] = jnp.asarray(x[used].mean(0))
    metrics = measure_rows(sae, batches(x, used, (ROWS,)))
    assert metrics.scalars["fvu"] == pytest.approx(1, rel=1e-5)
    assert metrics.scalars["dead_fraction"] == 1
    assert metrics.scalars["l0"] == metrics.scalars["l1"] == 0


def test_no_rows_is_a_mistake_in_words():
    x, used = rows_and_mask()
    with pytest.raises(UserError, match="no rows to evaluate"):
        measure_rows(make_sae(), batches(x, used & False, (ROWS,)))


def test_activations_of_another_width_are_refused():
    with pytest.raises(UserError, match=f"width 9 .* d_in {D}"):
        measure_rows(make_sae(), [(np.ones((4, 9), np.float32), np.ones(4, bool))])
