"""Encodes to dead latents and decodes from them (AuxK) by products of their own columns and rows.

A k-sparse code of some hundred slots a token is dear: its rows are gathered for every token. Where
only few latents are dead, all of their pre-activations are computed instead, in blocks of latents,
and those that are not among the k largest are set to 0. There is a trip of a loop for each block
that has a dead latent, so that the cost grows with their number. Where none is dead there is
neither a product nor a gradient: what `decode_dead` finds it adds to the gradients of the rest of
the loss, where the rest reads the parameters that it returns.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sae_jax.ops.kth_largest import kth_largest, sort_keys
from sae_jax.ops.sharding import (
    BATCH,
    DECODER,
    ENCODER,
    PER_LATENT,
    PER_TOKEN,
    branch,
    in_any_run,
    matmul_f32,
    most_of_runs,
    on_cpu,
    per_shard,
    psum,
    shard_count,
    shard_index,
)

_CPU_BLOCK = 64  # latents
_BLOCK = 512  # elsewhere, where the matmuls must be large
_FEW = 8  # up to so many times k dead latents dense products cost less than a k-sparse code

_BLOCKS = P(None, "data", "model")  # (blocks, B, block): each shard's own latents
_IN_BLOCKS = P(None, "model")  # (blocks, block)


class _Picks(NamedTuple):
    """Which dead latents each token picks.

    Attributes:
      latents: the shard's dead latents (blocks, block) int32, in order, counted within the shard.
        Places that are left have the number of its latents.
      used: the number of blocks (1,) int32 that have a dead latent in any run of a batch of runs.
      products: pre-activations (blocks, B, block); only those of used blocks are set.
      key: the sort key (B,) of the least pre-activation that is picked.
      order: the least `_order` (B,) that is picked of those with this key.
    """

    latents: jax.Array
    used: jax.Array
    products: jax.Array
    key: jax.Array
    order: jax.Array


_PICKS = _Picks(_IN_BLOCKS, PER_LATENT, _BLOCKS, PER_TOKEN, PER_TOKEN)


def few_and_many(dead: jax.Array, k: int) -> tuple[jax.Array, jax.Array | None]:
    """Returns the dead latents (d_sae,) bool for `decode_dead`, and those for a k-sparse code.

    One of them has all, by their number, and the other none. The second is None for a dictionary
    that is so small that it never has any.
    """
    most = _FEW * k
    if most >= dead.shape[0]:
        return dead, None
    many = jnp.sum(dead, dtype=jnp.int32) > most
    return dead & ~many, dead & many


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6, 7))
def decode_dead(
    activation: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    w_enc: jax.Array,
    b_enc: jax.Array,
    w_dec: jax.Array,
    dead: jax.Array,
    k: int,
    compute_dtype=jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Decodes each token's k largest pre-activations of dead latents.

    The result is exact and independent of the mesh: ties go to the lower latent. Where no more than
    k latents are dead, all are picked. It costs 2 (d_in + d_out) FLOPs a token and dead latent, and
    4 (d_in + d_out) more for its gradients. One all-reduce over `model` sums the result, and one
    over `data` the gradients of at most `8 k` dead latents of a shard.

    Args:
      activation: a function of single pre-activations, which JAX differentiates.
      x: inputs (B, d_in).
      w_enc: the encoder (d_in, d_sae).
      b_enc: its bias (d_sae,).
      w_dec: the decoder (d_sae, d_out).
      dead: which latents are dead (d_sae,) bool, as `few_and_many` returns them. Where none is the
        result is zero and costs nothing.
      k: dead latents that are picked for each token.
      compute_dtype: the dtype of the matmuls' operands. They accumulate in float32.

    Returns:
      The sums (B, d_out) of the picked decoder rows, weighted by activations; and w_enc, b_enc and
      w_dec as they are. Where the rest of a loss reads these, its gradients come here first and are
      added to in place. Otherwise JAX adds two arrays of the size of each.
    """
    return _forward(activation, x, w_enc, b_enc, w_dec, dead, k, compute_dtype)[0]


