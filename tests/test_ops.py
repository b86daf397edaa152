"""Every operation equals its plain reference, on every mesh, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import ops
from sae_jax.ops.mesh import BATCH, DECODER, ENCODER, PER_LATENT


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("n", [1, 15, 16, 100, 1024, 1000])
@pytest.mark.parametrize("k", [1, 3, 32])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "few_finite"])
def test_top_k_is_lax_top_k(n, k, kind):
    k = min(k, n)
    x = normal(n + k, 7, n)
    if kind == "ties":
        x = np.round(x * 2) / 2
    elif kind == "equal":
        x[:] = 0.5
    elif kind == "few_finite":
        x[:, 1:] = -np.inf
    values, indices = ops.top_k(jnp.asarray(x), k)
    want_values, want_indices = jax.lax.top_k(x, k)
    finite = np.isfinite(want_values)
    np.testing.assert_array_equal(values, want_values)
    np.testing.assert_array_equal(np.where(finite, indices, 0), np.where(finite, want_indices, 0))
    assert np.all((0 <= indices) & (indices < n))


def dense_reference(x, shift, w_enc, b_enc, w_dec, dead, k, aux_k):
    """Reconstruction and auxiliary reconstruction by dense latents and autodiff."""
    pre = (x - shift) @ w_enc + b_enc

    def pick(pre, k):
        values, indices = jax.lax.top_k(pre, k)
        values = jnp.where(values > -jnp.inf, values, 0.0)
        rows = jnp.arange(pre.shape[0])[:, None]
        return jnp.zeros_like(pre).at[rows, indices].add(values) @ w_dec

    return pick(pre, k), pick(jnp.where(dead, pre, -jnp.inf), aux_k)


def sparse(x, shift, w_enc, b_enc, w_dec, dead, k, aux_k):
    main, aux = ops.encode_top_k(x, shift, w_enc, b_enc, dead, k, aux_k)
    return ops.sparse_decode(main, aux, dead.any(), w_dec)


@pytest.mark.parametrize("dead,k,aux_k", [("none", 4, 6), ("few", 4, 6), ("many", 40, 50)])
def test_sparse_autoencoder_equals_dense(mesh, dead, k, aux_k):
    B, d, n = 8, 5, 64
    share = {"none": 0.0, "few": 0.1, "many": 0.7}[dead]
    is_dead = np.random.default_rng(9).random(n) < share
    arrays = [normal(0, B, d), normal(6, d), normal(1, d, n), normal(2, n), normal(3, n, d)]
    # Equal columns in different shards: ties must go to the lower latent on every mesh.
    for array, axis in ((arrays[2], 1), (arrays[3], 0)):
        first, second = [slice(None)] * axis + [slice(0, 8)], [slice(None)] * axis + [slice(40, 48)]
        array[tuple(second)] = array[tuple(first)]
    weights = normal(4, B, d), normal(5, B, d)

    def total(autoencode):
        def loss(*arrays):
            main, aux = autoencode(*arrays, is_dead_here, k, aux_k)
            return (main * weights_here[0]).sum() + (aux * weights_here[1]).sum(), (main, aux)

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)

    is_dead_here, weights_here = is_dead, weights
    with jax.set_mesh(jax.make_mesh((), ())):
        (_, want), want_gradients = total(dense_reference)(*arrays)
    specs = (BATCH, jax.P(None), ENCODER, PER_LATENT, DECODER)
    is_dead_here = jax.device_put(is_dead, PER_LATENT)
    weights_here = [jax.device_put(w, BATCH) for w in weights]
    (_, got), got_gradients = jax.jit(total(sparse))(*map(jax.device_put, arrays, specs))
    for a, b in zip((*got, *got_gradients), (*want, *want_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("n", [64, 4096 * 4])  # one block a device, and several
def test_relu_autoencoder_equals_dense(mesh, n):
    arrays = [normal(0, 8, 5), normal(1, 5, n), normal(2, n), normal(3, n, 5)]
    weights = normal(4, 8, 5), normal(5, n)

    def reference(x, w_enc, b_enc, w_dec):
        latents = jax.nn.relu(x @ w_enc + b_enc)
        return latents @ w_dec, latents.sum(axis=0), (latents > 0).sum(axis=0)

    def total(autoencode, weights):
        def loss(x, *parameters):
            out = autoencode(x, *parameters)
            return (out[0] * weights[0]).sum() + (out[1] * weights[1]).sum(), out

        return jax.value_and_grad(loss, argnums=(1, 2, 3), has_aux=True)

    with jax.set_mesh(jax.make_mesh((), ())):
        (_, want), want_gradients = total(reference, weights)(*arrays)
    placed = map(jax.device_put, arrays, (BATCH, ENCODER, PER_LATENT, DECODER))
    weights = [jax.device_put(w, s) for w, s in zip(weights, (BATCH, PER_LATENT), strict=True)]
    (_, got), got_gradients = jax.jit(total(ops.relu_autoencode, weights))(*placed)
    for a, b in zip((*got, *got_gradients), (*want, *want_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=3e-4)


def test_fired_latents(mesh):
    values = np.zeros((8, 4), np.float32)
    indices = np.arange(32, dtype=np.int32).reshape(8, 4)
    values[3, 2] = 0.5
    values[5, 0] = -1.0
    shards = mesh.shape["model"]
    # One shard's slots are what it has; the others' hold nothing.
    values = np.concatenate([values] + [np.zeros_like(values)] * (shards - 1), axis=1)
    indices = np.concatenate([indices % (64 // shards)] * shards, axis=1)
    code = ops.Code(*(jax.device_put(a, jax.P("data", "model")) for a in (values, indices)))
    fired = np.asarray(ops.fired_latents(code, 64))
    assert np.flatnonzero(fired).tolist() == [14 % (64 // shards)]
