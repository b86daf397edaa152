"""Causal attention, with the device's fused kernel where it has one.

b: batch; t, s: positions of queries and keys; n: key/value heads; g: query heads of each; k:
features of a head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sae_jax.lm.architecture import LayerKind, Rope

_FUSED_HEAD = 128  # the widest head that cuDNN's kernel takes on every GPU that has it


def attend(q, k, v, kind: LayerKind, softcap: float | None):
    """q (b, t, n, g, k), k and v (b, s, n, k) -> (b, t, n, g, k). Scores and softmax are float32.

    On a mesh each device attends for its own rows and heads; nothing is sent."""
    run = functools.partial(_attend, kind=kind, softcap=softcap)
    mesh = jax.typeof(q).sharding.mesh
    if mesh.empty:
        return run(q, k, v)
    specs = [P(*jax.typeof(x).sharding.spec) for x in (q, k, v)]
    return jax.shard_map(run, mesh=mesh, in_specs=tuple(specs), out_specs=specs[0])(q, k, v)


def rotate(x, rope: Rope):
    """Turns the features of x (b, t, *heads, k) by their position."""
    length, width = x.shape[1], x.shape[-1]
    frequencies = rope.frequencies(width)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies[None, :]
    angle = angle.reshape(1, length, *[1] * (x.ndim - 3), -1)
    cos, sin = (rope.attention_factor * f(angle) for f in (jnp.cos, jnp.sin))
    turning, still = x[..., : 2 * len(frequencies)], x[..., 2 * len(frequencies) :]
    a, b = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
    turned = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate([*(t.astype(x.dtype) for t in turned), still], axis=-1)


def _attend(q, k, v, *, kind: LayerKind, softcap):
    if softcap is not None:
        return _capped(q, k, v, kind=kind, softcap=softcap)
    b, t, n, g, width = q.shape
    before = None if kind.window is None else (kind.window - 1, 0)
    attention = functools.partial(
        jax.nn.dot_product_attention,
        scale=kind.attn_scale,
        is_causal=True,
        local_window_size=before,
    )
    plain = functools.partial(attention, implementation="xla")
    heads = (q.reshape(b, t, n * g, width), k, v)
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if jax.default_backend() == "gpu" and half and width <= _FUSED_HEAD and width % 8 == 0:
        fused = functools.partial(attention, implementation="cudnn")
        try:
            mixed = jax.lax.platform_dependent(*heads, cuda=fused, default=plain)
        except RuntimeError:  # no cuDNN, or a GPU older than its kernel
            mixed = plain(*heads)
    else:
        mixed = plain(*heads)
    return mixed.reshape(b, t, n, g, width)


def _capped(q, k, v, *, kind: LayerKind, softcap: float):
    """With scores between -softcap and softcap (Gemma 2), which the fused kernels cannot."""
    scores = jnp.einsum("btngk,bsnk->bngts", q, k, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores * (kind.attn_scale / softcap))
    past = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])[None, :]
    seen = past >= 0 if kind.window is None else (past >= 0) & (past < kind.window)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bngts,bsnk->btngk", weights, v)
