"""One functional decoder with switches: parameters are a plain dict, `forward` is a function.

Families today: Llama (RMSNorm, rotary positions, grouped-query attention, SwiGLU) and the
one-layer transformer of Towards Monosemanticity (Bricken et al. 2023: attention, then a ReLU MLP
of width 4d; here with RMSNorm and rotary positions, as those are the switches we have).

Sites, for a layer L and activations of shape (B, T, width):

    resid_pre.L   d_model  the residual stream that enters the layer
    attn_out.L    d_model  what attention adds to it
    resid_mid.L   d_model  the residual stream between attention and MLP
    mlp_in.L      d_model  what the MLP reads: resid_mid after its norm
    mlp_act.L     d_mlp    what the MLP's last matrix reads: the activation function's output
                           (gated MLPs: times the other branch)
    mlp_out.L     d_model  what the MLP adds to the residual stream
    resid_post.L  d_model  the residual stream that leaves the layer (= resid_pre.L+1)

On a mesh, `model` shards the key/value heads with the query heads they serve, the width of the
MLP and the vocabulary, each where it divides; `data` shards the batch. The mesh is read off the
arrays' types (Explicit axes), so nothing here is told about it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax.config import UserError

RESIDUAL_SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
SITES = (*RESIDUAL_SITES, "mlp_act")
ACTIVATIONS = {"silu": jax.nn.silu, "relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The function that the parameters are put into. Hashable: pass it to jit as static."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_mlp: int
    max_context: int
    activation: str = "silu"
    gated_mlp: bool = True  # down(act(gate x) * up x); otherwise down(act(up x))
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter: its shape, the axis that the mesh's `model` may shard, and how many of its
    leading axes are inputs of the matrix (0: a vector)."""

    shape: tuple[int, ...]
    model_axis: int | None = None
    inputs: int = 0

    def spec(self, model_size: int) -> P:
        """Sharded where `model` divides the axis, whole otherwise."""
        axes = [None] * len(self.shape)
        if self.model_axis is not None and self.shape[self.model_axis] % model_size == 0:
            axes[self.model_axis] = "model"
        return P(*axes)


def layout(config: DecoderConfig) -> dict:
    """The tree of parameters, a `Leaf` for each."""
    d, n, g, k = config.d_model, config.num_kv_heads, config.group, config.head_dim
    f, v = config.d_mlp, config.vocab_size
    layer = {
        "attn_norm": Leaf((d,)),
        "w_q": Leaf((d, n, g, k), 1, 1),
        "w_k": Leaf((d, n, k), 1, 1),
        "w_v": Leaf((d, n, k), 1, 1),
        "w_o": Leaf((n, g, k, d), 0, 3),
        "mlp_norm": Leaf((d,)),
        "w_up": Leaf((d, f), 1, 1),
        "w_down": Leaf((f, d), 0, 1),
    }
    if config.gated_mlp:
        layer["w_gate"] = Leaf((d, f), 1, 1)
    if config.qkv_bias:
        layer |= {"b_q": Leaf((n, g, k), 0), "b_k": Leaf((n, k), 0), "b_v": Leaf((n, k), 0)}
    if config.attn_out_bias:
        layer["b_o"] = Leaf((d,))
    if config.mlp_bias:
        layer |= {"b_up": Leaf((f,), 0), "b_down": Leaf((d,))}
        if config.gated_mlp:
            layer["b_gate"] = Leaf((f,), 0)
    tree = {
        "embed": Leaf((v, d), 0),
        "layers": [dict(layer) for _ in range(config.num_layers)],
        "final_norm": Leaf((d,)),
    }
    if not config.tie_embeddings:
        tree["unembed"] = Leaf((d, v), 1, 1)
    return tree


