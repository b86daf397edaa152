"""Gradients of picked rows on a GPU, from the picks in the order of their latents.

A scatter adds every pick to its row in memory. Here one program of a Pallas kernel (Triton) adds a
row's picks up and writes the row once, in an order that never changes, and the products of the
picks (B k, d) are never written.

Latents that many tokens picked would keep a program busy for long. Their picks are therefore cut
into pieces: the first piece of a latent goes to its row, any others into rows of their own, which a
second kernel adds.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_PIECE = 256  # picks that one program adds up
_MOST_COLUMNS = 4096  # that one program adds up
_FEWEST_COLUMNS = 128  # below it most threads would have none
_COLUMNS_PER_WARP = 512


def fits(vectors) -> bool:
    """Returns whether the kernels are for vectors (B, d) of this width."""
    return vectors.shape[1] >= _FEWEST_COLUMNS and vectors.shape[0] > 0


def row_sums(
    coefficients, indices, vectors, n: int, rows=None, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the sum (n, d) float32 of each latent's coefficients * vectors, for n latents.

    Args:
      coefficients: of each pick (B, k).
      indices: its latent (B, k).
      vectors: of each token (B, d), of any type; they are multiplied and added in float32.
      n: the number of latents.
      rows: an array (n, d), or None.
      interpret: whether the kernels are interpreted, which any device can do.

    Returns:
      The sums, and the product (B, k) of each token's vector with the rows that it picked; None
      without rows.
    """
    (B, k), d = indices.shape, vectors.shape[1]
    latents, order = _in_order_of_latents(indices)
    pieces = _Pieces(latents, n)
    columns = min(_MOST_COLUMNS, pl.next_power_of_2(d))
    blocks = pl.cdiv(d, columns)
    params = triton.CompilerParams(num_warps=max(1, columns // _COLUMNS_PER_WARP), num_stages=3)
    given = (rows,) if rows is not None else ()
    shapes = [(n, d), (pieces.most, d)] + [(blocks, B * k)] * len(given)
    with _moves(B * k * d * vectors.dtype.itemsize + (1 + len(given)) * 4 * n * d):
        sums, more, *products = pl.pallas_call(
            functools.partial(_sum_pieces, columns=columns, most=pieces.most),
            grid=(pieces.most + n, blocks),
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
            compiler_params=params,
            interpret=interpret,
            name="sum_pieces",
        )(
            *(pieces.owner, pieces.begin, pieces.end),
            *(order // k, coefficients.reshape(-1)[order], vectors, *given),
        )
    with _moves(2 * pieces.most * d * 4):
        (sums,) = pl.pallas_call(
            functools.partial(_add_pieces, columns=columns),
            grid=(pieces.most, blocks),
            out_shape=[jax.ShapeDtypeStruct((n, d), jnp.float32)],
            input_output_aliases={3: 0},
            compiler_params=params,
            interpret=interpret,
            name="add_pieces",
        )(pieces.owner, pieces.followers, more, sums)
    if rows is None:
        return sums, None
    in_place = (
        jnp.zeros(B * k, jnp.float32)
        .at[order]
        .set(products[0].sum(axis=0), unique_indices=True, mode="promise_in_bounds")
    )
    return sums, in_place.reshape(B, k)


def _moves(count: int):
    """Names the bytes that the kernels called in this context read and write.

    XLA's text of a program does not say how often a kernel reads its operands. `plan` finds the
    name there.
    """
    return jax.named_scope(f"moves_{count}_bytes")


def _in_order_of_latents(indices_Bxk):
    """Returns the latents (B k,) of all picks, ascending, and the places of their picks."""
    places = jnp.arange(indices_Bxk.size, dtype=jnp.int32)
    # Both are keys: a stable sort would carry the places a second time.
    return jax.lax.sort((indices_Bxk.reshape(-1), places), num_keys=2, is_stable=False)


class _Pieces:
    """How the picks of n latents, in order, are cut into pieces.

    The first `most` pieces are those that follow a latent's first one, and the n after them are
    first ones.

    Attributes:
      most: the most pieces that can follow first ones.
      owner: the latent of each piece (most + n,).
      begin: its first pick.
      end: the pick behind its last one; that of the first pick where it has none.
      followers: for each piece that follows a first one (most,), how many of the latent follow,
        this one included; 0 unless it is the second of its latent.
    """

    def __init__(self, latents, n: int):
        latent = jnp.arange(n, dtype=jnp.int32)
        bounds = jnp.searchsorted(
            latents, jnp.arange(n + 1, dtype=jnp.int32), method="scan_unrolled"
        ).astype(jnp.int32)
        start, stop = bounds[:-1], bounds[1:]
        following = jnp.maximum((stop - start + _PIECE - 1) // _PIECE - 1, 0)
        until = jnp.cumsum(following)
        self.most = max(1, len(latents) // _PIECE)
        piece = jnp.arange(self.most, dtype=jnp.int32)
        owner = jnp.searchsorted(until, piece, side="right", method="scan_unrolled")
        owner = jnp.minimum(owner, n - 1).astype(jnp.int32)
        nth = piece - (until - following)[owner]  # of those of the latent that follow
        begin = start[owner] + (nth + 1) * _PIECE
        exists = piece < until[-1]
        end = jnp.where(exists, jnp.minimum(begin + _PIECE, stop[owner]), begin)
        self.owner = jnp.concatenate([owner, latent])
        self.begin = jnp.concatenate([begin, start])
        self.end = jnp.concatenate([end, jnp.minimum(start + _PIECE, stop)])
        self.followers = jnp.where(exists & (nth == 0), following[owner], 0)


def _columns(width: int, count: int):
    """Returns the columns of this program, and which of them an array of that width has; None
    where it has them all.
    """
    column = pl.program_id(1) * count + jnp.arange(count)
    return column, None if width % count == 0 else column < width


def _sum_pieces(owner, begin, end, token, coefficient, vectors, *refs, columns: int, most: int):
    """Adds up one piece's picks; with rows also multiplies each with its row.

    `refs` are the results, behind the rows if there are any.
    """
    rows, sums, more, products = refs if len(refs) == 4 else (None, *refs, None)
    piece, block = pl.program_id(0), pl.program_id(1)
    column, there = _columns(vectors.shape[1], columns)
    latent = owner[piece]
    row = None if rows is None else _load(rows, latent, column, there)

    def add(pick, total):
        vector = _load(vectors, token[pick], column, there)
        if row is not None:
            products[block, pick] = jnp.sum(vector * row)
        return total + coefficient[pick] * vector

    total = jnp.zeros((columns,), jnp.float32)
    total = jax.lax.fori_loop(begin[piece], end[piece], add, total)
    first = piece >= most
    _store(sums, latent, column, _both(there, first, columns), total)
    _store(more, jnp.minimum(piece, most - 1), column, _both(there, ~first, columns), total)


def _add_pieces(owner, followers, more, _, sums, *, columns: int):
    """Adds the pieces that follow a latent's first one to its row."""
    piece = pl.program_id(0)
    column, there = _columns(sums.shape[1], columns)
    count = followers[piece]
    needed = _both(there, count > 0, columns)
    latent = owner[piece]

    def add(i, total):
        return total + _load(more, piece + i, column, there)

    total = triton.load(sums.at[latent, column], mask=needed, other=0.0)
    _store(sums, latent, column, needed, jax.lax.fori_loop(0, count, add, total))


def _load(ref, row, column, there):
    """Returns columns of a row of `ref` in float32; 0 where it has none."""
    other = None if there is None else jnp.zeros((), ref.dtype)
    return triton.load(ref.at[row, column], mask=there, other=other).astype(jnp.float32)


def _store(ref, row, column, mask, values):
    triton.store(ref.at[row, column], values, mask=mask)


def _both(there, flag, columns: int):
    """Returns a mask of columns that are there, all of them off unless a flag is set."""
    flags = jnp.broadcast_to(flag, (columns,))
    return flags if there is None else flags & there
