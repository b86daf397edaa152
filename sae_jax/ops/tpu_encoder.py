"""Encodes to the exact top k on a TPU, without the pre-activations in its memory.

A Pallas kernel multiplies a block of tokens with a block of the encoder's columns. Column i belongs
to bin i mod `_BINS`, and the largest `kept` values of each bin stay in the core's own memory until
all columns have gone by. A token's k largest values are among those of its bins, unless a bin holds
more of them than it keeps. That can be seen from what was kept, and is so for about one token in a
thousand. Such tokens, and those with equal values or NaN, are encoded again in the plain way.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sae_jax.ops import tpu_memory
from sae_jax.ops.sharding import matmul_f32
from sae_jax.ops.topk import top_k

_DTYPE = jnp.bfloat16  # of the operands; float32 ones are multiplied six times as slowly
_LANES = 128  # of a vector register
_BINS = 128
_COLUMNS = 1024  # of the encoder that a step of the kernel multiplies
_TOKENS = (1024, 512, 256)  # that it multiplies at once: the first that fit
_WIDEST = 8192  # input; with wider ones the compiler takes more memory than `_bytes`
_MOST_KEPT = 10  # of a bin: from about 12 on the ranking takes longer than the product
_DOUBTFUL = 1e-3  # the most tokens of random values, as a part of all, that are encoded again
_REDONE = 256  # tokens that are encoded again at once


def fits(rows: int, d_in: int, n: int, k: int, dtype) -> bool:
    """Returns whether `encode` takes (rows, d_in) inputs, n latents, and this k and dtype."""
    return (
        dtype == _DTYPE
        and rows > 0
        and n % _COLUMNS == 0
        and n >= 8 * _COLUMNS
        and d_in % _LANES == 0
        and d_in <= _WIDEST
        and _kept(k) <= _MOST_KEPT
        and _tokens(rows, d_in, _kept(k)) > 0
    )


def encode(x, w_enc, b_enc, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest of each row of `x @ w_enc + b_enc` (B, k), descending, and their
    indices, int32.

    Ties go to the lower index, as in `jax.lax.top_k`.

    Args:
      x: inputs (B, d_in), of `_DTYPE`.
      w_enc: the encoder (d_in, n), of `_DTYPE`.
      b_enc: its bias (n,), float32.
      k: how many are picked. `fits` says for which shapes.
    """
    candidates, blocks = _bin_maxima(x, w_enc, b_enc, _kept(k))
    values, places = jax.lax.top_k(candidates, k)
    indices = jnp.take_along_axis(blocks, places, axis=1) * _BINS + places % _BINS
    return _encode_again(x, w_enc, b_enc, values, indices, _certified(candidates, values))


def _certified(candidates_BxC, values_Bxk):
    """Returns for which tokens (B,) the k largest candidates are known to be the top k, in order.

    No bin may have kept nothing but values as large as the k-th, no two of the k and no other
    candidate may be equal, and none may be NaN.
    """
    last = values_Bxk[:, -1:]
    kept_all = candidates_BxC[:, -_BINS:] < last
    reached = jnp.sum(~(candidates_BxC < last), axis=1) == values_Bxk.shape[1]
    descending = (values_Bxk[:, :-1] > values_Bxk[:, 1:]).all(axis=1)
    return kept_all.all(axis=1) & reached & descending & ~jnp.isnan(values_Bxk[:, 0])


