"""What a TPU runs of the top-k step, run step by step on CPUs: it equals its plain reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from test_ops import dense_reference, normal, sparse

from sae_jax.ops import picked_rows, tpu_encoder, tpu_memory, tpu_rows
from sae_jax.ops import sparse as sparse_ops
from sae_jax.ops.sharding import BATCH, DECODER, ENCODER, PER_LATENT


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    """Programs are traced as for a TPU, and their kernels work on small blocks, of any dtype."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    for module in (sparse_ops, picked_rows):
        monkeypatch.setattr(module, "on_tpu", lambda: True)
    monkeypatch.setattr(tpu_encoder, "_DTYPE", jnp.float32)
    monkeypatch.setattr(tpu_memory, "capacity", lambda: 64 * 2**20)
    small = {
        tpu_encoder: {
            "_TOKENS": (8, 4),
            "_COLUMNS": 16,
            "_BINS": 8,
            "_LANES": 4,
            "_REDONE": 3,
            "_DOUBTFUL": 0.3,
        },
        tpu_rows: {"_TILE": 8, "_CHUNK": 8, "_LANES": 4, "_SUBLANES": 2},
    }
    for module, sizes in small.items():
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize(
    "k",
    [
        pytest.param(1, marks=pytest.mark.long),
        pytest.param(4, marks=pytest.mark.slow),
        pytest.param(10, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "few finite", "NaN"])
def test_encoded_is_the_top_k(as_on_a_tpu, kind, k):
    B, d, n = 24, 8, 128
    x, w, b = normal(0, B, d), normal(1, d, n), normal(2, n)
    if kind == "ties":
        x, w, b = np.round(x), np.round(w), np.round(b)
    elif kind == "equal":
        x[:8] = 0
        b[:] = 1
    elif kind == "few finite":
        b[3:] = -np.inf
    elif kind == "NaN":
        x[5, 2] = np.nan
        w[:, 70] = np.where(np.arange(d) == 3, np.inf, w[:, 70])
    assert tpu_encoder.fits(B, d, n, k, jnp.float32)
    got = jax.jit(functools.partial(tpu_encoder.encode, k=k))(x, w, b)
    values, indices = jax.lax.top_k(x @ w + b, k)
    finite = np.isfinite(values)
    np.testing.assert_allclose(got[0], values, rtol=1e-5, atol=1e-5)
    if kind != "NaN":
        np.testing.assert_array_equal(np.where(finite, got[1], 0), np.where(finite, indices, 0))


@pytest.mark.parametrize("k,n,rows,d", [(64, 131_072, 16_384, 4096), (1, 8192, 512, 128)])
def test_shapes_that_fit(k, n, rows, d, monkeypatch):
    """Ragged ones, and those whose lists are too long, are encoded plainly."""
    monkeypatch.setattr(tpu_memory, "capacity", lambda: 64 * 2**20)
    assert tpu_encoder.fits(rows, d, n, k, jnp.bfloat16)
    assert not tpu_encoder.fits(rows, d, n, k, jnp.float32)
    assert not tpu_encoder.fits(rows - 1, d, n, k, jnp.bfloat16)
    assert not tpu_encoder.fits(rows, d + 1, n, k, jnp.bfloat16)
    assert not tpu_encoder.fits(rows, d, n - 1, k, jnp.bfloat16)
    assert not tpu_encoder.fits(rows, d, n, n, jnp.bfloat16)
    assert not tpu_encoder.fits(0, d, n, k, jnp.bfloat16)


@pytest.mark.parametrize(
    "mib,encoded,added", [(16, 1024, 2048), (64, 8192, 8192), (128, 8192, 16_384)]
)
def test_kernels_fit_in_a_core(monkeypatch, mib, encoded, added):
    """Of a v4, a v5p and a v6e. Wider inputs and vectors than these are not given to kernels."""
    monkeypatch.setattr(tpu_memory, "capacity", lambda: mib * 2**20)

    def adds(d):
        return tpu_rows.fits(1024, jax.ShapeDtypeStruct((512, d), jnp.float32), 1024)

    def encodes(d):
        return tpu_encoder.fits(512, d, 131_072, 64, jnp.bfloat16)

    widths = [1024 * 2**i for i in range(6)]
    assert max(filter(encodes, widths)) == encoded
    assert max(filter(adds, widths)) == added


@pytest.mark.parametrize(
    "picked,dtype",
    [
        ("evenly", jnp.bfloat16),
        ("a few by all", jnp.float32),
        ("none of most tiles", jnp.float32),
    ],
)
@pytest.mark.slow
def test_rows_are_visited_once(as_on_a_tpu, picked, dtype):
    """Sums and products, of latents that share a chunk and of those that fill many."""
    B, k, d, n = 32, 4, 16, 64
    random = np.random.default_rng(0)
    least, most = {"evenly": (0, n), "a few by all": (21, 26), "none of most tiles": (60, 64)}[
        picked
    ]
    indices = np.stack([least + random.permutation(most - least)[:k] for _ in range(B)])
    values, vectors, rows = normal(1, B, k), normal(2, B, d), normal(3, n, d)
    vectors = np.asarray(jnp.asarray(vectors, dtype))
    order = np.argsort(indices.reshape(-1), kind="stable")
    latents, tokens = indices.reshape(-1)[order].astype(np.int32), (order // k).astype(np.int32)
    picks = latents, tokens, values.reshape(-1)[order], vectors
    exact = vectors.astype(np.float64)[tokens]
    want = np.zeros((n, d))
    np.add.at(want, latents, picks[2].astype(np.float64)[:, None] * exact)

    sums, products = jax.jit(tpu_rows.row_sums_and_products)(*picks, rows)
    np.testing.assert_allclose(sums, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(products, (exact * rows[latents]).sum(axis=1), rtol=1e-5, atol=1e-5)
    flipped = jax.jit(functools.partial(tpu_rows.row_sums, n=n, transposed=True))(*picks)
    np.testing.assert_allclose(flipped.T, want, rtol=1e-5, atol=1e-5)


def compared(arrays, dead, weights, k, aux_k, autoencode):
    """Returns both reconstructions and the gradients of a loss of them."""

    def loss(*arrays):
        main, aux = autoencode(*arrays, dead, k, aux_k)
        return (main * weights[0]).sum() + (aux * weights[1]).sum(), (main, aux)

    (_, out), gradients = jax.value_and_grad(loss, argnums=(1, 2, 3), has_aux=True)(*arrays)
    return *out, *gradients


@pytest.mark.parametrize(
    "dead,kernels",
    [
        (0.3, True),
        pytest.param(0.0, True, marks=pytest.mark.long),
        pytest.param(0.3, False, marks=pytest.mark.long, id="shapes without kernels"),
    ],
)
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param((2, 2), marks=pytest.mark.slow),
        *(pytest.param(m, marks=pytest.mark.long) for m in ((1, 1), (4, 1), (1, 4))),
    ],
    indirect=True,
)
def test_sparse_autoencoder_equals_dense(as_on_a_tpu, mesh, dead, kernels):
    B, d, n, k, aux_k = 32, 16 if kernels else 5, 512, 4, 6
    is_dead = np.random.default_rng(9).random(n) < dead
    arrays = [normal(0, B, d), normal(1, d, n), normal(2, n), normal(3, n, d)]
    # Equal columns in different shards: ties must go to the lower latent on every mesh.
    for array, axis in ((arrays[1], 1), (arrays[2], 0)):
        first, second = [slice(None)] * axis + [slice(0, 8)], [slice(None)] * axis + [slice(-8, n)]
        array[tuple(second)] = array[tuple(first)]
    weights = normal(4, B, d), normal(5, B, d)
    with jax.set_mesh(jax.make_mesh((), ())):
        want = compared(arrays, is_dead, weights, k, aux_k, dense_reference)
    placed = map(jax.device_put, arrays, (BATCH, ENCODER, PER_LATENT, DECODER))
    is_dead = jax.device_put(is_dead, PER_LATENT)
    weights = [jax.device_put(w, BATCH) for w in weights]
    got = jax.jit(lambda *a: compared(a, is_dead, weights, k, aux_k, sparse))(*placed)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.long
def test_a_pack_is_its_runs(as_on_a_tpu):
    """Runs that are trained as one program get what each gets by itself."""
    B, d, n, k = 16, 16, 128, 4
    x = jnp.asarray(normal(0, B, d))
    runs = normal(1, 2, d, n), normal(2, 2, n), normal(3, 2, n, d)
    weights, dead = (normal(4, B, d), normal(5, B, d)), jnp.zeros(n, bool)

    def one(*parameters):
        return compared((x, *parameters), dead, weights, k, 6, sparse)

    together = jax.jit(jax.vmap(one))(*runs)
    alone = [jax.jit(one)(*(a[run] for a in runs)) for run in range(2)]
    for a, *b in zip(together, *alone, strict=True):
        np.testing.assert_allclose(a, np.stack(b), rtol=2e-5, atol=2e-5)
