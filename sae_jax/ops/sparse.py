"""Encodes to k latents a token and decodes from them, without a dense (B, d_sae) gradient.

Every shard of the dictionary has k slots a token. A slot whose latent is not among the global top k
has the value 0.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sae_jax.ops import sorted_picks, tpu_encoder, tpu_rows
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
from sae_jax.ops.topk import top_k

_CPU_SLICE_ROWS = 256  # tokens whose pre-activations stay in a CPU's cache
_CPU_PRODUCT_ROWS = 16  # tokens whose picked decoder rows stay in a CPU's cache
_SLICE_BYTES = 2**30  # the most bytes of either at once on other devices
_FEW_CANDIDATES = 256  # up to so many candidates of a token over all shards are gathered
_UNROLL = 32  # latents whose decoder rows are added in one fused pass


class Code(NamedTuple):
    """The latents that were picked for each token, in slots (B, shards * k).

    Attributes:
      values: the picked values, float32.
      indices: the picked latents, int32, counted within the slot's shard.
    """

    values: jax.Array
    indices: jax.Array


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
        w = w_enc.astype(compute_dtype)

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
        if aux is None:
            return _keep_winners(*main, n), None
        none = Code(jnp.zeros_like(aux[0]), aux[1]), jnp.zeros(aux[0].shape, bool)
        return _keep_winners(*main, n), branch(
            any_dead, lambda: _keep_winners(*aux, n), lambda: none
        )

    specs = (BATCH, ENCODER, PER_LATENT, PER_LATENT, P())
    codes, kept = _transpose_pairs(per_shard(local, specs, CODE)(x, w_enc, b_enc, dead, any_dead))
    indices = [code and code.indices for code in codes]
    return codes, (x, w_enc, b_enc, any_dead, indices, kept)


def _encode_backward(k, aux_k, compute_dtype, saved, cotangents):
    x, w_enc, b_enc, any_dead, indices, kept = saved
    d_pre = [
        code and jnp.where(mask, code.values, 0.0)
        for code, mask in zip(cotangents, kept, strict=True)
    ]

    def weights(x, w_enc, any_dead, indices, d_pre):
        n = w_enc.shape[1]
        codes = _codes_with_flags(d_pre, indices, any_dead)
        d_b = sum(jnp.zeros(n, jnp.float32).at[i].add(d) for d, i, _ in codes)
        terms = [(d, i, x, wanted) for d, i, wanted in codes]
        return psum(_scatter_rows(terms, n, transposed=True), "data"), psum(d_b, "data")

    def inputs(w_enc, any_dead, indices, d_pre):
        codes = _codes_with_flags(d_pre, indices, any_dead)
        return psum(sum(_sum_weighted_rows(d, i, w_enc.T) for d, i, _ in codes), "model")

    code_specs = (P(), CODE, CODE)
    d_w, d_b = per_shard(weights, (BATCH, ENCODER, *code_specs), (ENCODER, PER_LATENT))(
        x, w_enc, any_dead, indices, d_pre
    )
    # XLA drops this where x is data and nobody asks.
    d_x = per_shard(inputs, (ENCODER, *code_specs), BATCH)(w_enc, any_dead, indices, d_pre)
    return d_x.astype(x.dtype), d_w.astype(w_enc.dtype), d_b.astype(b_enc.dtype), None


encode_top_k.defvjp(_encode_forward, _encode_backward)


def _codes_with_flags(values, indices, any_dead):
    """Returns (values, indices, whether they count) of the main code, and of the auxiliary code if
    there is one.
    """
    main = (values[0], indices[0], True)
    return [main] if any_dead is None else [main, (values[1], indices[1], any_dead)]


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
    mine = winners - shard_index("model") * k
    slot = jnp.arange(k, dtype=mine.dtype)
    return (mine[:, :, None] == slot).any(axis=1)


def _wins_by_search(values_Bxk, latents_Bxk, d_sae: int):
    """Returns the same as `_wins_globally` without gathering candidates, which grow with the
    shards.

    What is summed over `model` are counts. 8 rounds, of 60 bytes a token each, find the k-th
    largest value. One round for every 4 bits of d_sae then finds the last latent to win among equal
    values.
    """
    k = values_Bxk.shape[1]
    bits = jax.lax.bitcast_convert_type(values_Bxk, jnp.uint32)
    keys = jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))  # in the order of the values
    last = _kth_largest(keys, k, 32)
    above, equal = keys > last[:, None], keys == last[:, None]
    left = k - psum(above.sum(axis=1), "model")
    order = jnp.where(equal, d_sae - latents_Bxk, 0).astype(jnp.uint32)
    return above | (equal & (order >= _kth_largest(order, left, d_sae.bit_length())[:, None]))


def _kth_largest(keys_Bxk, k, bits: int):
    """Returns the k-th largest of uint32 keys below 2^bits over all shards, (B,); k may be (B,)."""
    found = jnp.zeros(len(keys_Bxk), jnp.uint32)
    digits = jnp.arange(1, 16, dtype=jnp.uint32)
    for shift in reversed(range(0, bits, 4)):
        tried = found[:, None] | (digits << shift)
        count = psum((keys_Bxk[:, :, None] >= tried[:, None, :]).sum(axis=1), "model")
        enough = (count >= jnp.reshape(k, (-1, 1))).sum(axis=1)
        found |= enough.astype(jnp.uint32) << shift
    return found


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


@jax.custom_vjp
def sparse_decode(code: Code, aux: Code | None, any_dead, w_dec):
    """Sums the picked decoder rows, weighted by the code's values.

    It costs 2 k d_out FLOPs a token and shard, and one all-reduce of each result over `model`.

    Args:
      code: the code.
      aux: the auxiliary code, or None.
      any_dead: a scalar bool. Where it is false the auxiliary result is zero and costs nothing.
      w_dec: the decoder (d_sae, d_out).

    Returns:
      The sums (B, d_out) of the code, and those of the auxiliary code or None.
    """
    return _decode_forward(code, aux, any_dead, w_dec)[0]


def _decode_forward(code, aux, any_dead, w_dec):
    any_dead = None if any_dead is None else in_any_run(any_dead)

    def local(code, aux, any_dead, w_dec):
        x_hat = _sum_weighted_rows(*code, w_dec)
        if aux is None:
            return psum(x_hat, "model"), None
        aux_hat = branch(
            any_dead,
            lambda: psum(_sum_weighted_rows(*aux, w_dec), "model"),
            lambda: jnp.zeros_like(x_hat),
        )
        return psum(x_hat, "model"), aux_hat

    decoded = per_shard(local, (CODE, CODE, P(), DECODER), BATCH)(code, aux, any_dead, w_dec)
    return decoded, (code, aux, any_dead, w_dec)


def _decode_backward(saved, cotangents):
    code, aux, any_dead, w_dec = saved

    def local(code, aux, any_dead, w_dec, d_x_hat, d_aux_hat):
        n = w_dec.shape[0]
        if on_tpu():
            d_values, d_w = _gradients_in_order(*code, d_x_hat, w_dec)
            if aux is None:
                return Code(d_values, None), None, psum(d_w, "data")
            d_aux_values, d_w = jax.lax.cond(
                any_dead,
                lambda d_w: _gradients_in_order(*aux, d_aux_hat, w_dec, d_w),
                lambda d_w: (jnp.zeros_like(aux.values), d_w),
                d_w,
            )
            return Code(d_values, None), Code(d_aux_values, None), psum(d_w, "data")
        d_code = Code(_products_with_rows(d_x_hat, code.indices, w_dec), None)
        terms = [(*code, d_x_hat, True)]
        if aux is None:
            return d_code, None, psum(_scatter_rows(terms, n), "data")
        d_aux_values = jax.lax.cond(
            any_dead,
            lambda: _products_with_rows(d_aux_hat, aux.indices, w_dec),
            lambda: jnp.zeros_like(aux.values),
        )
        terms.append((*aux, d_aux_hat, any_dead))
        return d_code, Code(d_aux_values, None), psum(_scatter_rows(terms, n), "data")

    specs = (CODE, CODE, P(), DECODER, BATCH, BATCH)
    d_code, d_aux, d_w = per_shard(local, specs, (CODE, CODE, DECODER))(*saved, *cotangents)
    return d_code, d_aux, None, d_w.astype(w_dec.dtype)


sparse_decode.defvjp(_decode_forward, _decode_backward)


def fired_latents(code: Code, d_sae: int):
    """Returns which latents (d_sae,) bool have a positive value anywhere in a code."""

    def local(code):
        n = d_sae // shard_count("model")
        fired = jnp.zeros(n, jnp.int32).at[code.indices].max((code.values > 0).astype(jnp.int32))
        return psum(fired, "data") > 0

    return per_shard(local, (CODE,), PER_LATENT)(code)


# ------------------------------------------------------------------------- on one device


def _sum_weighted_rows(values_Bxk, indices_Bxk, w_Nxd):
    """Returns the sum over k of values * w[indices], (B, d).

    It is unrolled, so that XLA fuses gather, product and sum into one pass and never writes (B, k,
    d).
    """

    if on_tpu() and tpu_rows.fits(indices_Bxk.size, w_Nxd, len(indices_Bxk)):
        return tpu_rows.decode(values_Bxk, indices_Bxk, w_Nxd)

    def add(total, columns):
        values, indices = columns
        for j in range(values.shape[1]):
            total += values[:, j, None] * w_Nxd[indices[:, j]]
        return total

    total = jnp.zeros((values_Bxk.shape[0], w_Nxd.shape[1]), w_Nxd.dtype)
    return _fold_columns(add, total, values_Bxk, indices_Bxk)


def _fold_columns(add, total, values_Bxk, indices_Bxk):
    """Folds `add` over blocks of at most `_UNROLL` columns of values and indices."""
    B, k = values_Bxk.shape
    whole = k - k % _UNROLL
    if whole > _UNROLL:
        blocks = tuple(
            a[:, :whole].reshape(B, whole // _UNROLL, _UNROLL).swapaxes(0, 1)
            for a in (values_Bxk, indices_Bxk)
        )
        total, _ = jax.lax.scan(lambda t, block: (add(t, block), None), total, blocks)
    elif whole:
        total = add(total, (values_Bxk[:, :whole], indices_Bxk[:, :whole]))
    if whole < k:
        total = add(total, (values_Bxk[:, whole:], indices_Bxk[:, whole:]))
    return total


def _products_with_rows(g_Bxd, indices_Bxk, w_Nxd):
    """Returns the dot product (B, k) of each token's vector in g with the rows of w that it picked.

    Tokens go in blocks. On a CPU their gathered rows stay in cache; elsewhere they are at most
    `_SLICE_BYTES`.
    """
    B, k = indices_Bxk.shape
    limit = _CPU_PRODUCT_ROWS if on_cpu() else max(1, _SLICE_BYTES // (4 * k * w_Nxd.shape[1]))
    block = next(b for b in range(min(limit, B), 0, -1) if B % b == 0)

    def products(args):
        g, indices = args
        return jnp.einsum("bd,bkd->bk", g, w_Nxd[indices], precision="highest")

    shaped = (g_Bxd.reshape(-1, block, g_Bxd.shape[1]), indices_Bxk.reshape(-1, block, k))
    return jax.lax.map(products, shaped).reshape(B, k)


def _gradients_in_order(values, indices, g_Bxd, w_Nxd, total=None):
    """Returns on a TPU the gradients of picked values (B, k), and those of the rows (n, d) plus
    `total` if there is one, from the gradients g of what they decode to.
    """
    if tpu_rows.fits(indices.size, g_Bxd, len(w_Nxd)):
        products, sums = sorted_picks.products_and_row_sums(values, indices, g_Bxd, w_Nxd)
    else:
        products = _products_with_rows(g_Bxd, indices, w_Nxd)
        sums = sorted_picks.row_sums(values, indices, g_Bxd, w_Nxd.shape[0])
    return products, sums if total is None else total + sums


def _scatter_rows(terms, n: int, transposed: bool = False):
    """Returns the gradient (n, d) float32 of rows that tokens picked.

    To each picked row it adds the token's vector, multiplied with the pick's coefficient.

    Args:
      terms: a list of (coefficients (B, k), indices (B, k), vectors (B, d), a scalar that says
        whether the term counts).
      n: the number of rows.
      transposed: whether the result is (d, n).
    """
    if on_tpu():
        first, *others = terms
        total = sorted_picks.row_sums(*first[:3], n, transposed)
        for *term, counts in others:
            add = functools.partial(_add_in_order, term, n, transposed)
            total = jax.lax.cond(counts, add, lambda total: total, total)
        return total
    total = jnp.zeros((n, terms[0][2].shape[1]), jnp.float32)
    total = jax.lax.platform_dependent(
        total, terms, cpu=_add_token_by_token, default=_add_blocks_of_columns
    )
    return total.T if transposed else total


def _add_in_order(term, n: int, transposed: bool, total):
    """Adds a term on a TPU."""
    return total + sorted_picks.row_sums(*term, n, transposed)


def _add_token_by_token(total, terms):
    """Adds terms on one thread, whose cache holds a token's vector."""
    for coefficients, indices, vectors, counts in terms:

        def add(b, total, coefficients=coefficients, indices=indices, vectors=vectors):
            rows = coefficients[b][:, None] * vectors[b].astype(jnp.float32)
            return total.at[indices[b]].add(rows, mode="promise_in_bounds")

        total = jax.lax.fori_loop(0, jnp.where(counts, len(vectors), 0), add, total)
    return total


def _add_blocks_of_columns(total, terms):
    """Adds terms on many threads.

    It adds blocks of columns of all tokens at once, whose rows are at most `_SLICE_BYTES`.
    """
    for coefficients, indices, vectors, counts in terms:
        B, k = indices.shape
        limit = max(1, _SLICE_BYTES // (4 * vectors.size))
        block = next(b for b in range(min(limit, k), 0, -1) if k % b == 0)

        def add(total, columns, vectors=vectors):
            coefficients, indices = columns
            rows = coefficients[:, :, None] * vectors[:, None, :].astype(jnp.float32)
            return total.at[indices].add(rows, mode="promise_in_bounds"), None

        def add_all(total, blocks, add=add):
            return jax.lax.scan(add, total, blocks)[0]

        blocks = tuple(
            a.reshape(B, k // block, block).swapaxes(0, 1) for a in (coefficients, indices)
        )
        total = jax.lax.cond(counts, add_all, lambda total, _: total, total, blocks)
    return total