def _encode_again(x, w_enc, b_enc, values, indices, certified):
    """Returns values and indices with the rows that are not certified encoded plainly."""
    B, k = values.shape
    # The rows in doubt come first. The others are no rows, to which nothing is written.
    rows = jnp.sort(jnp.where(certified, B, jnp.arange(B, dtype=jnp.int32)))
    size = min(_REDONE, B)

    def encode_some(i, found):
        mine = jax.lax.dynamic_slice_in_dim(rows, i * size, size)
        again = top_k(matmul_f32(x[jnp.minimum(mine, B - 1)], w_enc), k, b_enc)
        return tuple(a.at[mine].set(b, mode="drop") for a, b in zip(found, again, strict=True))

    times = -(-jnp.sum(~certified) // size)
    return jax.lax.fori_loop(0, times, encode_some, (values, indices))


def _bin_maxima(x, w_enc, b_enc, kept: int):
    """Returns the largest `kept` values of each bin (B, kept * _BINS), the largest of all bins
    first, and for each the number of the block of `_BINS` columns that it comes from.
    """
    (B, d), n = x.shape, w_enc.shape[1]
    tokens = _tokens(B, d, kept)
    outputs = pl.BlockSpec((tokens, kept * _BINS), lambda i, j: (i, 0))
    flops = 2 * B * d * n
    moved = x.dtype.itemsize * d * (n * (B // tokens) + B) + 8 * B * kept * _BINS
    kernel = pl.pallas_call(
        functools.partial(_keep_largest, kept=kept),
        grid=(B // tokens, n // _COLUMNS),
        in_specs=[
            pl.BlockSpec((tokens, d), lambda i, j: (i, 0)),
            pl.BlockSpec((d, _COLUMNS), lambda i, j: (0, j)),
            pl.BlockSpec((1, _COLUMNS), lambda i, j: (0, j)),
        ],
        out_specs=[outputs, outputs],
        out_shape=[
            jax.ShapeDtypeStruct((B, kept * _BINS), jnp.float32),
            jax.ShapeDtypeStruct((B, kept * _BINS), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tpu_memory.for_kernels(),
        ),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        name="encode_bin_maxima",
    )
    with jax.named_scope(f"moves_{moved}_bytes_of_{flops}_flops"):  # for plan, which reads names
        return kernel(x, w_enc, b_enc[None])


def _keep_largest(x_ref, w_ref, b_ref, values_ref, blocks_ref, *, kept: int):
    """Inserts the pre-activations of one step into the bins' descending lists."""
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        values_ref[...] = jnp.full(values_ref.shape, -jnp.inf, jnp.float32)
        blocks_ref[...] = jnp.zeros(blocks_ref.shape, jnp.int32)

    # Whatever jax_default_matmul_precision is: Mosaic has no "highest" for bfloat16.
    products = jnp.dot(
        x_ref[...], w_ref[...], precision="default", preferred_element_type=jnp.float32
    )
    products += b_ref[...]
    lists = [slice(s * _BINS, (s + 1) * _BINS) for s in range(kept)]
    values = [values_ref[:, s] for s in lists]
    blocks = [blocks_ref[:, s] for s in lists]
    each = _COLUMNS // _BINS
    for part in range(each):
        value = products[:, part * _BINS : (part + 1) * _BINS]
        block = jnp.full(value.shape, step * each + part, jnp.int32)
        before = value != value  # NaN goes before everything and stays there, to be seen
        for s in range(kept):
            # What is there already has the lower index, and stays before its equals. What follows
            # on the place of the new value moves down.
            before = before | (value > values[s])
            values[s], value = (
                jnp.where(before, value, values[s]),
                jnp.where(before, values[s], value),
            )
            blocks[s], block = (
                jnp.where(before, block, blocks[s]),
                jnp.where(before, blocks[s], block),
            )
    for s, place in enumerate(lists):
        values_ref[:, place], blocks_ref[:, place] = values[s], blocks[s]


def _kept(k: int) -> int:
    """Returns how many values a bin keeps, so that few tokens are in doubt; one above `_MOST_KEPT`
    at least where that is too few.
    """
    kept = max(2, -(-k // _BINS))
    while kept <= _MOST_KEPT and math.comb(k, kept) > _DOUBTFUL * _BINS ** (kept - 1):
        kept += 1
    return kept


def _tokens(rows: int, d_in: int, kept: int) -> int:
    """Returns how many tokens a step of the kernel multiplies, 0 where there is no such size."""
    most = tpu_memory.for_kernels()
    return next((t for t in _TOKENS if rows % t == 0 and _bytes(t, d_in, kept) <= most), 0)


def _bytes(tokens: int, d_in: int, kept: int) -> int:
    """Returns the bytes of the core's memory that the kernel takes: its blocks twice, the products
    with the bias and without, and the lists while they change.
    """
    lists = 8 * tokens * kept * _BINS
    blocks = 2 * tokens * d_in + 2 * d_in * _COLUMNS + lists
    return 2 * blocks + 8 * tokens * _COLUMNS + lists + 2**20
