"""Encodes to k latents a token and decodes from them, without a dense (B, d_sae) gradient.

Every shard of the dictionary has k slots a token. A slot whose latent is not among the global top k
has the value 0. What is done for every slot is done for a shard's share of them (`ops.shares`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sae_jax.ops import tpu_encoder
from sae_jax.ops.kth_largest import kth_largest, sort_keys
from sae_jax.ops.picked_rows import (
    copy_for_gathers,
    decode_gradients,
    scatter_rows,
    sum_weighted_rows,
)
from sae_jax.ops.products import encoder_operand
from sae_jax.ops.sharding import (
    BATCH,
    CODE,
    DECODER,
    ENCODER,
    PER_LATENT,
    branch,
    gather_last,
    in_any_run,
    matmul_f32,
    on_cpu,
    on_tpu,
    per_shard,
    psum,
    shard_count,
    shard_index,
)
from sae_jax.ops.shares import Code, fits, in_parts, used_slots
from sae_jax.ops.topk import top_k

_CPU_SLICE_ROWS = 256  # tokens whose pre-activations stay in a CPU's cache
_SLICE_BYTES = 2**30  # the most bytes of pre-activations at once on other devices
_FEW_CANDIDATES = 256  # up to so many candidates of a token over all shards are gathered


# ---------------------------------------------------------------------------------- encode


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def encode_top_k(x, w_enc, b_enc, dead, k: int, aux_k: int, compute_dtype=jnp.float32):
    """Returns the top k of `x @ w_enc + b_enc` for each token, and the top aux_k among dead
    latents.

    Both come from one pass over the pre-activations. The result is exact and independent of the
    mesh: ties go to the lower latent.

    Args:
      x: inputs (B, d_in).
      w_enc: the encoder (d_in, d_sae).
      b_enc: its bias (d_sae,).
      dead: which latents are dead (d_sae,) bool, or None for no auxiliary code. Where no latent is
        dead the auxiliary code is zero and costs nothing.
      k: latents that are picked for each token.
      aux_k: dead latents that are picked for each token. Where fewer are dead, the rest have the
        value 0.
      compute_dtype: the dtype of the matmul's operands. It accumulates in float32.

    Returns:
      The Code of pre-activations, and the auxiliary Code or None.
    """
    return _encode_forward(x, w_enc, b_enc, dead, k, aux_k, compute_dtype)[0]


def _encode_forward(x, w_enc, b_enc, dead, k, aux_k, compute_dtype):
    any_dead = None if dead is None else in_any_run(dead.any())

    def local(x, w_enc, b_enc, dead, any_dead):
        w = encoder_operand(w_enc, compute_dtype)

        def encode_slice(x_slice):
            product_BxN = matmul_f32(x_slice.astype(compute_dtype), w)
            main = _candidates(product_BxN, b_enc, k)
            if dead is None:
                return main, None
            return main, jax.lax.cond(
                any_dead,
                lambda: _candidates(product_BxN, jnp.where(dead, b_enc, -jnp.inf), aux_k),
                lambda: _empty_candidates(x_slice.shape[0], aux_k),
            )

        def encode_dead(x):
            def encode_slice(x_slice):
                product_BxN = matmul_f32(x_slice.astype(compute_dtype), w)
                return _candidates(product_BxN, jnp.where(dead, b_enc, -jnp.inf), aux_k)

            return jax.lax.cond(
                any_dead,
                lambda: _in_batch_slices(encode_slice, x, n),
                lambda: _empty_candidates(len(x), aux_k),
            )

        n = w_enc.shape[1]
        if on_tpu() and tpu_encoder.fits(len(x), *w_enc.shape, k, compute_dtype):
            main = tpu_encoder.encode(x.astype(compute_dtype), w, b_enc, k)
            aux = None if dead is None else encode_dead(x)
        else:
            main, aux = _in_batch_slices(encode_slice, x, n)
        code, kept = _keep_winners(*main, n)
        winners = code._replace(counts=used_slots(kept)), kept
        if aux is None:
            return winners, None
        none = Code(jnp.zeros_like(aux[0]), aux[1]), jnp.zeros(aux[0].shape, bool)
        return winners, branch(any_dead, lambda: _keep_winners(*aux, n), lambda: none)

    specs = (BATCH, ENCODER, PER_LATENT, PER_LATENT, P())
    codes, kept = _transpose_pairs(per_shard(local, specs, CODE)(x, w_enc, b_enc, dead, any_dead))
    slots = [code and code._replace(values=None) for code in codes]
    return codes, (x, w_enc, b_enc, any_dead, slots, kept)


def _encode_backward(k, aux_k, compute_dtype, saved, cotangents):
    x, w_enc, b_enc, any_dead, slots, kept = saved
    main, aux = (
        slot and slot._replace(values=jnp.where(mask, code.values, 0.0))
        for slot, mask, code in zip(slots, kept, cotangents, strict=True)
    )
    packs = fits(main)

    def weights(x, w_enc, any_dead, main, aux, packs):
        n = w_enc.shape[1]
        vectors = copy_for_gathers(x, compute_dtype)

        def gradients(parts):
            terms = [(p.values, p.indices, p.of_tokens(vectors), True) for p in parts]
            if aux is not None:
                terms.append((aux.values, aux.indices, vectors, any_dead))
            d_b = sum(jnp.zeros(n, jnp.float32).at[i].add(d) for d, i, *_ in terms)
            return scatter_rows(terms, n, transposed=True), d_b

        d_w, d_b = in_parts(main, packs, gradients)
        return psum(d_w, "data"), psum(d_b, "data")

    def inputs(w_enc, main, aux, packs):
        d_x = _decode(main, packs, w_enc.T)
        if aux is not None:
            d_x += sum_weighted_rows(aux.values, aux.indices, w_enc.T)
        return psum(d_x, "model")

    specs = (CODE, CODE, P())
    d_w, d_b = per_shard(weights, (BATCH, ENCODER, P(), *specs), (ENCODER, PER_LATENT))(
        x, w_enc, any_dead, main, aux, packs
    )
    # XLA drops this where x is data and nobody asks.
    d_x = per_shard(inputs, (ENCODER, *specs), BATCH)(w_enc, main, aux, packs)
    return d_x.astype(x.dtype), d_w.astype(w_enc.dtype), d_b.astype(b_enc.dtype), None


encode_top_k.defvjp(_encode_forward, _encode_backward)


def _candidates(product_BxN, bias_N, k: int):
    """Returns this shard's k largest values, -inf where it has fewer, and their indices.

    Without a bias it is None.
    """
    n = product_BxN.shape[1]
    values, indices = top_k(product_BxN, min(k, n), bias_N)
    spare = ((0, 0), (0, max(0, k - n)))
    return jnp.pad(values, spare, constant_values=-jnp.inf), jnp.pad(indices, spare)


def _empty_candidates(rows: int, k: int):
    """Returns candidates of which none counts."""
    return jnp.full((rows, k), -jnp.inf), jnp.zeros((rows, k), jnp.int32)


def _keep_winners(values_Bxk, indices_Bxk, n: int):
    """Returns this shard's part of the global code, and which of its slots are in it; n is the
    number of latents of a shard.
    """
    kept = _wins_globally(values_Bxk, indices_Bxk, n) & (values_Bxk != -jnp.inf)
    return Code(jnp.where(kept, values_Bxk, 0.0), indices_Bxk), kept


def _transpose_pairs(pairs):
    """Turns (code, mask) of the main and the auxiliary code into (codes, masks)."""
    main, aux = pairs
    if aux is None:
        return (main[0], None), (main[1], None)
    return (main[0], aux[0]), (main[1], aux[1])


def _in_batch_slices(function, x_Bxd, n: int):
    """Applies `function` to slices of the batch, so that (B, d_sae) never exists as a whole."""
    rows = x_Bxd.shape[0]
    limit = _CPU_SLICE_ROWS if on_cpu() else max(1, _SLICE_BYTES // (4 * n))
    if rows <= limit:
        return function(x_Bxd)
    whole = rows - rows % limit
    parts = [jax.lax.map(function, x_Bxd[:whole].reshape(-1, limit, x_Bxd.shape[1]))]
    parts[0] = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), parts[0])
    if whole < rows:
        parts.append(function(x_Bxd[whole:]))
    return jax.tree.map(lambda *slices: jnp.concatenate(slices), *parts)


def _wins_globally(values_Bxk, indices_Bxk, n: int):
    """Returns which of this shard's k candidates are among the k largest over all shards, (B, k).

    Ties go to the lower latent. Candidates are in order of (value, index).
    """
    k, shards = values_Bxk.shape[1], shard_count("model")
    if shards == 1:
        return jnp.ones(values_Bxk.shape, bool)
    if k * shards > _FEW_CANDIDATES:
        return _wins_by_search(values_Bxk, indices_Bxk + shard_index("model") * n, n * shards)
    # Shards are in order of their latents, so that here too ties go to the lower one.
    _, winners = jax.lax.top_k(gather_last(values_Bxk, "model"), k)
    mine = winners // k == shard_index("model")
    return jnp.arange(k) < mine.sum(axis=1, keepdims=True)  # a shard's winners are its first ones


def _wins_by_search(values_Bxk, latents_Bxk, d_sae: int):
    """Returns the same as `_wins_globally` without gathering candidates, which grow with the
    shards.

    What is summed over `model` are counts. 8 rounds, of 60 bytes a token each, find the k-th
    largest value. One round for every 4 bits of d_sae then finds the last latent to win among equal
    values.
    """
    tokens, k = values_Bxk.shape

    def counter(keys_Bxk):
        def count(tried_BxT):
            return psum((keys_Bxk[:, :, None] >= tried_BxT[:, None, :]).sum(axis=1), "model")

        return count

    keys = sort_keys(values_Bxk)
    last = kth_largest(counter(keys), k, tokens, 32)
    above, equal = keys > last[:, None], keys == last[:, None]
    left = k - psum(above.sum(axis=1), "model")
    order = jnp.where(equal, d_sae - latents_Bxk, 0).astype(jnp.uint32)
    last = kth_largest(counter(order), left, tokens, d_sae.bit_length())
    return above | (equal & (order >= last[:, None]))


def top_k_latents(x_BxN: jax.Array, k: int) -> jax.Array:
    """Returns the k largest values of each row of x (B, d_sae) in their places, 0 elsewhere.

    Values below 0 become 0, and ties go to the lower latent. Where x is sharded over the
    dictionary the result is sharded as a code is, and the same as on one device.
    """

    def local(x):
        values, indices = _candidates(x, None, k)
        code, _ = _keep_winners(values, indices, x.shape[1])
        rows = jnp.arange(x.shape[0])[:, None]
        # Added, since the slots that a small shard has too many all have the value 0 at latent 0.
        return jnp.zeros_like(x).at[rows, code.indices].add(jax.nn.relu(code.values))

    if jax.typeof(x_BxN).sharding.spec[1] is not None:
        return per_shard(local, (CODE,), CODE)(jax.reshard(x_BxN, CODE))
    values, indices = top_k(x_BxN, k)
    rows = jnp.arange(x_BxN.shape[0])[:, None]
    latents = jnp.zeros_like(x_BxN)
    return latents.at[rows, indices].set(jax.nn.relu(values), unique_indices=True)


def keep_top_k(code: Code, k, slots: int) -> Code:
    """Keeps the k largest values of each token in a code, and sets the others to 0.

    It is for codes without values below 0. Ties are resolved as in `encode_top_k`.

    Args:
      code: a code.
      k: how many values are kept; it may be traced.
      slots: the slots of the code a token and shard.
    """

    def local(values, k):
        _, order = jax.lax.top_k(gather_last(values, "model"), slots)
        mine = order - shard_index("model") * slots
        winning = jnp.arange(slots) < k
        slot = jnp.arange(slots, dtype=mine.dtype)
        kept = ((mine[:, :, None] == slot) & winning[:, None]).any(axis=1)
        return jnp.where(kept, values, 0.0)

    kept = per_shard(local, (CODE, P()), CODE)(jax.lax.stop_gradient(code.values), jnp.asarray(k))
    return code._replace(values=jnp.where(kept > 0, code.values, 0.0))


# ---------------------------------------------------------------------------------- decode


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def sparse_decode(code: Code, aux: Code | None, any_dead, w_dec, compute_dtype=jnp.float32):
    """Sums the picked decoder rows, weighted by the code's values.

    It costs 2 k d_out FLOPs a token and shard, and one all-reduce of each result over `model`.

    Args:
      code: the code.
      aux: the auxiliary code, or None.
      any_dead: a scalar bool. Where it is false the auxiliary result is zero and costs nothing.
      w_dec: the decoder (d_sae, d_out).
      compute_dtype: what a GPU reads rows and vectors in (`picked_rows.copy_for_gathers`).

    Returns:
      The sums (B, d_out) of the code, and those of the auxiliary code or None.
    """
    return _decode_forward(code, aux, any_dead, w_dec, compute_dtype)[0]


def _decode_forward(code, aux, any_dead, w_dec, compute_dtype):
    any_dead = None if any_dead is None else in_any_run(any_dead)
    packs = fits(code)

    def local(code, aux, any_dead, packs, w_dec):
        w_dec = copy_for_gathers(w_dec, compute_dtype)
        x_hat = _decode(code, packs, w_dec)
        if aux is None:
            return psum(x_hat, "model"), None
        aux_hat = branch(
            any_dead,
            lambda: psum(sum_weighted_rows(aux.values, aux.indices, w_dec), "model"),
            lambda: jnp.zeros_like(x_hat),
        )
        return psum(x_hat, "model"), aux_hat

    saved = code, aux, any_dead, packs, w_dec
    return per_shard(local, (CODE, CODE, P(), P(), DECODER), BATCH)(*saved), saved


def _decode_backward(compute_dtype, saved, cotangents):
    w_dec = saved[-1]

    def local(code, aux, any_dead, packs, w_dec, d_x_hat, d_aux_hat):
        d_x_hat = copy_for_gathers(d_x_hat, compute_dtype)

        def gradients(parts):
            terms = [(p.values, p.indices, p.of_tokens(d_x_hat), True) for p in parts]
            if aux is not None:
                vectors = copy_for_gathers(d_aux_hat, compute_dtype)
                terms.append((aux.values, aux.indices, vectors, any_dead))
            products, d_w = decode_gradients(terms, w_dec)
            d_values = jnp.zeros_like(code.values)
            for part, product in zip(parts, products, strict=False):
                d_values = part.set_slots(d_values, product)
            return d_values, products[len(parts) :], d_w

        d_values, d_aux, d_w = in_parts(code, packs, gradients)
        return Code(d_values, None), Code(d_aux[0], None) if d_aux else None, psum(d_w, "data")

    specs = (CODE, CODE, P(), P(), DECODER, BATCH, BATCH)
    d_code, d_aux, d_w = per_shard(local, specs, (CODE, CODE, DECODER))(*saved, *cotangents)
    return d_code, d_aux, None, d_w.astype(w_dec.dtype)


sparse_decode.defvjp(_decode_forward, _decode_backward)


def fired_latents(code: Code, d_sae: int):
    """Returns which latents (d_sae,) bool have a positive value anywhere in a code."""

    def local(code, packs):
        def fired(parts):
            total = jnp.zeros(d_sae // shard_count("model"), jnp.int32)
            for part in parts:
                total = total.at[part.indices].max((part.values > 0).astype(jnp.int32))
            return total

        return psum(in_parts(code, packs, fired), "data") > 0

    return per_shard(local, (CODE, P()), PER_LATENT)(code, fits(code))


# ------------------------------------------------------------------------- on one device


def _decode(code: Code, packs, w_Nxd):
    """Returns the sum over a shard's slots of values * w[indices], (B, d).

    `packs` is what `shares.fits` returns of the whole code.
    """

    tokens = code.values.shape[0]

    def decode(parts):
        return sum(
            part.sum_by_token(sum_weighted_rows(part.values, part.indices, w_Nxd), tokens)
            for part in parts
        )

    return in_parts(code, packs, decode)
