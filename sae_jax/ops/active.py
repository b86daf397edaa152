"""The dense autoencoder of a batch in which few latents act, by these latents alone.

ReLU, JumpReLU and gated SAEs compute every latent of every token. Once training has made them
sparse, all but a few of a token's latents are 0, and have no gradient. What is left is as little
work as that of a top-k SAE: one product with the encoder, and rows of the decoder and of the
gradients for the latents that act.

Latents lie in rows of slots. A token has as many rows as its latents need, so that one token with
many costs no other token anything. The number of rows that are in use is known to the program that
runs only, and its loops end there.

Every function here works on one device's tokens and latents, and does not communicate.
"""

import contextlib
import contextvars
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from sae_jax.ops.picked_rows import add_token_by_token, products_with_rows, sum_weighted_rows
from sae_jax.ops.sharding import matmul_f32, on_cpu

_SLOTS = 16  # of a row
_CHUNK = 256  # rows that are worked on at once, and tokens whose products stay in a CPU's cache
_SHARE = 64  # there are slots for one latent in so many; with one in 40 dense work is as fast
_LEAST = _SHARE * _SLOTS  # latents; with fewer there is less than a row for each token
_MOST = 2**31 // _CHUNK  # latents; with more, places in a slice's products are no int32
_BITS = 32  # latents whose activity is one word

_all_latents = contextvars.ContextVar("all_latents", default=False)


class ActiveLatents(NamedTuple):
    """The latents that act, in R rows of S slots.

    Attributes:
      complete: (1,) bool, whether there is room for all that act. Otherwise nothing here is of use.
      used: (1,) int32, the number of rows that hold latents. They come first.
      tokens: (R,) int32, the token of each row.
      filled: (R,) int32, how many of a row's slots are in use. They come first.
      latents: (R, S) int32, the latents of the slots.
      products: (R, S) float32, the encoder's products, without a bias.
    """

    complete: jax.Array
    used: jax.Array
    tokens: jax.Array
    filled: jax.Array
    latents: jax.Array
    products: jax.Array


def worth_finding(d_sae: int) -> bool:
    """Returns whether to look for the latents that act, among d_sae of a device.

    It takes a CPU a few hundredths of a dense step to find that they are too many, and up to a
    tenth where there are hardly too many. Accelerators have not been shown to gain from it.
    """
    fits = _LEAST <= d_sae <= _MOST and d_sae % _BITS == 0
    return fits and on_cpu() and not _all_latents.get()


@contextlib.contextmanager
def by_all_latents():
    """Traces programs that compute by all latents, whether few act or not."""
    token = _all_latents.set(True)
    try:
        yield
    finally:
        _all_latents.reset(token)


