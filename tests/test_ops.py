"""Every operation equals its plain reference, on every mesh, forwards and backwards."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sae_jax import ops
from sae_jax.ops import batch_topk, picked_rows
from sae_jax.ops import sparse as sparse_ops
from sae_jax.ops.sharding import (
    BATCH,
    BATCHED_RUNS,
    DECODER,
    ENCODER,
    PER_LATENT,
    PER_TOKEN,
    per_shard,
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("k", [1, 24, 40])
def test_no_rows(k):
    """Also where the latents are ranked in groups, and decoded in blocks of columns."""
    values, indices = ops.top_k(jnp.zeros((0, 2048)), k)
    assert values.shape == indices.shape == (0, k)
    decoded, _ = ops.sparse_decode(ops.Code(values, indices), None, None, jnp.ones((2048, 3)))
    assert decoded.shape == (0, 3)


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


def test_rows_that_are_ranked_in_parts():
    """As a CPU's threads rank slices of a batch; ties go to the lower latent there too."""
    x = np.round(normal(0, 64, 2048) * 4) / 4
    for got, want in zip(ops.top_k(jnp.asarray(x), 5), jax.lax.top_k(x, 5), strict=True):
        np.testing.assert_array_equal(got, want)


def dense_reference(x, w_enc, b_enc, w_dec, dead, k, aux_k):
    """Reconstruction and auxiliary reconstruction by dense latents and autodiff."""
    pre = x @ w_enc + b_enc

    def pick(pre, k):
        values, indices = jax.lax.top_k(pre, k)
        values = jnp.where(values > -jnp.inf, values, 0.0)
        rows = jnp.arange(pre.shape[0])[:, None]
        return jnp.zeros_like(pre).at[rows, indices].add(values) @ w_dec

    return pick(pre, k), pick(jnp.where(dead, pre, -jnp.inf), aux_k)


def sparse(x, w_enc, b_enc, w_dec, dead, k, aux_k):
    main, aux = ops.encode_top_k(x, w_enc, b_enc, dead, k, aux_k)
    return ops.sparse_decode(main, aux, dead.any(), w_dec)


