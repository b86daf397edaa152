"""The kernels for GPUs, interpreted, equal their references; so does what is built on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import ops
from sae_jax.ops import gpu_rows, gpu_select, picked_rows, topk


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rows_of_a_kind(kind, n):
    x = normal(n, 3, n)
    if kind == "ties":
        x = np.round(x * 2) / 2
    elif kind == "equal":
        x[:] = -0.5
    elif kind == "few_finite":
        x[:, 1:] = -np.inf
    elif kind == "nan":
        x[0, n // 2], x[1, n // 3], x[2, -1] = np.nan, np.inf, -np.inf
    return x


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "few_finite", "nan"])
@pytest.mark.parametrize("n,k", [(1, 1), (64, 64), (100, 7)])
def test_places_are_those_of_lax_top_k(kind, n, k):
    x = jnp.asarray(rows_of_a_kind(kind, n))
    places = gpu_select.places_of_top_k(x, k, interpret=True)
    np.testing.assert_array_equal(places, jnp.sort(jax.lax.top_k(x, k)[1], axis=1))


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Programs are traced as for a GPU, and its kernels are interpreted."""
    for module in (topk, picked_rows):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    for module, name in ((gpu_select, "places_of_top_k"), (gpu_rows, "row_sums")):
        kernel = functools.partial(getattr(module, name), interpret=True)
        monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(gpu_rows, "_PIECE", 4)


@pytest.mark.parametrize("most", [64, gpu_select.MOST])
@pytest.mark.parametrize("kind", ["normal", "ties", "few_finite"])
def test_top_k_is_lax_top_k(as_on_gpu, monkeypatch, kind, most):
    """Also where groups must be larger, or a row is too long for the kernel."""
    monkeypatch.setattr(gpu_select, "MOST", most)
    x = jnp.asarray(rows_of_a_kind(kind, 2100))
    for k in (2, 40):
        values, indices = ops.top_k(x, k)
        want_values, want_indices = jax.lax.top_k(x, k)
        finite = np.isfinite(want_values)
        np.testing.assert_array_equal(values, want_values)
        np.testing.assert_array_equal(indices * finite, want_indices * finite)


def picks(kind, B, k, n):
    indices = np.random.default_rng(1).integers(0, n, (B, k))
    if kind == "one latent":
        indices[:] = 2
    elif kind == "skewed":
        indices[:, 0], indices[: B // 2, 1] = n - 1, 0
    return indices.astype(np.int32)


@pytest.mark.parametrize("kind", ["even", "one latent", "skewed"])
@pytest.mark.parametrize("d,columns", [(128, 4096), (200, 4096), (200, 128)])
def test_rows_are_sums_of_picks(monkeypatch, kind, d, columns):
    monkeypatch.setattr(gpu_rows, "_PIECE", 4)
    monkeypatch.setattr(gpu_rows, "_MOST_COLUMNS", columns)
    B, k, n = 9, 3, 7
    indices, coefficients = picks(kind, B, k, n), normal(2, B, k)
    vectors, rows = jnp.asarray(normal(3, B, d), jnp.bfloat16), normal(4, n, d)
    sums, products = gpu_rows.row_sums(
        jnp.asarray(coefficients), jnp.asarray(indices), vectors, n, rows, interpret=True
    )
    exact = np.asarray(vectors, np.float64)
    want = np.zeros((n, d))
    np.add.at(want, indices, coefficients[:, :, None] * exact[:, None])
    np.testing.assert_allclose(sums, want, rtol=1e-5, atol=1e-5)
    want = np.einsum("bd,bkd->bk", exact, rows.astype(np.float64)[indices])
    np.testing.assert_allclose(products, want, rtol=1e-5, atol=1e-4)


def test_runs_of_a_pack_have_rows_of_their_own(monkeypatch):
    """Under `jax.vmap`."""
    monkeypatch.setattr(gpu_rows, "_PIECE", 4)
    coefficients, vectors = normal(2, 2, 6, 2), normal(3, 2, 6, 128)
    indices = np.stack([picks("even", 6, 2, 5), picks("skewed", 6, 2, 5)])
    one = functools.partial(gpu_rows.row_sums, n=5, interpret=True)
    got, _ = jax.vmap(one)(coefficients, indices, vectors)
    for run in range(2):
        want = np.zeros((5, 128))
        terms = coefficients[run, :, :, None] * vectors[run][:, None].astype(np.float64)
        np.add.at(want, indices[run], terms)
        np.testing.assert_allclose(got[run], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "d, share",
    [(5, 0.3), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(5, 0), (128, 0.3)])],
)
def test_sparse_autoencoder_equals_dense(as_on_gpu, d, share):
    """Both codes, decoded, and all gradients. Rows of 5 have no kernel."""
    B, n, k, aux_k = 6, 64, 4, 5
    dead = np.random.default_rng(9).random(n) < share
    arrays = [normal(0, B, d), normal(1, d, n) / d**0.5, normal(2, n), normal(3, n, d)]
    weights = normal(4, B, d), normal(5, B, d)

    def ours(x, w_enc, b_enc, w_dec):
        main, aux = ops.encode_top_k(x, w_enc, b_enc, dead, k, aux_k)
        return ops.sparse_decode(main, aux, jnp.asarray(dead.any()), w_dec)

    def reference(x, w_enc, b_enc, w_dec):
        pre = x @ w_enc + b_enc
        return _pick(pre, k) @ w_dec, _pick(jnp.where(dead, pre, -jnp.inf), aux_k) @ w_dec

    def total(function):
        def loss(*arrays):
            main, aux = function(*arrays)
            return (main * weights[0]).sum() + (aux * weights[1]).sum(), (main, aux)

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)

    got, want = jax.jit(total(ours))(*arrays), total(reference)(*arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-5)


def _pick(pre, k):
    values, indices = jax.lax.top_k(pre, k)
    values = jnp.where(values > -jnp.inf, values, 0.0)
    return jnp.zeros_like(pre).at[jnp.arange(len(pre))[:, None], indices].add(values)