def find_active(support: Callable, x, w_enc, per_latent: dict, compute_dtype) -> ActiveLatents:
    """Returns the latents that act.

    It encodes tokens in slices, so that the products (B, d_sae) never exist as a whole, and gives
    up at the first slice up to which there are too many latents, which is well before the room for
    all of them is used up.

    Args:
      support: a function of products (B, M) and of `per_latent` cut to M latents, that returns
        where latents act, (B, M) bool.
      x: the inputs (B, d_in).
      w_enc: the encoder (d_in, d_sae).
      per_latent: arrays (d_sae,) by name.
      compute_dtype: the dtype of the product's operands. It accumulates in float32.
    """
    tokens, n = x.shape[0], w_enc.shape[1]
    size = min(_CHUNK, tokens)
    of_token = -(-(n // _SHARE) // _SLOTS)
    room = -(-tokens * of_token // _CHUNK) * _CHUNK
    rows = room + _CHUNK  # what is written last may end in a chunk's unused rows
    slices = -(-tokens // size)
    share = size * of_token
    beyond = share // 8 + n // _SLOTS  # a token may have all latents
    x, w = x.astype(compute_dtype), w_enc.astype(compute_dtype)

    def find_in_slice(carry):
        i, complete, used, found = carry
        start = jnp.minimum(i * size, tokens - size)  # the last slice overlaps the one before
        product = matmul_f32(jax.lax.dynamic_slice_in_dim(x, start, size), w)
        new = start + jnp.arange(size) >= i * size
        words = _words(support(product, per_latent) & new[:, None])
        total, chunk_of_rows = _rows_of_slots(words, product)
        complete = used + total <= jnp.minimum(room, (i + 1) * share + beyond)

        def put(c, found):
            tokens, *slots = chunk_of_rows(c * _CHUNK)
            return jax.tree.map(
                lambda all_rows, chunk: jax.lax.dynamic_update_slice_in_dim(
                    all_rows, chunk, used + c * _CHUNK, 0
                ),
                found,
                (start + tokens, *slots),
            )

        chunks = jnp.where(complete, -(-total // _CHUNK), 0)
        return i + 1, complete, used + total, jax.lax.fori_loop(0, chunks, put, found)

    def goes_on(carry):
        i, complete, _, _ = carry
        return complete & (i < slices)

    one, many = (rows,), (rows, _SLOTS)
    empty = tuple(
        jnp.zeros(shape, dtype)
        for shape, dtype in ((one, "int32"), (one, "int32"), (many, "int32"), (many, "float32"))
    )
    begin = jnp.int32(0), jnp.bool(True), jnp.int32(0), empty
    _, complete, used, found = jax.lax.while_loop(goes_on, find_in_slice, begin)
    return ActiveLatents(complete[None], used[None], *found)


def positive_entries(values, room: int):
    """Returns the entries above 0 of dense latents, token by token, without sorting them.

    Args:
      values: dense latents (B, M), of which a device has B * M below 2^31.
      room: how many entries there is room for.

    Returns:
      How many entries are above 0, () int32, and of the first `room` of them the tokens, the
      latents and the values, (room,) each; 0 where there are no more.
    """
    rows, n = values.shape
    words = _words(jnp.pad(values > 0, ((0, 0), (0, -n % _BITS))))
    groups, words = words.shape[1], words.reshape(-1)
    counts = jax.lax.population_count(words).astype(jnp.int32)
    until = jnp.cumsum(counts)
    slot = jnp.arange(room, dtype=jnp.int32)
    here = slot < until[-1]
    place = jnp.minimum(_first_above(until, 0, rows * groups, slot), rows * groups - 1)
    rank = jnp.where(here, slot - (_at(until, place) - _at(counts, place)), 0)
    token = jnp.where(here, place // groups, 0)
    latent = jnp.where(here, _set_bit(_at(words, place), rank) * groups + place % groups, 0)
    return until[-1], token, latent, jnp.where(here, values[token, latent], 0.0)


def _words(active_BxN):
    """Returns the activity of latents as words (B, N / 32) uint32.

    Bit b of word g is latent b * N / 32 + g, so that words are made of whole vectors of latents.
    """
    B, n = active_BxN.shape
    bits = active_BxN.reshape(B, _BITS, n // _BITS).astype(jnp.uint32)
    return (bits << jnp.arange(_BITS, dtype=jnp.uint32)[:, None]).sum(axis=1, dtype=jnp.uint32)


def _rows_of_slots(words_BxG, product_BxN):
    """Returns how many rows of slots hold the set bits of all tokens, and a function that makes
    a chunk of these rows, given the first: (tokens, filled, latents, products) of `ActiveLatents`.
    """
    B, G = words_BxG.shape
    n = product_BxN.shape[1]
    until_BxG = jnp.cumsum(jax.lax.population_count(words_BxG).astype(jnp.int32), axis=1)
    count_B = until_BxG[:, -1]
    rows_B = -(-count_B // _SLOTS)
    end_B = jnp.cumsum(rows_B)
    words, until, products = words_BxG.reshape(-1), until_BxG.reshape(-1), product_BxN.reshape(-1)

    def chunk_of_rows(first):
        row = first + jnp.arange(_CHUNK, dtype=jnp.int32)
        token = jnp.minimum(_first_above(end_B, 0, B, row), B - 1)
        before = (row - (end_B - rows_B)[token]) * _SLOTS  # the token's latents in earlier rows
        filled = jnp.where(row < end_B[-1], jnp.clip(count_B[token] - before, 0, _SLOTS), 0)
        slot = jnp.arange(_SLOTS, dtype=jnp.int32)
        here = slot < filled[:, None]
        rank = jnp.where(here, before[:, None] + slot, 0)
        word = _first_above(until, token[:, None] * G, G, rank)
        place = token[:, None] * G + jnp.minimum(word, G - 1)
        bits = _at(words, place)
        rank -= _at(until, place) - jax.lax.population_count(bits).astype(jnp.int32)
        latent = jnp.where(here, _set_bit(bits, rank) * G + word, 0)
        product = jnp.where(here, _at(products, token[:, None] * n + latent), 0.0)
        return token, filled, latent, product

    return end_B[-1], chunk_of_rows


def _first_above(ascending, start, length: int, value):
    """Returns how many of `length` numbers from `start` on are not above a value, by bisection."""
    found = jnp.zeros_like(value)
    for step in (1 << bit for bit in reversed(range(length.bit_length()))):
        tried = found + step
        not_above = _at(ascending, start + jnp.minimum(tried, length) - 1) <= value
        found = jnp.where((tried <= length) & not_above, tried, found)
    return found


def _set_bit(word, rank):
    """Returns the place of the bit of a uint32 that has `rank` set bits below it, by bisection."""
    place = jnp.zeros_like(rank)
    for half in (16, 8, 4, 2, 1):
        low = word & jnp.uint32((1 << half) - 1)
        count = jax.lax.population_count(low).astype(jnp.int32)
        is_high = rank >= count
        word = jnp.where(is_high, word >> half, low)
        rank = jnp.where(is_high, rank - count, rank)
        place = jnp.where(is_high, place + half, place)
    return place


def _at(array, indices):
    """Returns array[indices] for indices that are in bounds."""
    return array.at[indices].get(mode="promise_in_bounds")


# ------------------------------------------------------------------------- autoencode


def autoencode_active(activation: Callable, active: ActiveLatents, per_latent, w_dec, empty):
    """Returns what a dense autoencoder adds up, (decoded, latent_sums, token_sums).

    Args:
      activation: the function of `dense_autoencode`.
      active: the latents that act.
      per_latent: arrays (d_sae,) by name.
      w_dec: the decoder (d_sae, d_out).
      empty: zeros of the shapes of the result.
    """

    def add(chunk: ActiveLatents, totals):
        decoded, latent_sums, token_sums = totals
        out = _activated(activation, chunk, chunk.products, _picked(per_latent, chunk))
        rows = [sum_weighted_rows(f, chunk.latents, w_dec) for f in out.latents]
        return (
            tuple(a.at[chunk.tokens].add(b) for a, b in zip(decoded, rows, strict=True)),
            _add_at(latent_sums, chunk.latents, out.latent_sums),
            jax.tree.map(
                lambda a, b: a.at[chunk.tokens].add(b.sum(axis=1)), token_sums, out.token_sums
            ),
        )

    return _over_chunks(active, add, empty)


def gradients_of_active(activation: Callable, active: ActiveLatents, x, per_latent, w_dec, d_out):
    """Returns the gradients of w_enc, of `per_latent` and of w_dec.

    Args:
      activation: the function of `dense_autoencode`.
      active: the latents that act.
      x: the inputs (B, d_in).
      per_latent: arrays (d_sae,) by name.
      w_dec: the decoder (d_sae, d_out).
      d_out: the gradients of the `Activated` whose latents are decoded: (decoded, latent_sums,
        token_sums).
    """
    d_decoded, d_latent_sums, d_token_sums = d_out
    n = w_dec.shape[0]

    def add(chunk: ActiveLatents, totals):
        d_w_enc, d_all_per_latent, d_w_dec = totals
        vectors = [d[chunk.tokens] for d in d_decoded]

        def outputs(products, per_slot):
            return _activated(activation, chunk, products, per_slot)

        out, pull = jax.vjp(outputs, chunk.products, _picked(per_latent, chunk))
        d_products, d_per_slot = pull(
            out._replace(
                latents=tuple(products_with_rows(v, chunk.latents, w_dec) for v in vectors),
                latent_sums=_picked(d_latent_sums, chunk),
                token_sums={
                    name: jnp.broadcast_to(d[chunk.tokens][:, None], chunk.products.shape)
                    for name, d in d_token_sums.items()
                },
            )
        )
        return (
            add_token_by_token(d_w_enc, [(d_products, chunk.latents, x[chunk.tokens], True)]),
            _add_at(d_all_per_latent, chunk.latents, d_per_slot),
            add_token_by_token(d_w_dec, [(out.latents[0], chunk.latents, vectors[0], True)]),
        )

    empty = (
        jnp.zeros((n, x.shape[1]), jnp.float32),
        jax.tree.map(jnp.zeros_like, per_latent),
        jnp.zeros(w_dec.shape, jnp.float32),
    )
    d_w_enc, d_per_latent, d_w_dec = _over_chunks(active, add, empty)
    # As dense work writes it, which would have to transpose its own gradient otherwise.
    d_w_enc = with_layout_constraint(d_w_enc.T, Layout(major_to_minor=(0, 1)))
    return d_w_enc, d_per_latent, d_w_dec


def _over_chunks(active: ActiveLatents, add: Callable, totals):
    """Folds `add(chunk of rows, totals)` over the rows that are in use."""

    def add_chunk(c, totals):
        rows = active[2:]
        chunk = (jax.lax.dynamic_slice_in_dim(a, c * _CHUNK, _CHUNK) for a in rows)
        return add(ActiveLatents(active.complete, active.used, *chunk), totals)

    return jax.lax.fori_loop(0, -(-active.used[0] // _CHUNK), add_chunk, totals)


def _activated(activation: Callable, chunk: ActiveLatents, products, per_slot):
    """Returns what an activation makes of each slot: an Activated of arrays (R, S), 0 where there
    is no latent."""

    def of_slot(product, per_slot):
        one_latent = jax.tree.map(lambda a: a[None], per_slot)
        return jax.tree.map(lambda a: a.reshape(()), activation(product[None, None], one_latent))

    out = jax.vmap(jax.vmap(of_slot))(products, per_slot)
    here = jnp.arange(_SLOTS) < chunk.filled[:, None]
    return jax.tree.map(lambda a: jnp.where(here, a, 0.0), out)


def _picked(per_latent: dict, chunk: ActiveLatents) -> dict:
    """Returns the values (R, S) of arrays (d_sae,) for the latents of the slots."""
    return {name: _at(a, chunk.latents) for name, a in per_latent.items()}


def _add_at(totals: dict, latents, per_slot: dict) -> dict:
    """Adds values (R, S) of slots to arrays (d_sae,), by name."""
    return {
        name: total.at[latents].add(per_slot[name], mode="promise_in_bounds")
        for name, total in totals.items()
    }
