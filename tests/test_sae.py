"""The contract that every architecture obeys. A new one joins by a line in SMALL and a
reference in REFERENCES, written from its published formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import sparse_rows

from sae_jax import sae as saes
from sae_jax.config import OptimizerConfig, SAEConfig, UserError
from sae_jax.train import optimizer

D, N, B = 6, 20, 16
SMALL = {
    "relu": SAEConfig("relu", d_sae=N, sparsity_coefficient=0.3),
    "topk": SAEConfig("topk", d_sae=N, k=3, aux_k=5),
}


def relu_reference(p, x, dead, coefficient, held):
    """Conerly et al. 2024: E[ ||x - x_hat||^2 + lambda sum_i f_i ||W_dec,i|| ]."""
    f = np.maximum(x @ p["w_enc"] + p["b_enc"], 0)
    x_hat = f @ p["w_dec"] + p["b_dec"]
    penalty = (f * np.linalg.norm(p["w_dec"], axis=1)).sum(axis=1)
    return np.mean(((x - x_hat) ** 2).sum(axis=1) + coefficient * penalty)


def topk_reference(p, x, dead, coefficient, held):
    """Gao et al. 2024, 2.3 and A.2: E[ ||x - x_hat||^2 + ||e - e_hat||^2 / 32 ], where e is
    `held` fixed and e_hat decodes the 5 largest pre-activations of dead latents."""
    pre = (x - p["b_dec"]) @ p["w_enc"] + p["b_enc"]
    x_hat = np.maximum(largest(pre, 3), 0) @ p["w_dec"] + p["b_dec"]
    total = ((x - x_hat) ** 2).sum(axis=1)
    if dead.any():
        e_hat = largest(np.where(dead, pre, -np.inf), 5) @ p["w_dec"]
        total = total + ((held - e_hat) ** 2).sum(axis=1) / 32
    return np.mean(total)


def largest(pre, k):
    """`pre` with all but the k largest finite of each row set to 0."""
    threshold = -np.sort(-pre, axis=1)[:, k - 1 : k]
    return np.where((pre >= threshold) & np.isfinite(pre), pre, 0.0)


REFERENCES = {"relu": relu_reference, "topk": topk_reference}
every_architecture = pytest.mark.parametrize("name", saes.ARCHITECTURES)
some_dead = pytest.mark.parametrize("dead_count", [0, 3, 9])


def resolved(name, d_in=D, **changes):
    return saes.resolve(dataclasses.replace(SMALL[name], **changes), d_in)


def parameters_of(config, seed=0):
    """Random, with every bias off zero, so that nothing holds by symmetry."""
    key = jax.random.key(seed)
    fresh = saes.architecture(config).init_parameters(key, config, jnp.full(config.d_in, 0.2))
    rng = np.random.default_rng(seed)
    noise = {n: rng.normal(size=p.shape).astype(np.float32) for n, p in fresh.items()}
    out = {n: p + 0.1 * noise[n] for n, p in fresh.items()}
    if config.unit_norm_decoder:
        out["w_dec"] /= jnp.linalg.norm(out["w_dec"], axis=1, keepdims=True)
    return out


def make(name, scale=1.0, seed=0, **changes):
    config = resolved(name, **changes)
    return saes.ARCHITECTURES[name](config, parameters_of(config, seed), scale)


def inputs(rows=B):
    return jnp.asarray(sparse_rows(rows, seed=5, width=D))


def dead_latents(count):
    """The first `count` latents of odd index."""
    return jnp.isin(jnp.arange(N), jnp.arange(1, 2 * count + 1, 2))


def loss_of(config, x, dead):
    architecture = saes.architecture(config)
    return lambda parameters: architecture(config, parameters).loss(x, dead, jnp.float32(0.3))


def test_every_architecture_is_tested():
    assert SMALL.keys() == REFERENCES.keys() == saes.ARCHITECTURES.keys()


@every_architecture
def test_shapes(name):
    sae = make(name)
    shapes = {n: p.shape for n, p in sae.parameters().items()}
    expected = {"w_enc": (D, N), "w_dec": (N, D), "b_enc": (N,), "b_dec": (D,)}
    assert expected.items() <= shapes.items()
    for leading in ((), (3,), (2, 3)):
        x = jnp.ones((*leading, D))
        latents = sae.encode(x)
        assert latents.shape == (*leading, N) and float(latents.min()) >= 0
        assert sae.decode(latents).shape == sae(x).shape == x.shape
    with pytest.raises(UserError, match="width 7"):
        sae.encode(jnp.ones((2, 7)))


@every_architecture
@some_dead
def test_loss_is_the_published_formula(name, dead_count):
    config, x, dead = resolved(name), inputs(), dead_latents(dead_count)
    assert int(dead.sum()) == dead_count
    parameters = parameters_of(config)
    losses = jax.jit(loss_of(config, x, dead))(parameters)
    wide = {n: np.asarray(p, np.float64) for n, p in parameters.items()}
    sae = saes.ARCHITECTURES[name](config, parameters)
    latents = np.asarray(sae.encode(x), np.float64)
    error = np.asarray(x, np.float64) - np.asarray(sae(x), np.float64)
    want = REFERENCES[name](wide, np.asarray(x, np.float64), np.asarray(dead), 0.3, error)
    np.testing.assert_allclose(losses.total, want, rtol=1e-5)
    np.testing.assert_allclose(losses.mse, np.mean((error**2).sum(axis=1)), rtol=1e-5)
    np.testing.assert_allclose(losses.l0, np.mean((latents > 0).sum(axis=1)), rtol=1e-6)
    norms = np.linalg.norm(wide["w_dec"], axis=1)
    np.testing.assert_allclose(losses.l1, np.mean((latents * norms).sum(axis=1)), rtol=1e-5)
    np.testing.assert_array_equal(losses.fired, (latents > 0).any(axis=0))


@every_architecture
@some_dead
def test_gradients_by_finite_differences(name, dead_count):
    """Of the reference in float64, in every entry of every parameter."""
    config, x, dead = resolved(name), inputs(), dead_latents(dead_count)
    parameters = parameters_of(config)
    loss = loss_of(config, x, dead)
    got = jax.jit(jax.grad(lambda p: loss(p).total))(parameters)
    wide = {n: np.asarray(p, np.float64) for n, p in parameters.items()}
    held = np.asarray(x - saes.ARCHITECTURES[name](config, parameters)(x), np.float64)
    x64, dead64 = np.asarray(x, np.float64), np.asarray(dead)

    def reference():
        return REFERENCES[name](wide, x64, dead64, 0.3, held)

    for parameter, value in wide.items():
        want = np.zeros_like(value)
        for place in np.ndindex(value.shape):
            before = value[place]
            value[place] = before + 1e-6
            above = reference()
            value[place] = before - 1e-6
            want[place] = (above - reference()) / 2e-6
            value[place] = before
        size = np.abs(want).max()
        assert size > 1e-3
        np.testing.assert_allclose(
            got[parameter], want, rtol=1e-4, atol=1e-4 * size, err_msg=parameter
        )


def test_dead_latents_learn_even_below_zero():
    """AuxK picks without ReLU: with few dead, all are picked for every token, and every one's
    encoder column, decoder row and bias get a gradient, negative pre-activations or not."""
    config, x, dead = resolved("topk"), inputs(), dead_latents(3)
    parameters = parameters_of(config)
    parameters["b_enc"] = jnp.where(dead, -50.0, parameters["b_enc"])
    got = jax.jit(jax.grad(lambda p: loss_of(config, x, dead)(p).total))(parameters)
    for latent in np.flatnonzero(dead):
        assert float(jnp.abs(got["w_enc"][:, latent]).max()) > 1e-3
        assert float(jnp.abs(got["w_dec"][latent]).max()) > 1e-3
        assert abs(float(got["b_enc"][latent])) > 1e-3


@every_architecture
def test_jit_is_no_jit(name):
    config, x, dead = resolved(name), inputs(), dead_latents(3)
    parameters, loss = parameters_of(config), loss_of(config, x, dead)
    plain = jax.value_and_grad(lambda p: loss(p).total)(parameters)
    jitted = jax.jit(jax.value_and_grad(lambda p: loss(p).total))(parameters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), plain, jitted)
    sae = saes.ARCHITECTURES[name](config, parameters)
    np.testing.assert_allclose(jax.jit(lambda s, x: s(x))(sae, x), sae(x), rtol=1e-5, atol=1e-6)


@every_architecture
def test_loss_falls(name):
    config, x = resolved(name), inputs(256)
    parameters = saes.architecture(config).init_parameters(
        jax.random.key(0), config, x.mean(axis=0)
    )
    adam = optimizer.make(
        OptimizerConfig(learning_rate=3e-3, schedule="constant"), 100, config.unit_norm_decoder
    )
    dead = jnp.zeros(N, bool)
    losses = loss_of(config, x, dead)

    @jax.jit
    def step(parameters, state):
        value, gradients = jax.value_and_grad(lambda p: losses(p).total)(parameters)
        updates, state = adam.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    state, values = adam.init(parameters), []
    for _ in range(100):
        parameters, state, value = step(parameters, state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]


@every_architecture
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_fold_is_the_same_function(name, scale):
    sae, x = make(name, scale=scale), inputs() / scale
    folded = sae.fold()
    assert folded.scale == 1
    np.testing.assert_allclose(jnp.linalg.norm(folded.w_dec[...], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(folded(x), sae(x), rtol=1e-4, atol=1e-4)
    norms = jnp.linalg.norm(sae.w_dec[...], axis=1)
    np.testing.assert_allclose(
        folded.encode(x), sae.encode(x) * norms / scale, rtol=1e-4, atol=1e-4
    )


@every_architecture
def test_scale_is_only_a_change_of_units(name):
    sae, scaled, x = make(name), make(name, scale=0.25), inputs()
    np.testing.assert_allclose(scaled.encode(x * 4), sae.encode(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scaled(x * 4), sae(x) * 4, rtol=1e-5, atol=1e-5)


@every_architecture
def test_bfloat16_is_close(name):
    x, dead = inputs(256), dead_latents(3)
    totals = []
    for dtype in ("float32", "bfloat16"):
        config = resolved(name, compute_dtype=dtype)
        loss = loss_of(config, x, dead)
        gradient = jax.jit(jax.value_and_grad(lambda p, loss=loss: loss(p).total))
        totals.append(gradient(parameters_of(config)))
    (value, gradients), (low_value, low_gradients) = totals
    assert float(low_value) == pytest.approx(float(value), rel=0.02)
    for parameter, gradient in gradients.items():
        assert low_gradients[parameter].dtype == jnp.float32
        difference = jnp.linalg.norm(low_gradients[parameter] - gradient)
        assert difference < 0.1 * jnp.linalg.norm(gradient), parameter


def test_topk_keeps_k_and_sparse_equals_dense():
    sae, x = make("topk", scale=0.5), inputs()
    latents = sae.encode(x)
    assert int((latents > 0).sum(axis=1).max()) <= 3
    values, indices = sae.encode_sparse(x)
    assert values.shape == indices.shape == (B, 3)
    assert bool(jnp.all(values[:, :-1] >= values[:, 1:]))
    dense = np.zeros((B, N), np.float32)
    np.put_along_axis(dense, np.asarray(indices), np.asarray(values), axis=1)
    np.testing.assert_allclose(dense, latents, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name,changes,words",
    [
        ("topk", {"sparsity_coefficient": 1.0}, ["sae.sparsity_coefficient", "topk"]),
        ("relu", {"k": 3}, ["sae.k", "relu"]),
        ("relu", {"aux_coefficient": 0.1}, ["sae.aux_coefficient", "relu"]),
        ("topk", {"k": N + 1}, ["sae.k", "sae.d_sae"]),
        ("topk", {"k": 0}, ["sae.k"]),
        ("topk", {"aux_k": 0}, ["sae.aux_k"]),
        ("topk", {"d_sae": 0}, ["sae.d_sae"]),
        ("topk", {"compute_dtype": "float16"}, ["sae.compute_dtype", "bfloat16"]),
        ("topk", {"b_dec_init": "median"}, ["sae.b_dec_init", "'mean'"]),
        ("topk", {"normalize": "l2"}, ["sae.normalize"]),
        ("topk", {"architecture": "topkk"}, ["sae.architecture", "'topk'"]),
        ("relu", {"sparsity_coefficient": -1.0}, ["sae.sparsity_coefficient"]),
        ("relu", {"sparsity_warmup_fraction": 1.5}, ["sae.sparsity_warmup_fraction"]),
        ("relu", {"decoder_init_norm": 0.0}, ["sae.decoder_init_norm"]),
        ("topk", {"dead_after_tokens": 0}, ["sae.dead_after_tokens"]),
    ],
)
def test_resolve_refuses(name, changes, words):
    with pytest.raises(UserError) as error:
        resolved(name, **changes)
    for word in words:
        assert word in str(error.value)


def test_resolve_refuses_another_width():
    with pytest.raises(UserError, match="sae.d_in is 7, but the activations are 6 wide"):
        saes.resolve(SAEConfig(d_in=7), 6)


@every_architecture
def test_resolve_is_idempotent(name):
    config = resolved(name)
    assert saes.resolve(config, D) == config