def init(key: jax.Array, config: DecoderConfig, dtype=jnp.float32) -> dict:
    """Random parameters: norms one, biases zero, embeddings N(0, 0.02^2), matrices N(0, 1/fan_in)
    with those that write to the residual stream divided by sqrt(2 * layers), as in GPT-2."""
    paths, tree = jax.tree_util.tree_flatten_with_path(layout(config))
    keys = jax.random.split(key, len(paths))
    leaves = []
    for (path, leaf), leaf_key in zip(paths, keys, strict=True):
        name = path[-1].key
        if name.endswith("norm"):
            leaves.append(jnp.ones(leaf.shape, dtype))
        elif name.startswith("b_"):
            leaves.append(jnp.zeros(leaf.shape, dtype))
        else:
            std = 0.02 if name == "embed" else math.prod(leaf.shape[: leaf.inputs]) ** -0.5
            if name in ("w_o", "w_down"):
                std /= math.sqrt(2 * config.num_layers)
            leaves.append(std * jax.random.normal(leaf_key, leaf.shape, dtype))
    return jax.tree_util.tree_unflatten(tree, leaves)


def site_width(config: DecoderConfig, site: str) -> int:
    """The width of a site's activations. UserError for a site that the model does not have."""
    name, _, layer = site.rpartition(".")
    if name not in SITES or not layer.isdecimal() or int(layer) >= config.num_layers:
        raise UserError(
            f"unknown site {site!r}; a site is NAME.LAYER with NAME one of {', '.join(SITES)} "
            f"and LAYER from 0 to {config.num_layers - 1}"
        )
    return config.d_mlp if name == "mlp_act" else config.d_model