def _forward(activation, x, w_enc, b_enc, w_dec, dead, k, compute_dtype):
    any_dead = in_any_run(dead.any())
    exceeds = jnp.sum(dead, dtype=jnp.int32) > k
    size = _block_size(k)

    def local(x, w_enc, b_enc, w_dec, dead, used, any_dead, exceeds, any_exceeds):
        n = w_enc.shape[1]
        blocks = -(-min(n, _FEW * k) // size)
        latents = jnp.nonzero(dead, size=blocks * size, fill_value=n)[0].astype(jnp.int32)
        latents = latents.reshape(blocks, size)
        x = x.astype(compute_dtype)

        def encode(i, products):
            columns = _taken(w_enc, latents[i], axis=1).astype(compute_dtype)
            bias = _taken(b_enc, latents[i], fill=-jnp.inf)
            product = matmul_f32(x, columns) + bias
            return jax.lax.dynamic_update_index_in_dim(products, product, i, 0)

        products = jax.lax.empty((blocks, x.shape[0], size), jnp.float32)
        products = jax.lax.fori_loop(0, used[0], encode, products)
        everything = jnp.zeros(x.shape[0], jnp.uint32)
        picks = _Picks(latents, used, products, everything, everything)
        key, order = branch(
            any_exceeds, lambda: _least_picked(picks, k, n), lambda: (everything, everything)
        )
        picks = picks._replace(key=jnp.where(exceeds, key, 0), order=jnp.where(exceeds, order, 0))

        def decode(i, total):
            values = jnp.where(_picked(picks, i, n), activation(products[i]), 0.0)
            rows = _taken(w_dec, latents[i]).astype(compute_dtype)
            return total + matmul_f32(values.astype(compute_dtype), rows)

        total = jnp.zeros((x.shape[0], w_dec.shape[1]), jnp.float32)
        total = jax.lax.fori_loop(0, used[0], decode, total)
        return branch(any_dead, lambda: psum(total, "model"), lambda: total), picks

    in_specs = (BATCH, ENCODER, PER_LATENT, DECODER, PER_LATENT, PER_LATENT, P(), P(), P())
    decoded, picks = per_shard(local, in_specs, (BATCH, _PICKS))(
        *(x, w_enc, b_enc, w_dec, dead, _used_blocks(dead, size)),
        *(any_dead, exceeds, in_any_run(exceeds)),
    )
    return (decoded, w_enc, b_enc, w_dec), (x, w_enc, b_enc, w_dec, any_dead, picks)


def _backward(activation, k, compute_dtype, saved, cotangents):
    x, w_enc, b_enc, w_dec, any_dead, picks = saved
    d_decoded, *of_the_rest = cotangents

    def pre_gradient(i, picks, w_dec, d_decoded):
        """Returns the latents (B, block) of a block, and the gradients of their pre-activations."""
        picked = _picked(picks, i, w_dec.shape[0])
        values, pull = jax.vjp(activation, picks.products[i])
        rows = _taken(w_dec, picks.latents[i]).astype(compute_dtype)
        (d_pre,) = pull(matmul_f32(d_decoded, rows.T))
        return jnp.where(picked, values, 0.0), jnp.where(picked, d_pre, 0.0)

    def weights(x, w_dec, picks, any_dead, d_decoded, *of_the_rest):
        d_decoded = d_decoded.astype(compute_dtype)
        x = x.astype(compute_dtype)

        def find_block(i, found):
            values, d_pre = pre_gradient(i, picks, w_dec, d_decoded)
            block = (
                matmul_f32(d_pre.astype(compute_dtype).T, x),
                d_pre.sum(axis=0),
                matmul_f32(values.astype(compute_dtype).T, d_decoded),
            )
            return jax.tree.map(
                lambda all, part: jax.lax.dynamic_update_index_in_dim(all, part, i, 0), found, block
            )

        def add_block(i, gradients):
            d_w_enc, d_b, d_w_dec = gradients
            of_w_enc, of_b, of_w_dec = jax.tree.map(lambda blocks: blocks[i], found)
            latents = picks.latents[i]
            return (
                d_w_enc.at[:, latents].add(of_w_enc.T, mode="drop"),
                d_b.at[latents].add(of_b, mode="drop"),
                d_w_dec.at[latents].add(of_w_dec, mode="drop"),
            )

        used, shape = picks.used[0], picks.latents.shape
        widths = (x.shape[1],), (), (w_dec.shape[1],)
        found = tuple(jax.lax.empty((*shape, *width), jnp.float32) for width in widths)
        found = jax.lax.fori_loop(0, used, find_block, found)
        found = branch(any_dead, lambda: psum(found, "data"), lambda: found)
        of_the_rest = tuple(g.astype(jnp.float32) for g in of_the_rest)
        return jax.lax.fori_loop(0, used, add_block, of_the_rest)

    def inputs(w_enc, w_dec, picks, any_dead, d_decoded):
        d_decoded = d_decoded.astype(compute_dtype)

        def add_block(i, total):
            _, d_pre = pre_gradient(i, picks, w_dec, d_decoded)
            columns = _taken(w_enc, picks.latents[i], axis=1).astype(compute_dtype)
            return total + matmul_f32(d_pre.astype(compute_dtype), columns.T)

        total = jnp.zeros((d_decoded.shape[0], w_enc.shape[0]), jnp.float32)
        total = jax.lax.fori_loop(0, picks.used[0], add_block, total)
        return branch(any_dead, lambda: psum(total, "model"), lambda: total)

    specs = (ENCODER, PER_LATENT, DECODER)
    gradients = per_shard(weights, (BATCH, DECODER, _PICKS, P(), BATCH, *specs), specs)(
        x, w_dec, picks, any_dead, d_decoded, *of_the_rest
    )
    # XLA drops this where x is data and nobody asks.
    d_x = per_shard(inputs, (ENCODER, DECODER, _PICKS, P(), BATCH), BATCH)(
        w_enc, w_dec, picks, any_dead, d_decoded
    )
    dtypes = [a.dtype for a in (x, w_enc, b_enc, w_dec)]
    return *(g.astype(t) for g, t in zip((d_x, *gradients), dtypes, strict=True)), None


decode_dead.defvjp(_forward, _backward)


# ------------------------------------------------------------------------- on one device


def _block_size(k: int) -> int:
    """Returns how many latents a block has."""
    return min(k, _CPU_BLOCK if on_cpu() else _BLOCK)


def _used_blocks(dead, size: int):
    """Returns how many blocks each shard needs for its dead latents, (shards,)."""

    def local(dead):
        return -(-jnp.sum(dead, dtype=jnp.int32, keepdims=True) // size)

    return most_of_runs(per_shard(local, (PER_LATENT,), PER_LATENT)(dead))


def _taken(array, latents, axis: int = 0, fill=0.0):
    """Returns the entries of some latents along an axis, and `fill` for places without one."""
    return jnp.take(array, latents, axis=axis, mode="fill", fill_value=fill)


def _picked(picks: _Picks, i, n: int):
    """Returns which latents of block i each token picks, (B, block)."""
    product, key = picks.products[i], sort_keys(picks.products[i])
    last = (key == picks.key[:, None]) & (_order(picks, i, n) >= picks.order[:, None])
    return ((key > picks.key[:, None]) | last) & (product != -jnp.inf)


def _order(picks: _Picks, i, n: int):
    """Returns numbers (block,) uint32 that fall with the latent over all shards; n is the number of
    latents of a shard.
    """
    rest = (shard_count("model") - shard_index("model")) * n
    return (rest - picks.latents[i]).astype(jnp.uint32)


def _least_picked(picks: _Picks, k: int, n: int):
    """Returns the `key` and `order` (B,) of the k-th largest of each token's pre-activations."""
    tokens = picks.products.shape[1]

    def counter(keys_of_block):
        def count(tried_BxT):
            def add(i, total):
                keys_BxM = keys_of_block(i)
                return total + (keys_BxM[:, :, None] >= tried_BxT[:, None, :]).sum(axis=1)

            total = jnp.zeros(tried_BxT.shape, jnp.int32)
            return psum(jax.lax.fori_loop(0, picks.used[0], add, total), "model")

        return count

    count = counter(lambda i: sort_keys(picks.products[i]))
    key = kth_largest(count, k, tokens, 32)
    above, reached = count(key[:, None] + 1)[:, 0], count(key[:, None])[:, 0]

    def order_of_equals(i):
        return jnp.where(sort_keys(picks.products[i]) == key[:, None], _order(picks, i, n), 0)

    def last_of_equals():
        bits = (n * shard_count("model")).bit_length()
        return kth_largest(counter(order_of_equals), k - above, tokens, bits)

    ties = psum((reached > k).any().astype(jnp.int32), "data") > 0
    return key, branch(in_any_run(ties), last_of_equals, lambda: jnp.zeros(tokens, jnp.uint32))
