"""What each shard of the dictionary does for its share of a code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ops import dense_reference, normal

from sae_jax import ops
from sae_jax.ops import shares
from sae_jax.ops.sharding import BATCH, CODE, DECODER, ENCODER, PER_LATENT, per_shard

B, D, N, K = 32, 5, 256, 32


def mesh_of(shards: int):
    return jax.make_mesh((1, 1, shards), ("run", "data", "model"), devices=jax.devices()[:shards])


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.slow
def test_a_packed_code_is_the_code(shards):
    """Forwards and backwards. A code that does not fit is taken as a whole."""

    def reference(*arrays):
        return dense_reference(*arrays, np.zeros(N, bool), K, 1)[0], True

    def ours(x, w_enc, b_enc, w_dec):
        code, _ = ops.encode_top_k(x, w_enc, b_enc, None, K, 0)
        return ops.sparse_decode(code, None, None, w_dec)[0], shares.fits(code)

    def total(autoencode):
        def loss(weights, *arrays):
            decoded, fits = autoencode(*arrays)
            return (decoded * weights).sum(), (decoded, fits)

        return jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3, 4), has_aux=True))

    want, got = total(reference), total(ours)
    parameters = [
        np.concatenate([normal(1, D, N), np.eye(N, dtype=np.float32)]),
        normal(2, N),
        normal(3, N, D),
    ]
    # Tokens of which one shard has every latent: two have several spare rows, all do not fit.
    for uneven, fits in ((0, True), (2, True), (B, False)):
        shift = np.zeros((B, N), np.float32)  # of pre-activations
        shift[:uneven, : N // shards] = 100
        x, weights = np.concatenate([normal(0, B, D), shift], axis=1), normal(4, B, D)
        arrays = (weights, x, *parameters)
        with jax.set_mesh(jax.make_mesh((), ())):
            wanted = want(*arrays)
        with jax.set_mesh(mesh_of(shards)):
            specs = (BATCH, BATCH, ENCODER, PER_LATENT, DECODER)
            ((_, (decoded, packed)), gradients) = got(*map(jax.device_put, arrays, specs))
        assert bool(packed) == fits
        (_, (want_decoded, _)), want_gradients = wanted
        for a, b in zip((decoded, *gradients), (want_decoded, *want_gradients), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("beyond,fits", [(0, True), (1, False)])
def test_a_code_fits_up_to_the_last_spare_row(beyond, fits):
    """A token and shard of 4 have 8 slots and spare rows of 4; for 32 tokens there are 32 rows."""
    counts = np.zeros((B, 4), np.int32)
    counts[3:13, 2] = 20  # 3 rows each, the last of them full
    counts[20, 2] = 13  # 2 rows, the last not full
    counts[31, 2] = 8 + beyond
    counts[:, 0] = 8
    used = np.arange(K) < counts[:, :, None]
    values = np.where(used, normal(0, B, 4, K), 0).reshape(B, -1)
    indices = np.random.default_rng(1).integers(0, N // 4, values.shape).astype(np.int32)

    def restored(code):
        slots = jnp.zeros(code.values.shape), jnp.zeros(code.values.shape, jnp.int32)
        for part in shares.pack(code):
            slots = part.set_slots(slots[0], part.values), part.set_slots(slots[1], part.indices)
        return slots

    with jax.set_mesh(mesh_of(4)):
        code = shares.Code(*(jax.device_put(a, CODE) for a in (values, indices, counts)))
        assert bool(jax.jit(shares.fits)(code)) == fits
        got = jax.jit(per_shard(restored, (CODE,), CODE))(code)
    if fits:
        np.testing.assert_array_equal(got[0], values)
        np.testing.assert_array_equal(
            *(np.where(used.reshape(B, -1), a, 0) for a in (got[1], indices))
        )


@pytest.mark.parametrize("k", [32, 64, 100])
def test_work_falls_with_the_shards(k):
    """At 8 shards a shard has at most 1.5 / 8 of the slots that one device has."""
    mesh = jax.sharding.AbstractMesh((1, 1, 8), ("run", "data", "model"))
    tokens, slots = 1024, []

    def count(kept):
        empty = jnp.zeros(kept.shape)
        parts = shares.pack(shares.Code(empty, empty.astype(int), shares.used_slots(kept)))
        slots.append(sum(part.values.size for part in parts))
        return kept

    sharding = jax.NamedSharding(mesh, CODE)
    kept = jax.ShapeDtypeStruct((tokens, 8 * k), bool, sharding=sharding)
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(per_shard(count, (CODE,), CODE), kept)
    assert slots[0] <= 1.5 / 8 * tokens * k