def forward(params, tokens, config: DecoderConfig, taps=(), edits=None, logits=True):
    """The model on `tokens` (B, T) -> (logits float32 (B, T, vocab), {tap: (B, T, width)}).

    taps: names of sites to return. edits: {site: fn}; fn takes the site's activations (B, T,
    width) and returns their replacement, which the rest of the model goes on with. A tap at an
    edited site gives the replacement. logits=False returns None for them and stops after the
    layer of the last tap.

    Positions count from 0 at every row, and a row's documents see each other. Norms, rotations
    and the softmax of attention are float32 whatever the parameters are; the residual stream has
    the parameters' dtype. UserError for an unknown site or an edit that changes the shape.
    """
    edits = edits or {}
    for site in (*taps, *edits):
        site_width(config, site)
    depth = config.num_layers
    if not logits:
        depth = 1 + max((int(site.rpartition(".")[2]) for site in taps), default=-1)
    tapped = {}

    def visit(name, layer, x_BxTxW):
        site = f"{name}.{layer}"
        if site in edits:
            x_BxTxW = _replacement(edits[site](x_BxTxW), x_BxTxW, site)
        if site in taps:
            tapped[site] = x_BxTxW
        return x_BxTxW

    x_BxTxD = _look_up(params["embed"], tokens)
    for layer, p in enumerate(params["layers"][:depth]):
        x_BxTxD = visit("resid_pre", layer, x_BxTxD)
        attn_in = _rms_norm(x_BxTxD, p["attn_norm"], config.norm_eps)
        attn_out = visit("attn_out", layer, _attention(attn_in, p, config))
        x_BxTxD = visit("resid_mid", layer, x_BxTxD + attn_out)
        mlp_in = visit("mlp_in", layer, _rms_norm(x_BxTxD, p["mlp_norm"], config.norm_eps))
        act_BxTxF = visit("mlp_act", layer, _mlp_activation(mlp_in, p, config))
        mlp_out = _sum_over_model("btf,fd->btd", act_BxTxF, p["w_down"])
        mlp_out = visit("mlp_out", layer, _add_bias(mlp_out, p, "b_down"))
        x_BxTxD = visit("resid_post", layer, x_BxTxD + mlp_out)
    if not logits:
        return None, tapped
    x_BxTxD = _rms_norm(x_BxTxD, params["final_norm"], config.norm_eps)
    equation, w = ("btd,vd->btv", "embed") if config.tie_embeddings else ("btd,dv->btv", "unembed")
    return jnp.einsum(equation, x_BxTxD, params[w], preferred_element_type=jnp.float32), tapped


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Cross-entropy in nats of each token after the first: logits (B, T, V), tokens (B, T) ->
    (B, T - 1). A masked sum, not a gather: it stays local where the vocabulary is sharded."""
    logits = logits[:, :-1].astype(jnp.float32)
    is_next = tokens[:, 1:, None] == jnp.arange(logits.shape[-1])[None, None]
    chosen = jnp.sum(logits, axis=-1, where=is_next)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _attention(x_BxTxD, p, config: DecoderConfig):
    """Causal attention. b: batch; t, s: positions of queries and keys; n: key/value heads; g:
    query heads of each; k: head_dim."""
    q = _add_bias(jnp.einsum("btd,dngk->btngk", x_BxTxD, p["w_q"]), p, "b_q")
    k = _add_bias(jnp.einsum("btd,dnk->btnk", x_BxTxD, p["w_k"]), p, "b_k")
    v = _add_bias(jnp.einsum("btd,dnk->btnk", x_BxTxD, p["w_v"]), p, "b_v")
    q, k = _rotate(q, config.rope_theta), _rotate(k, config.rope_theta)
    scores = jnp.einsum("btngk,bsnk->bngts", q, k, preferred_element_type=jnp.float32)
    length = x_BxTxD.shape[1]
    causal = jnp.tril(jnp.ones((1, 1, 1, length, length), bool))
    scores = jnp.where(causal, scores * config.head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bngts,bsnk->btngk", weights, v)
    return _add_bias(_sum_over_model("btngk,ngkd->btd", mixed, p["w_o"]), p, "b_o")


def _mlp_activation(x_BxTxD, p, config: DecoderConfig):
    act = ACTIVATIONS[config.activation]
    up = _add_bias(jnp.einsum("btd,df->btf", x_BxTxD, p["w_up"]), p, "b_up")
    if not config.gated_mlp:
        return act(up)
    return act(_add_bias(jnp.einsum("btd,df->btf", x_BxTxD, p["w_gate"]), p, "b_gate")) * up


def _rotate(x_BxTxHxK, theta: float):
    """Rotary positions, halves convention (Hugging Face's): feature i turns with i + K/2. Any
    number of head axes between T and K."""
    length, width = x_BxTxHxK.shape[1], x_BxTxHxK.shape[-1]
    inverse = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * inverse[None, :]
    angle = angle.reshape(1, length, *[1] * (x_BxTxHxK.ndim - 3), width // 2)
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxTxHxK.dtype)


def _rms_norm(x_BxTxD, weight_D, eps: float):
    x = x_BxTxD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x.astype(x_BxTxD.dtype) * weight_D[None, None]


def _add_bias(x, p, name: str):
    return x + p[name][None, None] if name in p else x


def _look_up(embed_VxD, tokens_BxT):
    return embed_VxD.at[tokens_BxT].get(out_sharding=_like_batch(tokens_BxT, embed_VxD))


def _sum_over_model(equation: str, x, w):
    """A contraction over what `model` shards: one all-reduce, the result whole on each device."""
    return jnp.einsum(equation, x, w, out_sharding=_like_batch(x, w))


def _like_batch(x, w) -> NamedSharding | None:
    """Sharded over the batch as `x` is and whole otherwise; None where there is no mesh."""
    mesh = jax.typeof(w).sharding.mesh
    return None if mesh.empty else NamedSharding(mesh, P(jax.typeof(x).sharding.spec[0]))


def _replacement(new, old, site: str):
    """An edit's result as the model goes on with it: of the old dtype and sharding."""
    if new.shape != old.shape:
        raise UserError(f"the edit of {site} turned shape {old.shape} into {new.shape}")
    sharding = jax.typeof(old).sharding
    new = new.astype(old.dtype)
    return new if sharding.mesh.empty else jax.reshard(new, sharding)
