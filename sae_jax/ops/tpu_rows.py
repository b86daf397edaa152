"""Adds up picked vectors on a TPU: the gradients of picked rows with one visit to each row.

A Pallas kernel goes through the picks in the order of their latents. It fetches the vectors of a
chunk's tokens one by one while it works on the chunk before, and adds them to the rows of a tile of
latents in the core's own memory. Every row is written once. The products of the vectors with the
rows themselves, which are the gradient of the picked values, come from the same visit. Decoding is
the same sum with tokens for latents, and latents for tokens.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sae_jax.ops import tpu_memory

_TILE = 128  # latents whose rows are in the core's memory at once
_CHUNK = 128  # picks that are fetched at once
_LANES, _SUBLANES = 128, 8  # of a vector register
_UNROLL = 8  # picks


def fits(picks: int, vectors, n: int) -> bool:
    """Returns whether the kernel takes so many picks of vectors (B, d) into n sums."""
    count, d = vectors.shape
    return (
        count >= _CHUNK
        and picks % _CHUNK == 0
        and n % _TILE == 0
        and d % (_LANES * _SUBLANES) == 0
        and _bytes(d, vectors.dtype.itemsize) <= tpu_memory.for_kernels()
    )


def _bytes(d: int, itemsize: int) -> int:
    """Returns the bytes of the core's memory that the kernel takes with products: rows of a tile
    six times, of which those that are read and written twice, and vectors of two chunks.
    """
    return 6 * 4 * (_TILE + 1) * d + 2 * _CHUNK * d * itemsize + 4 * _CHUNK * _SUBLANES * _LANES


def decode(values, indices, rows) -> jax.Array:
    """Returns the sum (B, d) float32 of values (B, k) times rows (n, d) at indices (B, k)."""
    B, k = indices.shape
    tokens = jnp.repeat(jnp.arange(B, dtype=jnp.int32), k)
    return row_sums(tokens, indices.reshape(-1), values.reshape(-1), rows, B)


def row_sums(latents, tokens, coefficients, vectors, n: int, transposed: bool = False):
    """Returns for each latent the sum of its picks' coefficient * vector of the token.

    Args:
      latents: the latent of each pick (P,) int32, ascending.
      tokens: its token (P,) int32.
      coefficients: its coefficient (P,) float32.
      vectors: (B, d), float32 or bfloat16.
      n: the number of latents.
      transposed: whether the result is (d, n) instead of (n, d); it is float32.
    """
    picks = latents, tokens, coefficients
    return _visit_rows(picks, vectors, n, None, transposed)[0]


def row_sums_and_products(latents, tokens, coefficients, vectors, rows):
    """Returns the same as `row_sums` (n, d), and the products (P,) of each pick's vector and row.

    `rows` are (n, d) float32. The other arguments are those of `row_sums`.
    """
    picks = latents, tokens, coefficients
    n = rows.shape[0]
    sums, products, firsts = _visit_rows(picks, vectors, n, rows, False)
    # A chunk may have picks of several tiles. What is not of the first of them is added here.
    starts = _tile_starts(latents, n)[:-1]
    shared = jnp.where(starts < latents.size, starts, 0) // _CHUNK
    return sums, products.at[shared].add(firsts).reshape(-1)


def _tile_starts(latents, n: int):
    """Returns the first pick of each tile of latents, and the number of picks."""
    ends = jnp.arange(0, n + _TILE, _TILE, dtype=jnp.int32)
    return jnp.searchsorted(latents, ends).astype(jnp.int32)


def _visit_rows(picks, vectors, n: int, rows, transposed: bool):
    """Returns the sums, and if there are rows the products (P / _CHUNK, 1, _CHUNK) and those of the
    first chunk of each tile that it shares with the tile before.
    """
    latents, tokens, coefficients = picks
    d, groups = vectors.shape[1], vectors.shape[1] // _LANES
    chunks = latents.size // _CHUNK
    in_chunks = [a.reshape(chunks, _CHUNK) for a in (latents, tokens, coefficients)]
    tile = (_TILE, groups, _LANES)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    in_specs = [anywhere] * 3
    operands = [
        jnp.concatenate(in_chunks[:2], axis=1),
        in_chunks[2],
        vectors.reshape(-1, groups, _LANES),
    ]
    out_shape = [jax.ShapeDtypeStruct((d, n) if transposed else (n, d), jnp.float32)]
    out_specs = [
        pl.BlockSpec((d, _TILE), lambda t, _: (0, t))
        if transposed
        else pl.BlockSpec((_TILE, d), lambda t, _: (t, 0))
    ]
    scratch = dict(
        numbers=pltpu.SMEM((4, 2 * _CHUNK), jnp.int32),
        coefficients=pltpu.SMEM((4, _CHUNK), jnp.float32),
        fetched=pltpu.VMEM((2, _CHUNK, *tile[1:]), vectors.dtype),
        sums=pltpu.VMEM((_TILE + 1, *tile[1:]), jnp.float32),
        numbers_read=pltpu.SemaphoreType.DMA((4,)),
        vectors_read=pltpu.SemaphoreType.DMA((2,)),
    )
    if rows is not None:
        in_specs.append(pl.BlockSpec((_TILE, d), lambda t, _: (t, 0)))
        operands.append(rows)
        out_shape += [
            jax.ShapeDtypeStruct((count, 1, _CHUNK), jnp.float32) for count in (chunks, n // _TILE)
        ]
        out_specs += [anywhere, pl.BlockSpec((1, 1, _CHUNK), lambda t, _: (t, 0, 0))]
        scratch |= dict(
            rows=pltpu.VMEM((_TILE + 1, *tile[1:]), jnp.float32),
            parts=pltpu.VMEM((_CHUNK, _SUBLANES, _LANES), jnp.float32),
            products=pltpu.VMEM((2, 1, _CHUNK), jnp.float32),
            products_written=pltpu.SemaphoreType.DMA((2,)),
        )
    moved = latents.size * d * vectors.dtype.itemsize + (1 if rows is None else 2) * 4 * n * d
    kernel = pl.pallas_call(
        functools.partial(_visit_tile, names=tuple(scratch), transposed=transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(n // _TILE,),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=tpu_memory.for_kernels(),
            disable_bounds_checks=True,  # they would take as long as the rest of a pick
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * latents.size * d, bytes_accessed=moved, transcendentals=0
        ),
        name="row_sums" if rows is None else "row_sums_and_products",
    )
    with jax.named_scope(f"moves_{moved}_bytes"):  # for plan, which reads names
        return kernel(_tile_starts(latents, n), *operands)


def _visit_tile(starts_ref, numbers_hbm, coefficients_hbm, vectors_hbm, *refs, names, transposed):
    """Adds up the rows of one tile of latents; refs are the rows, the results and the scratch."""
    scratch = dict(zip(names, refs[-len(names) :], strict=True))
    blocks = refs[: -len(names)]
    multiplies = "rows" in scratch
    sums, fetched = scratch["sums"], scratch["fetched"]
    tile = pl.program_id(0)
    begin, end = starts_ref[tile], starts_ref[tile + 1]
    first = begin // _CHUNK
    last = jnp.where(end > begin, -(-end // _CHUNK), first)

    def numbers_copies(c):
        slot = jax.lax.rem(c, 4)
        sem = scratch["numbers_read"].at[slot]
        return (
            pltpu.make_async_copy(numbers_hbm.at[c], scratch["numbers"].at[slot], sem),
            pltpu.make_async_copy(coefficients_hbm.at[c], scratch["coefficients"].at[slot], sem),
        )

    def read_numbers(c):
        for copy in numbers_copies(c):
            copy.start()

    def await_numbers(c):
        for copy in numbers_copies(c):
            copy.wait()

    def read_vector(c, r):
        token = scratch["numbers"][jax.lax.rem(c, 4), _CHUNK + r]
        slot = jax.lax.rem(c, 2)
        pltpu.make_async_copy(
            vectors_hbm.at[token], fetched.at[slot, r], scratch["vectors_read"].at[slot]
        ).start()

    def await_vectors(c):
        slot = jax.lax.rem(c, 2)
        pltpu.make_async_copy(  # waits for the bytes of all of them
            vectors_hbm.at[pl.ds(0, _CHUNK)], fetched.at[slot], scratch["vectors_read"].at[slot]
        ).wait()

    def add_pick(c, r):
        latent = scratch["numbers"][jax.lax.rem(c, 4), r] - tile * _TILE
        # Picks of other tiles go to a row that nobody reads.
        row = jnp.where((latent >= 0) & (latent < _TILE), latent, _TILE)
        vector = fetched[jax.lax.rem(c, 2), r].astype(jnp.float32)
        sums[row] += scratch["coefficients"][jax.lax.rem(c, 4), r] * vector
        if multiplies:
            product = vector * scratch["rows"][row]
            scratch["parts"][r] = product.reshape(-1, _SUBLANES, _LANES).sum(axis=0)

    def add_chunk(c, reads_next: bool):
        def body(r, carry):
            if reads_next:
                read_vector(c + 1, r)
            add_pick(c, r)
            return carry

        jax.lax.fori_loop(0, _CHUNK, body, 0, unroll=_UNROLL)

    # Only the first chunk may begin in the tile before.
    own = first + (first * _CHUNK < begin).astype(jnp.int32)

    def product_copy(c):
        slot = jax.lax.rem(c, 2)
        return pltpu.make_async_copy(
            scratch["products"].at[slot], blocks[2].at[c], scratch["products_written"].at[slot]
        )

    def write_products(c):
        picks = c * _CHUNK + jax.lax.broadcasted_iota(jnp.int32, (1, _CHUNK), 1)
        products = scratch["parts"][...].sum(axis=1).T.sum(axis=0, keepdims=True)
        products = jnp.where((picks >= begin) & (picks < end), products, 0.0)

        @pl.when(c < own)
        def _():
            blocks[3][0] = products

        @pl.when(c >= own)
        def _():
            @pl.when(c >= own + 2)
            def _():
                product_copy(c - 2).wait()

            scratch["products"][jax.lax.rem(c, 2)] = products
            product_copy(c).start()

    def visit_chunk(c, carry):
        @pl.when(c + 2 < last)
        def _():
            read_numbers(c + 2)

        await_vectors(c)

        @pl.when(c + 1 < last)
        def _():
            await_numbers(c + 1)
            add_chunk(c, reads_next=True)

        @pl.when(c + 1 == last)
        def _():
            add_chunk(c, reads_next=False)

        if multiplies:
            write_products(c)
        return carry

    @pl.when(first < last)
    def _():
        read_numbers(first)

        @pl.when(first + 1 < last)
        def _():
            read_numbers(first + 1)

        await_numbers(first)

        def body(r, carry):
            read_vector(first, r)
            return carry

        jax.lax.fori_loop(0, _CHUNK, body, 0, unroll=_UNROLL)

    sums[...] = jnp.zeros(sums.shape, sums.dtype)
    groups = [(g, slice(g * _LANES, (g + 1) * _LANES)) for g in range(sums.shape[1])]
    if multiplies:
        blocks[3][...] = jnp.zeros(blocks[3].shape, jnp.float32)
        for g, columns in groups:
            scratch["rows"][:_TILE, g, :] = blocks[0][:, columns]
    jax.lax.fori_loop(first, last, visit_chunk, 0)
    if multiplies:
        for back in (2, 1):

            @pl.when(last - back >= own)
            def _(back=back):
                product_copy(last - back).wait()

    out = blocks[1] if multiplies else blocks[0]
    for g, columns in groups:
        if transposed:
            out[columns, :] = sums[:_TILE, g, :].T
        else:
            out[:, columns] = sums[:_TILE, g, :]
