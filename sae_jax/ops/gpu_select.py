"""Finds the places of the k largest elements of rows on a GPU, without sorting them.

One program of a Pallas kernel (Triton) keeps a row in registers. It finds the k-th largest element
bit by bit, and then writes the places of those that are not smaller.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

MOST = 32_768  # elements of a row: what registers hold
_LEAST = -(2**31)
_PER_THREAD = 32  # elements, up to which a thread's registers are many enough for any kernel
_MOST_WARPS = 16


def places_of_top_k(x_RxN: jax.Array, k: int, *, interpret: bool = False) -> jax.Array:
    """Returns the places (R, k) int32 of the k largest elements of each row, in ascending order.

    Ties go to the lower place. Elements are ordered as in `jax.lax.top_k`, NaN above infinity.

    Args:
      x_RxN: rows of at most `MOST` float32 elements.
      k: how many, at most N.
      interpret: whether the kernel is interpreted, which any device can do.
    """
    R, N = x_RxN.shape
    if not R or not k:
        return jnp.zeros((R, k), jnp.int32)
    width = pl.next_power_of_2(N)
    with jax.named_scope(f"moves_{4 * R * (N + k)}_bytes"):
        places = pl.pallas_call(
            functools.partial(_select, k=k, width=width),
            grid=(R,),
            # The last column is where elements go that are none of the k.
            out_shape=jax.ShapeDtypeStruct((R, k + 1), jnp.int32),
            compiler_params=triton.CompilerParams(
                num_warps=min(_MOST_WARPS, max(1, width // (32 * _PER_THREAD))), num_stages=1
            ),
            interpret=interpret,
            name="select_top_k",
        )(x_RxN)
    return places[:, :k]


def _select(x_ref, places_ref, *, k: int, width: int):
    row, column = pl.program_id(0), jnp.arange(width)
    there = column < x_ref.shape[1]
    bits = jax.lax.bitcast_convert_type(
        triton.load(x_ref.at[row, column], mask=there, other=0.0), jnp.int32
    )
    keys = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # in the order of the elements
    keys = jnp.where(there, keys, _LEAST)

    def refine(i, found):
        tried = found | (1 << (30 - i))
        return jnp.where(_count(keys >= tried) >= k, tried, found)

    # The largest number that k keys reach. Its sign first, as it orders the other way.
    last = _LEAST * (_count(keys >= 0) < k).astype(jnp.int32)
    last = jax.lax.fori_loop(0, 31, refine, last)
    above, level = keys > last, keys == last
    wanted = k - _count(above)
    kept = above | (level & (jnp.cumsum(level.astype(jnp.int32)) <= wanted))
    place = jnp.cumsum(kept.astype(jnp.int32)) - 1
    triton.store(places_ref.at[row, jnp.where(kept, place, k)], column, mask=kept)


def _count(mask):
    return jnp.sum(mask.astype(jnp.int32))