@pytest.mark.parametrize(
    "dead,k,aux_k,winners",
    [
        ("none", 4, 6, "gathered"),
        ("few", 4, 6, "gathered"),
        ("many", 40, 50, "gathered"),
        pytest.param("few", 4, 6, "searched", marks=pytest.mark.slow),
        pytest.param("many", 40, 50, "searched", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_sparse_autoencoder_equals_dense(monkeypatch, mesh, dead, k, aux_k, winners):
    """winners: how candidates of the shards are compared, which depends on how many there are."""
    if winners == "searched":
        monkeypatch.setattr(sparse_ops, "_FEW_CANDIDATES", 0)
    B, d, n = 8, 5, 64
    share = {"none": 0.0, "few": 0.1, "many": 0.7}[dead]
    is_dead = np.random.default_rng(9).random(n) < share
    arrays = [normal(0, B, d), normal(1, d, n), normal(2, n), normal(3, n, d)]
    # Equal columns in different shards: ties must go to the lower latent on every mesh.
    for array, axis in ((arrays[1], 1), (arrays[2], 0)):
        first, second = [slice(None)] * axis + [slice(0, 8)], [slice(None)] * axis + [slice(40, 48)]
        array[tuple(second)] = array[tuple(first)]
    weights = normal(4, B, d), normal(5, B, d)

    def total(dense_autoencode):
        def loss(*arrays):
            main, aux = dense_autoencode(*arrays, is_dead_here, k, aux_k)
            return (main * weights_here[0]).sum() + (aux * weights_here[1]).sum(), (main, aux)

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)

    is_dead_here, weights_here = is_dead, weights
    with jax.set_mesh(jax.make_mesh((), ())):
        (_, want), want_gradients = total(dense_reference)(*arrays)
    specs = (BATCH, ENCODER, PER_LATENT, DECODER)
    is_dead_here = jax.device_put(is_dead, PER_LATENT)
    weights_here = [jax.device_put(w, BATCH) for w in weights]
    (_, got), got_gradients = jax.jit(total(sparse))(*map(jax.device_put, arrays, specs))
    for a, b in zip((*got, *got_gradients), (*want, *want_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def leaky(pre):
    return jax.nn.leaky_relu(pre, 0.1)


@pytest.mark.parametrize(
    "mesh", [(1, 1), pytest.param((2, 2), marks=pytest.mark.slow)], indirect=True
)
def test_dead_latents_are_decoded_as_by_a_sort(mesh):
    """In float64, forwards and backwards, with fewer dead than are picked and with more: with ties
    between shards, and a latent whose pre-activation is -inf. One program serves every count."""
    B, d, d_out, n, k = 8, 5, 6, 64, 4
    arrays = [normal(0, B, d), normal(1, d, n), normal(2, n), normal(3, n, d_out)]
    arrays[2][3] = -np.inf
    for array, axis in ((arrays[1], 1), (arrays[2], 0)):  # equal in different shards
        first, second = [slice(None)] * axis + [slice(0, 8)], [slice(None)] * axis + [slice(40, 48)]
        array[tuple(second)] = array[tuple(first)]
    weights = normal(4, B, d_out)

    @jax.jit
    def ours(x, w_enc, b_enc, w_dec, dead, weights):
        def loss(*arrays):
            decoded, *_ = ops.decode_dead(leaky, *arrays, dead, k)
            return (decoded * weights).sum(), decoded

        gradients, decoded = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(
            x, w_enc, b_enc, w_dec
        )
        return decoded, *gradients

    x, w_enc, b_enc, w_dec = (a.astype(np.float64) for a in arrays)
    pre = x @ w_enc + b_enc
    pre[:, 40:48] = pre[:, :8]  # equal in float64 too, whose products are added in any order
    placed = [
        jax.device_put(a, spec)
        for a, spec in zip(arrays, (BATCH, ENCODER, PER_LATENT, DECODER), strict=True)
    ]
    orders = [np.r_[0:8, 40:48, 8:40, 48:64], np.random.default_rng(9).permutation(n)]
    for count, order in itertools.product((0, 1, k, k + 1, 12, 8 * k), orders):
        dead = np.isin(np.arange(n), order[:count])
        among_dead = np.where(dead, pre, -np.inf)
        best = np.argsort(-among_dead, axis=1, kind="stable")[:, :k]
        picked = np.zeros((B, n), bool)
        np.put_along_axis(picked, best, True, axis=1)
        picked &= among_dead > -np.inf
        values = np.where(picked, np.maximum(pre, 0.1 * pre), 0.0)
        d_pre = np.where(picked, np.where(pre > 0, 1.0, 0.1) * (weights @ w_dec.T), 0.0)
        want = values @ w_dec, d_pre @ w_enc.T, x.T @ d_pre, d_pre.sum(0), values.T @ weights
        got = ours(*placed, jax.device_put(dead, PER_LATENT), jax.device_put(weights, BATCH))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=f"{count} dead")


def test_gradients_of_the_rest_of_a_loss_are_added_to(mesh):
    """Whether the rest reads the parameters themselves or those that are returned."""
    arrays = normal(1, 5, 64), normal(2, 64), normal(3, 64, 6)
    specs = BATCH, ENCODER, PER_LATENT, DECODER, PER_LATENT
    dead = np.arange(64) % 3 == 0
    x, *parameters, dead = map(jax.device_put, (normal(0, 8, 5), *arrays, dead), specs)

    def loss(parameters, returned):
        decoded, *same = ops.decode_dead(leaky, x, *parameters, dead, 4)
        rest = same if returned else parameters
        return (decoded**2).sum() + sum((a**2).sum() for a in rest)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    for a, b in zip(gradient(parameters, True), gradient(parameters, False), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_dead_latents_of_a_pack_and_with_nan():
    """Each run of a batch of runs has its own; and NaN is picked before any number."""
    B, d, n, k = 8, 5, 64, 4
    x, w_enc, b_enc, w_dec = normal(0, B, d), normal(1, d, n), normal(2, n), normal(3, n, d)
    dead = np.arange(n) < np.array([0, 2, 20])[:, None]

    @jax.jit
    def decode(w_enc, dead):
        return ops.decode_dead(leaky, x, w_enc, b_enc, w_dec, dead, k)[0]

    w = np.stack([w_enc, 2 * w_enc, 3 * w_enc])
    pack = jax.jit(jax.vmap(decode, axis_name=BATCHED_RUNS))
    for got, *run in zip(pack(w, dead), w, dead, strict=True):
        np.testing.assert_allclose(got, decode(*run), rtol=2e-5, atol=2e-5)
    w[2, 0, 7] = np.nan
    assert np.isnan(decode(w[2], dead[2])).all()


def two_codes(product, per_latent):
    """An activation with everything that an architecture may ask for."""
    first = jax.nn.relu(product + per_latent["bias"])
    second = jnp.where(product > 0, product * per_latent["gain"], 0.0)
    sums = {"first": first.sum(axis=0), "squares": (second**2).sum(axis=0)}
    return ops.Activated((first, second), sums, {"tokens": jnp.tanh(first).sum(axis=1)})


@pytest.mark.parametrize("n", [64, 4096 * 4])  # one block a device, and several
@pytest.mark.slow
def test_dense_autoencoder_equals_dense(mesh, n):
    B, d = 8, 5
    bias, gain = normal(2, n), normal(6, n)
    arrays = [normal(0, B, d), normal(1, d, n), {"bias": bias, "gain": gain}, normal(3, n, d)]

    def reference(x, w_enc, per_latent, w_dec):
        out = two_codes(x @ w_enc, per_latent)
        frozen = jax.lax.stop_gradient(w_dec)
        decoded = out.latents[0] @ w_dec, out.latents[1] @ frozen
        return decoded, out.latent_sums, out.token_sums

    def ours(x, *parameters):
        return tuple(ops.dense_autoencode(two_codes, x, *parameters))

    def total(dense_autoencode, weights):
        def loss(x, *parameters):
            out = dense_autoencode(x, *parameters)
            return jax.tree.reduce(
                jnp.add, jax.tree.map(lambda a, w: (a * w).sum(), out, weights)
            ), out

        return jax.value_and_grad(loss, argnums=(1, 2, 3), has_aux=True)

    weights = (
        (normal(4, B, d), normal(5, B, d)),
        {"first": normal(7, n), "squares": normal(8, n)},
        {"tokens": normal(9, B)},
    )
    with jax.set_mesh(jax.make_mesh((), ())):
        (_, want), want_gradients = total(reference, weights)(*arrays)
    placed = jax.tree.map(
        jax.device_put,
        tuple(arrays),
        (BATCH, ENCODER, dict.fromkeys(("bias", "gain"), PER_LATENT), DECODER),
    )
    specs = ((BATCH, BATCH), dict.fromkeys(weights[1], PER_LATENT), {"tokens": PER_TOKEN})
    weights = jax.tree.map(jax.device_put, weights, specs)
    (_, got), got_gradients = jax.jit(total(ours, weights))(*placed)
    for a, b in zip(
        jax.tree.leaves((got, got_gradients)), jax.tree.leaves((want, want_gradients)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=3e-4)


@pytest.mark.parametrize("kind", ["normal", "ties", "few", "none"])
@pytest.mark.parametrize("count", [1, 37, 8 * 64])
@pytest.mark.parametrize(
    "counted", ["plainly", pytest.param("as a large array", marks=pytest.mark.slow)]
)
def test_over_batch_is_a_sort(monkeypatch, mesh, kind, count, counted):
    """Exactly the count largest above 0 in a stable sort, on every mesh; and as it is counted where
    2^31 entries or more may be above a trial threshold."""
    if counted != "plainly":
        monkeypatch.setattr(batch_topk, "_PLAINLY_COUNTED", 0)
    values = np.maximum(normal(3, 8, 64), 0)
    if kind == "ties":
        values = np.round(values)
    elif kind == "few":
        values[np.arange(8 * 64).reshape(8, 64) % 50 > 0] = 0
    elif kind == "none":
        values[:] = 0
    flat = values.reshape(-1)
    order = np.argsort(-flat, kind="stable")[:count]
    order = order[flat[order] > 0]
    want = np.zeros(flat.shape, bool)
    want[order] = True
    placed = jax.device_put(values, jax.P("data", "model"))
    picked, smallest = jax.jit(ops.batch_top_k)(placed, count)
    np.testing.assert_array_equal(picked, want.reshape(values.shape))
    assert float(smallest) == (flat[order].min() if len(order) else np.inf)


@pytest.mark.parametrize("total", [0, 70_000, 2**31 - 2, 2**31 - 1, 2**31, 2**32, 2**33 + 5])
def test_counts_above_int32_stay_at_its_largest(mesh, total):
    """Of 16 tokens and up to 4 shards of the dictionary; in int32 2^32 entries were none."""
    shards = mesh.shape["model"]
    shares = np.random.default_rng(0).dirichlet(np.ones(16 * shards)) * total
    counts = shares.astype(np.int64).reshape(16, shards)
    counts[0, 0] += total - counts.sum()
    placed = jax.device_put(np.minimum(counts, 2**31 - 1).astype(np.int32), P("data", "model"))
    whole = per_shard(lambda c: batch_topk.capped_total(c[:, 0]), (P("data", "model"),), P())
    assert int(jax.jit(whole)(placed)) == min(total, 2**31 - 1)


def test_ties_above_int32_are_kept_in_order(mesh):
    """The first token has 3 ties and each other 2^30, so that those of the fourth token and of all
    after it come after more than int32 holds."""
    counts = np.full((8, mesh.shape["model"]), 2**30 // mesh.shape["model"], np.int32)
    counts[0] = np.arange(mesh.shape["model"]) == 0
    counts[0] *= 3
    placed = jax.device_put(counts, P("data", "model"))
    before = per_shard(
        lambda c: batch_topk.ties_before(c[:, 0])[:, None],
        (P("data", "model"),),
        P("data", "model"),
    )
    want = np.cumsum(counts.reshape(-1).astype(np.int64)).reshape(counts.shape) - counts
    np.testing.assert_array_equal(jax.jit(before)(placed), np.minimum(want, 2**31 - 1))


@pytest.mark.parametrize("ends", [(64,), (2, 6, 14, 64), (16, 32, 64), (5, 64), (63, 64)], ids=str)
@pytest.mark.slow
def test_decode_groups_is_dense_decoding(mesh, ends):
    latents, w_dec, weights = normal(0, 8, 64), normal(1, 64, 5), normal(2, len(ends), 8, 5)

    def reference(latents, w_dec):
        starts = (0, *ends[:-1])
        parts = [latents[:, a:b] @ w_dec[a:b] for a, b in zip(starts, ends, strict=True)]
        return jnp.stack(parts)

    def total(decode, weights):
        def loss(*arrays):
            out = decode(*arrays)
            return (out * weights).sum(), out

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    with jax.set_mesh(jax.make_mesh((), ())):
        (_, want), want_gradients = total(reference, weights)(latents, w_dec)
    latents = jax.device_put(latents, jax.P("data", "model"))
    placed = latents, jax.device_put(w_dec, DECODER)
    weights = jax.device_put(weights, jax.P(None, "data", None))
    ours = total(lambda latents, w_dec: ops.decode_groups(latents, w_dec, ends), weights)
    (_, got), got_gradients = jax.jit(ours)(*placed)
    for a, b in zip((got, *got_gradients), (want, *want_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_strongest_keeps_the_k_largest_of_each_token(mesh, k):
    x, w_enc, b_enc = normal(0, 8, 5), normal(1, 5, 64), normal(2, 64)
    w_enc[:, 40:48], b_enc[40:48] = w_enc[:, :8], b_enc[:8]  # ties
    arrays = (x, w_enc, b_enc, np.eye(64, dtype=np.float32))
    placed = map(jax.device_put, arrays, (BATCH, ENCODER, PER_LATENT, DECODER))

    @jax.jit
    def decoded(x, w_enc, b_enc, identity, k):
        code, _ = ops.encode_top_k(x, w_enc, b_enc, None, 8, 0)
        code = ops.keep_top_k(code._replace(values=jax.nn.relu(code.values)), k, 8)
        return ops.sparse_decode(code, None, None, identity)[0]

    pre = x @ w_enc + b_enc
    want = np.zeros_like(pre)
    order = np.argsort(-pre, axis=1, kind="stable")[:, :k]
    np.put_along_axis(want, order, np.maximum(np.take_along_axis(pre, order, axis=1), 0), axis=1)
    np.testing.assert_allclose(decoded(*placed, k), want, rtol=1e-5, atol=1e-6)


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


def test_gradient_rows_are_added_as_well_at_once_as_by_tokens():
    rng = np.random.default_rng(0)
    terms = [
        (rng.normal(size=(32, k)), rng.integers(0, 20, (32, k)), rng.normal(size=(32, 8)), counts)
        for k, counts in ((6, True), (12, True), (6, False))
    ]
    want = np.zeros((20, 8))
    for coefficients, indices, vectors, counts in terms:
        if counts:
            np.add.at(want, indices, coefficients[:, :, None] * vectors[:, None, :])
    for add in (picked_rows.add_token_by_token, picked_rows._add_at_once):
        got = jax.jit(add)(jnp.zeros((20, 8)), jax.tree.map(jnp.asarray, terms))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
