"""With products of bfloat16 nothing but their operands is rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import NamedSharding
from test_sae import controls, data, every_case_quickly, loss_of, parameters_of, resolved

import sae_jax
from sae_jax.bench.step import bench_config
from sae_jax.ops import dense, products
from sae_jax.ops.sharding import BATCH, CODE, ENCODER
from sae_jax.sae import ARCHITECTURES
from sae_jax.train.mesh import make_mesh
from sae_jax.train.step import Trainer

SUMS = ("add_any", "reduce_sum", "cumsum", "scatter-add", "psum", "psum_invariant", "reduce_max")
"""What must not be of bfloat16."""


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def half(a):
    """The values of an array in bfloat16, as float32."""
    return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)  # of a ClosedJaxpr
                if isinstance(inner, core.Jaxpr):
                    yield from equations(inner)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_masters_moments_and_sums_are_float32(name, monkeypatch):
    """Of the program of an accelerator, as it is traced: all large products are of bfloat16 on both
    sides, also those of gradients, and every sum is of float32."""
    for module in (dense, products):
        monkeypatch.setattr(module, "on_cpu", lambda: False)
    tokens, d = 128, 64
    config = bench_config(name, tokens, d, 256, 4, "bfloat16", 1)
    trainer = Trainer(config, steps=10, variance=1.0)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        state = trainer.abstract()
        rows = jax.ShapeDtypeStruct((tokens, d), jnp.float32, sharding=NamedSharding(mesh, BATCH))
        traced = jax.make_jaxpr(trainer.update)(state, rows)
        after, _ = jax.eval_shape(trainer.update, state, rows)
    for a in jax.tree.leaves((state, after)):
        assert a.dtype in (jnp.float32, jnp.int32)
    large = 0
    for equation in equations(traced.jaxpr):
        types = [v.aval.dtype for v in equation.invars]
        if equation.primitive.name in SUMS:
            assert jnp.bfloat16 not in types
        if equation.primitive.name == "dot_general":
            assert equation.outvars[0].aval.dtype == jnp.float32
            if min(v.aval.size for v in equation.invars) > 1024:
                assert types == [jnp.bfloat16, jnp.bfloat16]
                large += 1
    assert large >= (1 if name == "topk" else 5)


def test_products_and_their_gradients_are_of_rounded_operands(mesh):
    """As in float64, but for float32's rounding; the gradient of nothing that nobody asks for."""
    x, w, d = normal(0, 16, 24), normal(1, 24, 32), normal(2, 16, 32)

    @jax.jit
    def run(x, w):
        out, pull = jax.vjp(lambda x, w: products.product(x, w, jnp.bfloat16, CODE), x, w)
        return out, *pull(jax.device_put(d, CODE))

    found = run(jax.device_put(x, BATCH), jax.device_put(w, ENCODER))
    x, w, d = (half(a).astype(np.float64) for a in (x, w, d))
    for got, want in zip(found, (x @ w, d @ w.T, x.T @ d), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@every_case_quickly("topk", "batchtopk", "jumprelu")
def test_values_and_thresholds_are_not_rounded(name):
    """Where inputs and encoder are of bfloat16 already, so that nothing is lost of them, everything
    before the decoder is what it is in float32."""
    x, y = data(resolved(name))
    found = []
    for dtype in ("float32", "bfloat16"):
        config = resolved(name, compute_dtype=dtype)
        parameters = parameters_of(config)
        parameters |= {"w_enc": jnp.asarray(half(parameters["w_enc"]))}
        parameters |= {"b_dec": jnp.zeros_like(parameters["b_dec"])}
        losses = jax.jit(loss_of(config, jnp.asarray(half(x)), y, controls(config)))(parameters)
        found.append((losses.l0, losses.l1, losses.fired, losses.running))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *found)


def test_encode_agrees_with_training_and_files_hold_float32(tmp_path):
    """`encode` computes in float32 whatever training did; what training rounds is bounded by 2^-9
    of each factor."""
    d, n = 32, 64
    sae = sae_jax.TopK(d_in=d, d_sae=n, k=4, compute_dtype="bfloat16", rngs=1)
    x = normal(3, 128, d)
    exact = sae.preactivations(jnp.asarray(x))
    bound = 2.01 * 2.0**-9 * np.abs(x) @ np.abs(np.asarray(sae.w_enc[...])) + 1e-6
    assert (np.abs(sae.scaled_preactivations(jnp.asarray(x)) - exact) <= bound).all()

    sae.save(tmp_path / "sae")
    loaded = sae_jax.load(tmp_path / "sae")
    assert loaded.config.compute_dtype == "bfloat16"
    full = sae_jax.TopK(d_in=d, d_sae=n, k=4, parameters=loaded.parameters())
    for name, value in loaded.parameters().items():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, sae.parameters()[name])
    np.testing.assert_array_equal(loaded.encode(x), full.encode(x))
