"""Computes causal attention, with the device's fused kernel where it has one.

In shapes, b is the batch, t and s are positions of queries and keys, n is the number of key/value
heads, g that of query heads of each, and k that of a head's features.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sae_jax.lm.architecture import LayerKind, Rope

_FUSED_HEAD = 128  # the widest head that cuDNN's kernel takes on every GPU that has it
_QUERIES = 64  # of a block: its scores stay in a CPU's cache
_MAX_BLOCKS = 16  # each is a part of the compiled program


def attend(q, k, v, kind: LayerKind, softcap: float | None, first=None, slot=None):
    """Returns what each head's queries attend to, (b, t, n, g, k).

    Scores and softmax are float32. On a mesh each device computes its own rows and heads, and
    nothing is sent.

    Args:
      q: queries (b, t, n, g, k).
      k: keys (b, s, n, k).
      v: values (b, s, n, k).
      kind: how the layer attends.
      softcap: the bound c of scores c * tanh(score / c); None: there is none.
      first: (b,), the first key that each row may see; what is before it is padding. None: 0.
      slot: the key that the first query has itself, a traced scalar. None: 0.
    """
    run = functools.partial(_attend, kind=kind, softcap=softcap)
    mesh = jax.typeof(q).sharding.mesh
    operands = (q, k, v, first, slot)
    if mesh.empty:
        return run(*operands)
    specs = jax.tree.map(lambda x: P(*jax.typeof(x).sharding.spec), operands)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[0])(*operands)


def rotate(x, rope: Rope, positions):
    """Returns x (b, t, *heads, k) with its features rotated by their positions, in x's dtype.

    positions: (b, t), or (1, t) where all rows have the same.
    """
    frequencies = rope.frequencies(x.shape[-1])
    angle = positions.astype(jnp.float32)[..., None] * frequencies
    angle = jnp.expand_dims(angle, tuple(range(2, x.ndim - 1)))
    cos, sin = (rope.attention_factor * f(angle) for f in (jnp.cos, jnp.sin))
    turning, still = x[..., : 2 * len(frequencies)], x[..., 2 * len(frequencies) :]
    a, b = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
    turned = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate([*(t.astype(x.dtype) for t in turned), still], axis=-1)


def _attend(q, k, v, first, slot, *, kind: LayerKind, softcap):
    plain = functools.partial(_in_blocks, first=first, slot=slot, kind=kind, softcap=softcap)
    half, width = q.dtype in (jnp.bfloat16, jnp.float16), q.shape[-1]
    takes = half and softcap is None and width <= _FUSED_HEAD and width % 8 == 0
    takes = takes and first is None and slot is None
    if jax.default_backend() == "gpu" and takes:
        fused = functools.partial(_fused, kind=kind)
        with contextlib.suppress(RuntimeError):  # no cuDNN, or a GPU older than its kernel
            return jax.lax.platform_dependent(q, k, v, cuda=fused, default=plain)
    return plain(q, k, v)


def _fused(q, k, v, *, kind: LayerKind):
    b, t, n, g, width = q.shape
    mixed = jax.nn.dot_product_attention(
        q.reshape(b, t, n * g, width),
        k,
        v,
        scale=kind.attn_scale,
        is_causal=True,
        local_window_size=None if kind.window is None else (kind.window - 1, 0),
        implementation="cudnn",
    )
    return mixed.reshape(q.shape)


def _in_blocks(q, k, v, *, first, slot, kind: LayerKind, softcap: float | None):
    """Returns the same as `attend`, computed for a block of queries at a time.

    A block's scores are computed only for the keys that some of its queries see, which are half of
    all where there is no window. The (t, t) scores never exist. With 512 tokens and 8 heads of 8,
    on 2 CPU cores, this took two thirds of the time of torch's fused kernel and a seventh of that
    of all scores at once. Unlike the fused kernels it can bound scores by `softcap` (Gemma 2).
    """
    length = q.shape[1]
    block = max(_QUERIES, -(-length // _MAX_BLOCKS))
    q, k, v = (jnp.moveaxis(x, 1, -2) for x in (q, k, v))
    mixed = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        low, high = 0, k.shape[-2]
        if slot is None:
            low, high = 0 if kind.window is None else max(0, start - kind.window + 1), stop
        scores = kind.attn_scale * jnp.einsum(
            "bngtk,bnsk->bngts",
            q[:, :, :, start:stop],
            k[:, :, low:high],
            preferred_element_type=jnp.float32,
        )
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        queries, keys = jnp.arange(start, stop), jnp.arange(low, high)
        past = (queries if slot is None else slot + queries)[:, None] - keys[None, :]
        seen = past >= 0 if kind.window is None else (past >= 0) & (past < kind.window)
        seen = seen[None]
        if first is not None:  # padding sees itself: a softmax over nothing is NaN
            seen = seen & ((keys[None, None] >= first[:, None, None]) | (past == 0)[None])
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        sums = jnp.einsum(
            "bngts,bnsk->bngtk",
            weights.astype(v.dtype),
            v[:, :, low:high],
            preferred_element_type=jnp.float32,
        )
        mixed.append((sums / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype))
    return jnp.moveaxis(jnp.concatenate(mixed, axis=-2), -2, 1)
