"""Gradients of picked rows, from the picks in the order of their latents.

A TPU adds to rows of its memory one after the other, and much faster where they are in order. So
the picks are sorted before any row is formed.
"""

import jax
import jax.numpy as jnp

from sae_jax.ops import tpu_rows

_SLICE_BYTES = 2**30  # the most bytes of rows at once


def row_sums(coefficients, indices, vectors, n: int, transposed: bool = False) -> jax.Array:
    """Returns the sum (n, d) float32 of each latent's coefficients * vectors, for n latents.

    Args:
      coefficients: of each pick (B, k).
      indices: its latent (B, k).
      vectors: of each token (B, d).
      n: the number of latents.
      transposed: whether the result is (d, n).
    """
    latents, order, coefficients = _sort(indices, coefficients)
    tokens = order // indices.shape[1]
    if tpu_rows.fits(indices.size, vectors, n):
        return tpu_rows.row_sums(latents, tokens, coefficients, vectors, n, transposed)
    sums = _scatter(latents, tokens, coefficients, vectors, n)
    return sums.T if transposed else sums


def products_and_row_sums(values, indices, vectors, rows) -> tuple[jax.Array, jax.Array]:
    """Returns the products (B, k) of each token's vector with the rows that it picked, and for each
    row the sum (n, d) of its values * vectors, for shapes that `tpu_rows` has a kernel for.

    Args:
      values: of each pick (B, k).
      indices: its row (B, k).
      vectors: of each token (B, d).
      rows: (n, d).
    """
    latents, order, coefficients = _sort(indices, values)
    tokens = order // indices.shape[1]
    sums, products = tpu_rows.row_sums_and_products(latents, tokens, coefficients, vectors, rows)
    _, products = jax.lax.sort((order, products), num_keys=1, is_stable=False)
    return products.reshape(indices.shape), sums


def _sort(indices, coefficients):
    """Returns the latents (B k,) in their order, the places of their picks, and the
    coefficients.
    """
    places = jnp.arange(indices.size, dtype=jnp.int32)
    picks = indices.reshape(-1), places, coefficients.reshape(-1)
    return jax.lax.sort(picks, num_keys=1)


def _scatter(latents, tokens, coefficients, vectors, n: int):
    """Returns the sums (n, d), for shapes that have no kernel."""
    d = vectors.shape[1]
    most = max(1, min(_SLICE_BYTES // (4 * d), len(latents)))
    size = next(s for s in range(most, 0, -1) if len(latents) % s == 0)

    def add(total, picks):
        latents, tokens, coefficients = picks
        terms = coefficients[:, None] * vectors[tokens].astype(jnp.float32)
        total = total.at[latents].add(terms, indices_are_sorted=True, mode="promise_in_bounds")
        return total, None

    picks = tuple(a.reshape(-1, size) for a in (latents, tokens, coefficients))
    return jax.lax.scan(add, jnp.zeros((n, d), jnp.float32), picks)[0]
