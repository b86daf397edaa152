"""Dense families whose batch is sparse compute by their active latents alone, and get the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sae
from training import sparse_rows

from sae_jax import ops
from sae_jax import sae as saes
from sae_jax.config import Config, OptimizerConfig
from sae_jax.ops import active, dense
from sae_jax.ops.sharding import BATCH, BATCHED_RUNS, DECODER, ENCODER, PER_LATENT
from sae_jax.train.step import Trainer

B, D, N = 24, 6, 60
FAMILIES = ("relu", "relu_l1_unit", "jumprelu", "gated")
CASES = [
    name
    for name, case in test_sae.CASES.items()
    if case["architecture"] in FAMILIES and not case.get("preactivation_coefficient")
]


def in_ci(*names, of=FAMILIES):
    """A parameter `name` of slow tests for `names`, and of long ones for the rest of `of`."""
    marks = {True: pytest.mark.slow, False: pytest.mark.long}
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=marks[name in names]) for name in of]
    )


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Several slices of tokens, chunks of rows and rows a token, the last ones not full; and room
    for everything."""
    sizes = {"_CHUNK": 10, "_SLOTS": 4, "_BITS": 5, "_LEAST": 0, "_SHARE": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(active, name, value)
    test_sae.compiled.cache_clear()
    yield
    test_sae.compiled.cache_clear()


@pytest.fixture
def never_dense(monkeypatch):
    """What is computed by all latents is not a number."""
    for name in ("_autoencode_all", "_gradients_of_all"):
        monkeypatch.setattr(dense, name, functools.partial(poisoned, getattr(dense, name)))


def poisoned(function, *args):
    return jax.tree.map(lambda a: a * jnp.nan, function(*args))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def acts(product, per_latent):
    return ~(product + per_latent["bias"] <= 0)


def finder(n=N):
    """A function of a bias and inputs that returns (ActiveLatents, products)."""
    w = normal(1, D, n)
    find = jax.jit(functools.partial(active.find_active, acts, compute_dtype=jnp.float32))
    return lambda bias, x: (find(x, w, {"bias": np.full(n, bias, np.float32)}), x @ w)


@pytest.mark.parametrize("n", [5, 60, 1055])
def test_finds_each_active_latent_once(n):
    find = finder(n)
    for bias in (0.0, -2.0, -100.0, 100.0):
        check_found(*find(bias, normal(0, B, D)), bias)


def check_found(found, products, bias):
    assert found.complete[0]
    here = np.arange(4) < np.asarray(found.filled)[:, None]
    assert not here[int(found.used[0]) :].any()
    tokens = np.broadcast_to(np.asarray(found.tokens)[:, None], here.shape)[here]
    places = np.stack([tokens, np.asarray(found.latents)[here]], axis=1)
    wanted = np.argwhere(products + bias > 0)
    np.testing.assert_array_equal(places[np.lexsort(places.T[::-1])], wanted)
    np.testing.assert_allclose(found.products[here], products[tuple(places.T)], rtol=1e-4)


def test_gives_up_where_there_is_no_room(monkeypatch):
    """That all latents of one token act is no reason."""
    monkeypatch.setattr(active, "_SHARE", 4)
    find, x = finder(), normal(0, B, D)
    crowded = np.where(np.arange(B)[:, None] == 3, np.nan, x)
    assert find(-6.0, x)[0].complete[0] and find(-6.0, crowded)[0].complete[0]
    assert not find(0.0, x)[0].complete[0] and not find(-6.0, x * np.nan)[0].complete[0]


@in_ci("relu", "jumprelu", "gated", of=CASES)
def test_is_the_published_formula_in_float64(never_dense, name):
    """Its gradients too, by finite differences; with dead latents, which act nowhere."""
    test_sae.test_loss_is_the_published_formula(name, 3)
    test_sae.test_gradients_by_finite_differences(name, 3)


@in_ci("gated", of=["relu", "jumprelu, quadratic", "gated"])
def test_every_mesh_is_one_device(never_dense, name):
    test_sae.test_every_mesh_is_one_device(name)


def gradients(name, monkeypatch, finds: bool, change=lambda p: p, x=None):
    """(losses, gradients) of a batch; finds: whether active latents are looked for."""
    test_sae.compiled.cache_clear()
    monkeypatch.setattr(dense, "worth_finding", lambda n: finds)
    config = test_sae.resolved(name)
    data_x, y = test_sae.data(config)
    now = dataclasses.replace(test_sae.controls(config), dead=jnp.zeros(test_sae.N, bool))
    parameters = change(test_sae.parameters_of(config))
    return test_sae.compiled(name)(parameters, data_x if x is None else x, y, now)


def equal(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@in_ci("jumprelu", of=["relu", "jumprelu", "jumprelu, to all", "gated"])
def test_edges_are_those_of_dense_work(monkeypatch, name):
    """Products of 0, so that biases are pre-activations: at 0, at thresholds and at the edges of
    their windows, and just beyond each; and infinite ones."""

    def on_edges(parameters):
        width = test_sae.resolved(name).bandwidth / 2 if "jumprelu" in name else 0.0
        theta = np.float32(0.125)
        edges = np.float32([0, theta, theta - width, theta + width])
        near = [edges, np.nextafter(edges, np.float32(9)), np.nextafter(edges, np.float32(-9))]
        bias = np.concatenate([*near, [np.inf, -np.inf], np.zeros(6)]).astype(np.float32)
        changed = {"b_enc": bias, "threshold": np.full(20, theta), "b_mag": np.full(20, 0.5)}
        kept = {n: jnp.asarray(v, jnp.float32) for n, v in changed.items() if n in parameters}
        kept["b_enc"] = jnp.where(jnp.isposinf(kept["b_enc"]), 3.0, kept["b_enc"])
        return parameters | kept | {"w_enc": 0 * parameters["w_enc"]}

    equal(*(gradients(name, monkeypatch, finds, on_edges) for finds in (True, False)))


@in_ci("relu")
def test_what_is_not_a_number_is_not_lost(monkeypatch, name):
    x = jnp.asarray(sparse_rows(test_sae.B, seed=5, width=test_sae.D)).at[3, 2].set(jnp.nan)
    found, wanted = (gradients(name, monkeypatch, finds, x=x) for finds in (True, False))
    assert jnp.isnan(found[1]["w_enc"]).any()
    equal(found, wanted)


def autoencode(x, w_enc, bias, w_dec, weights):
    """A sum whose gradients have everything in them that the operation passes on."""

    def activate(product, per_latent):
        f = jax.nn.relu(product + per_latent["bias"])
        return ops.Activated((f, 2 * f), {"sum": (f**2).sum(axis=0)}, {"sum": f.sum(axis=1)})

    out = ops.dense_autoencode(activate, x, w_enc, {"bias": bias}, w_dec, support=acts)
    return sum((weights * a).sum() for a in out.decoded) + sum(
        (jnp.arange(len(a)) % 7 * a).sum() for a in (out.latent_sums["sum"], out.token_sums["sum"])
    )


@pytest.mark.slow
def test_each_device_decides_for_itself(monkeypatch, mesh):
    """The first quarter of the tokens and of the latents is not sparse."""
    arrays = [normal(0, B, D), normal(1, D, N), np.full(N, -4.0, np.float32), normal(2, N, D)]
    arrays[0][: B // 4] *= 10
    arrays[2][: N // 4] = 0
    monkeypatch.setattr(active, "_SHARE", 3)
    gradient = jax.value_and_grad(autoencode, argnums=(1, 2, 3))
    with jax.set_mesh(jax.make_mesh((), ())), monkeypatch.context() as patched:
        patched.setattr(dense, "worth_finding", lambda n: False)
        want = gradient(*arrays, normal(3, B, D))
    specs = (BATCH, ENCODER, PER_LATENT, DECODER, BATCH)
    placed = map(jax.device_put, (*arrays, normal(3, B, D)), specs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3),
        jax.jit(gradient)(*placed),
        want,
    )


@pytest.mark.long
def test_runs_that_are_mapped_may_differ(monkeypatch):
    """One of two runs is sparse."""
    monkeypatch.setattr(active, "_SHARE", 4)
    shapes = (B, D), (D, N), (N, D), (B, D)
    x, w_enc, w_dec, weights = (jnp.asarray(normal(i, *s)) for i, s in enumerate(shapes))
    biases = jnp.stack([jnp.full(N, -6.0), jnp.zeros(N)])
    gradient = jax.value_and_grad(lambda bias: autoencode(x, w_enc, bias, w_dec, weights))
    got = jax.jit(jax.vmap(gradient, axis_name=BATCHED_RUNS))(biases)
    for run, bias in enumerate(biases):
        jax.tree.map(
            lambda a, b, run=run: np.testing.assert_allclose(a[run], b, rtol=1e-4, atol=1e-4),
            got,
            jax.jit(gradient)(bias),
        )


@in_ci("relu")
def test_training_goes_the_same_way(monkeypatch, name):
    """300 steps, which begin dense and end sparse."""
    monkeypatch.setattr(active, "_SHARE", 5)
    section = saes.by_name(name).Config(d_sae=N, sparsity_coefficient=2.0)
    whole = Config(sae=saes.resolve(section, D), optimizer=OptimizerConfig(learning_rate=3e-3))
    losses = []
    for finds in (True, False):
        monkeypatch.setattr(dense, "worth_finding", lambda n, finds=finds: finds)
        mesh = jax.make_mesh((1, 1, 1), ("run", "data", "model"), devices=jax.devices()[:1])
        with jax.set_mesh(mesh):
            trainer = Trainer(whole, 300, 1.0)
            state = trainer.init(np.zeros(D, np.float32), 1.0)
            run = []
            for step in range(300):
                rows = jax.device_put(sparse_rows(64, seed=step, width=D), BATCH)
                state, metrics = trainer.step(state, rows)
                run.append(metrics["loss"])
        losses.append(np.asarray(run))
    np.testing.assert_allclose(*losses, rtol=1e-5)
