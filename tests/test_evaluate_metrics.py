"""Metrics over rows against plain float64 NumPy."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sae_jax.errors import UserError
from sae_jax.evaluate.metrics import measure_rows
from sae_jax.sae import ReLU, ReLUConfig, TopK, by_name, resolve

D, N, ROWS = 12, 40, 1000
D_OUT = 7  # of transcoders
SITE_WIDTHS = (5, 7)  # of crosscoders


def measure(sae, batches):
    """The metrics of one SAE."""
    (found,) = measure_rows([sae], batches)
    return found


def make_sae(kind="autoencoder", scale=1.7, architecture="relu", seed=0):
    fields = {"topk": {"k": 5, "apply_b_dec_to_input": False}, "relu": {}}[architecture]
    config = by_name(architecture).Config(kind=kind, d_sae=N, **fields)
    target_scale = None
    if kind == "autoencoder":
        config = resolve(config, D)
    elif kind == "crosscoder":
        config = resolve(config, SITE_WIDTHS)
        scale = np.repeat([scale, 0.6], SITE_WIDTHS)
    else:
        config, target_scale = resolve(config, D, D_OUT), 0.3
    rng = np.random.default_rng(seed)
    parameters = {
        "w_enc": rng.normal(size=(D, N)) / np.sqrt(D),
        "w_dec": rng.normal(size=(N, config.d_out)) / np.sqrt(N),
        "b_enc": 0.3 * rng.normal(size=N) - 0.5,
        "b_dec": rng.normal(size=config.d_out),
    }
    parameters["b_enc"][3] = -1e6  # never fires
    if kind == "skip_transcoder":
        parameters["w_skip"] = rng.normal(size=(D, D_OUT)) / D
    parameters = {name: jnp.asarray(value, jnp.float32) for name, value in parameters.items()}
    cls = {"relu": ReLU, "topk": TopK}[architecture]
    return cls.from_parameters(config, parameters, scale, target_scale)


def rows_and_mask(mean=3.0, seed=1, width=D):
    rng = np.random.default_rng(seed)
    x = (mean + rng.normal(size=(ROWS, width)) * np.linspace(0.1, 2, width)).astype(np.float32)
    return x, rng.random(ROWS) < 0.8


def batches(x, used, sizes):
    start = 0
    for size in sizes:
        yield x[start : start + size], used[start : start + size]
        start += size
    assert start == len(x)


def reference(sae, rows, used):
    """Every metric by its formula, in float64."""
    p = {name: np.asarray(value, np.float64) for name, value in sae.parameters().items()}
    x = y = rows[used].astype(np.float64)
    if "transcoder" in sae.config.kind:
        x, y = x[:, :D], y[:, D:]
    scale, target_scale = (np.asarray(s, np.float64) for s in (sae.scale, sae.target_scale))
    pre = scale * x @ p["w_enc"] + p["b_enc"]
    latents = np.maximum(pre, 0)
    if sae.config.architecture == "topk":
        latents[pre < np.sort(pre, axis=1)[:, -sae.config.k, None]] = 0
    y_hat = latents @ p["w_dec"] + p["b_dec"]
    if "w_skip" in p:
        y_hat += scale * x @ p["w_skip"]
    y_hat /= target_scale
    activations = latents * np.linalg.norm(p["w_dec"] / target_scale, axis=1)
    error = ((y - y_hat) ** 2).sum(1)
    norm, norm_hat = np.linalg.norm(y, axis=1), np.linalg.norm(y_hat, axis=1)
    dot = (y * y_hat).sum(1)
    fvu = error.sum() / ((y - y.mean(0)) ** 2).sum()
    sites = np.split(np.arange(y.shape[1]), np.cumsum(sae.config.site_widths or ())[:-1])
    variance, squared_error = (y - y.mean(0)) ** 2, (y - y_hat) ** 2
    site_fvu = [squared_error[:, site].sum() / variance[:, site].sum() for site in sites]
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
    arrays = [fired.mean(0), mean_activation, activations.max(0), y.mean(0), site_fvu]
    return scalars, *arrays


SAES = {
    "relu": ("autoencoder", "relu"),
    "topk": ("autoencoder", "topk"),
    "transcoder": ("transcoder", "topk"),
    "skip_transcoder": ("skip_transcoder", "relu"),
    "crosscoder": ("crosscoder", "relu"),
}


@pytest.mark.parametrize(
    "name, sizes",
    [(name, (300, 300, 300, 100)) for name in SAES] + [("topk", (ROWS,)), ("topk", (1, 7, 992))],
    ids=str,
)
@pytest.mark.slow
def test_metrics_are_their_formulas_however_the_rows_are_cut(name, sizes):
    kind, architecture = SAES[name]
    sae = make_sae(kind, architecture=architecture)
    x, used = rows_and_mask(width=D + D_OUT if "transcoder" in kind else D)
    used[:1] = False  # a first batch in which nothing counts
    metrics = measure(sae, batches(x, used, sizes))
    scalars, density, mean_activation, max_activation, mean, site_fvu = reference(sae, x, used)
    assert metrics.rows == used.sum()
    assert metrics.scalars == pytest.approx(scalars, rel=2e-5)
    np.testing.assert_allclose(metrics.density, density)
    np.testing.assert_allclose(metrics.mean_activation, mean_activation, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.max_activation, max_activation, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(metrics.site_fvu, site_fvu, rtol=2e-5)


def test_fvu_stays_exact_where_the_mean_is_a_thousand_times_the_spread():
    sae = make_sae(scale=0.01)
    x, used = rows_and_mask(mean=3000.0)
    metrics = measure(sae, batches(x, used, (250,) * 4))
    assert metrics.scalars["fvu"] == pytest.approx(reference(sae, x, used)[0]["fvu"], rel=1e-4)


def test_rows_that_do_not_count_may_hold_anything():
    sae = make_sae()
    x, used = rows_and_mask()
    spoiled = np.where(used[:, None], x, np.nan)
    clean = measure(sae, batches(x, used, (500, 500)))
    assert measure(sae, batches(spoiled, used, (500, 500))).scalars == clean.scalars


def test_bfloat16_rows_are_taken_as_the_numbers_that_they_are():
    sae = make_sae()
    x, used = rows_and_mask()
    x = x.astype(ml_dtypes.bfloat16)
    exact = measure(sae, batches(x.astype(np.float32), used, (ROWS,)))
    assert measure(sae, batches(x, used, (ROWS,))).scalars == exact.scalars


def identity_sae():
    """x_hat = x exactly: latents are the positive and the negative parts of x."""
    eye = jnp.eye(D)
    parameters = {
        "w_enc": jnp.concatenate([eye, -eye], axis=1),
        "w_dec": jnp.concatenate([eye, -eye]),
        "b_enc": jnp.zeros(2 * D),
        "b_dec": jnp.zeros(D),
    }
    return ReLU.from_parameters(resolve(ReLUConfig(d_sae=2 * D), D), parameters)


def test_a_perfect_sae():
    x, used = rows_and_mask(mean=0.0)
    scalars = measure(identity_sae(), batches(x, used, (ROWS,))).scalars
    perfect = {"fvu": 0, "mse": 0, "cosine_similarity": 1, "norm_ratio": 1, "l0": D}
    perfect |= {"relative_reconstruction_bias": 1, "explained_variance": 1}
    assert {name: scalars[name] for name in perfect} == pytest.approx(perfect, abs=1e-6)


def test_an_sae_that_gives_the_mean_has_fvu_one_and_is_all_dead():
    x, used = rows_and_mask()
    sae = identity_sae()
    sae.w_enc[...] *= 0
    sae.b_dec[...] = jnp.asarray(x[used].mean(0))
    metrics = measure(sae, batches(x, used, (ROWS,)))
    assert metrics.scalars["fvu"] == pytest.approx(1, rel=1e-5)
    assert metrics.scalars["dead_fraction"] == 1
    assert metrics.scalars["l0"] == metrics.scalars["l1"] == 0


def test_no_rows_is_a_mistake_in_words():
    x, used = rows_and_mask()
    with pytest.raises(UserError, match="no rows to evaluate"):
        measure(make_sae(), batches(x, used & False, (ROWS,)))


def test_activations_of_another_width_are_refused():
    with pytest.raises(UserError, match=f"width 9 .* d_in {D}"):
        measure(make_sae(), [(np.ones((4, 9), np.float32), np.ones(4, bool))])
