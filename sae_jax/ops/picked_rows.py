"""Rows that tokens picked, on one device: their weighted sums, and the gradients of these.

A token picks k rows of an array (n, d). Decoding sums them, weighted by values. The gradient of the
values are products of the rows with vectors of tokens, and that of the rows are sums of vectors of
the tokens that picked them. (B, k, d) is never written.

A CPU adds token by token in its cache. A GPU (`gpu_rows`) and a TPU (`tpu_rows`, `sorted_picks`)
sum from the picks in the order of their rows, and write each row once.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from sae_jax.ops import gpu_rows, sorted_picks, tpu_rows
from sae_jax.ops.sharding import on_cpu, on_gpu, on_tpu

_CPU_PRODUCT_ROWS = 16  # tokens whose picked rows stay in a CPU's cache
_SLICE_BYTES = 2**30  # the most bytes of picked rows at once on other devices
_UNROLL = 32  # picks whose rows are added in one fused pass

Term = tuple[jax.Array, jax.Array, jax.Array, jax.Array | bool]
"""Picks: coefficients (B, k), indices (B, k), vectors of the tokens (B, d), and whether they count,
which is a scalar."""


def copy_for_gathers(a: jax.Array, compute_dtype) -> jax.Array:
    """Returns what products of picked rows read of an array.

    On a GPU, which is bound by what it reads, it is a copy in `compute_dtype`. Products and sums
    are float32 everywhere.
    """
    if not on_gpu() or a.dtype == compute_dtype:
        return a
    # Behind a barrier, or the conversion would be fused into the reads of what is converted.
    return jax.lax.optimization_barrier(a.astype(compute_dtype))


def sum_weighted_rows(values_Bxk, indices_Bxk, w_Nxd):
    """Returns the sum over k of values * w[indices], (B, d) float32.

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

    total = jnp.zeros((values_Bxk.shape[0], w_Nxd.shape[1]), jnp.float32)
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


def products_with_rows(g_Bxd, indices_Bxk, w_Nxd):
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


def scatter_rows(terms: list[Term], n: int, transposed: bool = False) -> jax.Array:
    """Returns the sum (n, d) float32 of each row's coefficients * vectors, for n rows.

    With `transposed` the result is (d, n).
    """
    first, *others = terms
    if _in_order(first[2]):
        total = _sums(*first[:3], n, transposed)
        for *term, counts in others:
            total = jax.lax.cond(
                counts,
                lambda total, term=term: total + _sums(*term, n, transposed),
                lambda total: total,
                total,
            )
        return total
    total = jnp.zeros((n, first[2].shape[1]), jnp.float32)
    total = jax.lax.platform_dependent(total, terms, cpu=add_token_by_token, default=_add_at_once)
    return _transposed(total, first[1]) if transposed else total


def decode_gradients(terms: list[Term], w_Nxd) -> tuple[list[jax.Array], jax.Array]:
    """Returns the gradients of what decodes to the sums of weighted rows.

    Args:
      terms: the values, their indices, and the gradients (B, d) of what they decode to.
      w_Nxd: the rows.

    Returns:
      The gradients (B, k) of each term's values, and those (n, d) of the rows.
    """
    of_values, total = [], None
    for values, indices, vectors, counts in terms:

        def products(values=values, indices=indices, vectors=vectors):
            return products_with_rows(vectors, indices, w_Nxd)

        def products_and_sums(total, values=values, indices=indices, vectors=vectors):
            found, sums = _products_and_sums(values, indices, vectors, w_Nxd)
            return found, sums if total is None else total + sums

        def nothing(total=None, values=values):
            zeros = jnp.zeros_like(values)
            return zeros if total is None else (zeros, total)

        if not _in_order(vectors):
            found = products() if counts is True else jax.lax.cond(counts, products, nothing)
        elif counts is True:
            found, total = products_and_sums(total)
        else:
            found, total = jax.lax.cond(counts, products_and_sums, nothing, total)
        of_values.append(found)
    return of_values, scatter_rows(terms, len(w_Nxd)) if total is None else total


# --------------------------------------------------------------------- in the order of the rows


def _in_order(vectors) -> bool:
    """Returns whether sums are made from the picks in the order of their rows."""
    return on_tpu() or (on_gpu() and gpu_rows.fits(vectors))


def _sums(coefficients, indices, vectors, n: int, transposed: bool):
    if on_tpu():
        return sorted_picks.row_sums(coefficients, indices, vectors, n, transposed)
    sums, _ = gpu_rows.row_sums(coefficients, indices, vectors, n)
    return _transposed(sums, indices) if transposed else sums


def _products_and_sums(values, indices, vectors, w_Nxd):
    """Returns the products (B, k) and the sums (n, d) of one visit to each row."""
    if on_gpu():
        sums, products = gpu_rows.row_sums(values, indices, vectors, len(w_Nxd), w_Nxd)
        return products, sums
    if tpu_rows.fits(indices.size, vectors, len(w_Nxd)):
        return sorted_picks.products_and_row_sums(values, indices, vectors, w_Nxd)
    products = products_with_rows(vectors, indices, w_Nxd)
    return products, sorted_picks.row_sums(values, indices, vectors, len(w_Nxd))


def _transposed(a: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns the transpose of sums as an array in memory.

    On a CPU, XLA would read the columns of `a` in each of the passes that the norm and the
    optimiser make over it. It fuses nothing into a branch, such as this one, which is always taken.
    On a GPU the optimiser could not update in place in a pass that transposes.
    """
    if on_gpu():
        return jax.lax.optimization_barrier(with_layout_constraint(a.T, Layout((0, 1))))
    if not on_cpu() or not indices.size:
        return a.T
    return jax.lax.cond(indices.ravel()[0] >= 0, lambda: a.T, lambda: jnp.zeros_like(a.T))


# --------------------------------------------------------------------------- as the tokens come


def add_token_by_token(total, terms):
    """Adds terms on one thread, whose cache holds a token's vector."""
    for coefficients, indices, vectors, counts in terms:

        def add(b, total, coefficients=coefficients, indices=indices, vectors=vectors):
            rows = coefficients[b][:, None] * vectors[b].astype(jnp.float32)
            return total.at[indices[b]].add(rows, mode="promise_in_bounds")

        total = jax.lax.fori_loop(0, jnp.where(counts, len(vectors), 0), add, total)
    return total


def _add_at_once(total, terms):
    """Adds terms where XLA fuses the products into the scatter and never writes them."""
    for coefficients, indices, vectors, counts in terms:

        def add(total, coefficients=coefficients, indices=indices, vectors=vectors):
            rows = coefficients[:, :, None] * vectors[:, None, :].astype(jnp.float32)
            return total.at[indices].add(rows, mode="promise_in_bounds")

        total = jax.lax.cond(counts, add, lambda total: total, total)
    return total
