"""Finds the exact top k of long rows in two stages."""

import jax
import jax.numpy as jnp

from sae_jax.ops import gpu_select
from sae_jax.ops.sharding import on_cpu, on_gpu

_CPU_PARTS = 8  # XLA ranks rows on one thread; so many parts of them at once
_GROUP = 16  # measured best of 8..64 on a CPU at 24,576 latents


def top_k(x_BxN: jax.Array, k: int, bias_N: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest values of each row of x + bias (B, k), descending, and their indices,
    int32.

    Ties go to the lower index, as in `jax.lax.top_k`, whose result this is for rows without NaN.

    The k largest lie in the k groups of consecutive elements that have the largest maxima: every
    element of another group is beaten, or tied by a lower index, by these k maxima. So only k * 16
    candidates are ranked instead of N, and the sum with the bias is never written for the others.
    """
    B, N = x_BxN.shape
    size = _group_size(N, k)
    groups = -(-N // size)
    if groups < 2 * k:
        return _ranked(x_BxN if bias_N is None else x_BxN + bias_N, k)
    spare = groups * size - N
    x_BxGxM = _grouped(x_BxN, spare, size)
    bias_GxM = None if bias_N is None else _grouped(bias_N, spare, size)
    sums_BxGxM = x_BxGxM if bias_N is None else x_BxGxM + bias_GxM
    # In order of the groups, so that candidates are in order of their indices and ties among
    # them still go to the lower one.
    group_Bxk = _places(sums_BxGxM.max(axis=2), k)
    candidates_BxkxM = jnp.take_along_axis(x_BxGxM, group_Bxk[:, :, None], axis=1)
    if bias_N is not None:
        candidates_BxkxM += bias_GxM[group_Bxk]
    values, position = _ranked(candidates_BxkxM.reshape(B, k * size), k)
    group = jnp.take_along_axis(group_Bxk, position // size, axis=1)
    # A row with fewer than k finite elements may pick the padding.
    return values, jnp.minimum(group * size + position % size, N - 1)


def _group_size(N: int, k: int) -> int:
    """Returns how many consecutive elements are a group.

    On a GPU there are more of them where the maxima would else not fit in a program, as long as
    the candidates do.
    """
    size = _GROUP
    while on_gpu() and N > size * gpu_select.MOST and 2 * size * k <= gpu_select.MOST:
        size *= 2
    return size


def _grouped(x: jax.Array, spare: int, size: int) -> jax.Array:
    """Splits the last axis into groups of a size.

    They are filled up so that no filling is picked before an element.
    """
    if spare:
        widths = [(0, 0)] * (x.ndim - 1) + [(0, spare)]
        x = jnp.pad(x, widths, constant_values=-jnp.inf)
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _places(x: jax.Array, k: int) -> jax.Array:
    """Returns the indices of `jax.lax.top_k` in ascending order, int32."""
    if _selects(x):
        return gpu_select.places_of_top_k(x, k)
    return jnp.sort(_ranked(x, k)[1], axis=1)


def _ranked(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns `jax.lax.top_k` with int32 indices."""
    if _selects(x):  # then only the k are sorted
        places = gpu_select.places_of_top_k(x, k)
        values, order = jax.lax.top_k(jnp.take_along_axis(x, places, axis=1), k)
        return values, jnp.take_along_axis(places, order, axis=1)
    rows = x.shape[0]
    if on_cpu() and rows >= _CPU_PARTS**2 and rows % _CPU_PARTS == 0:
        parts = [jax.lax.top_k(part, k) for part in jnp.split(x, _CPU_PARTS)]
        values, indices = map(jnp.concatenate, zip(*parts, strict=True))
    else:
        values, indices = jax.lax.top_k(x, k)
    return values, indices.astype(jnp.int32)


def _selects(x: jax.Array) -> bool:
    """Returns whether rows are ranked by the kernel for GPUs, which does not sort them."""
    return on_gpu() and x.dtype == jnp.float32 and x.shape[1] <= gpu_select.MOST
