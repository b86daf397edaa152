"""Runs a decoder, of whose parameters, a plain dict, its functions are functions.

`forward` runs whole contexts. `extend` runs the tokens that follow those in a cache of keys and
values, by the same layers.

The mesh is read from the arrays' types (Explicit axes) and is no argument. Its axis `model` shards
heads, the MLP's width and the vocabulary (`architecture.layout`), and `data` shards the batch. Each
layer's attention and MLP end in one all-reduce over `model`, and no activation is gathered.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax.errors import UserError, on_one_line
from sae_jax.lm.architecture import DecoderConfig, LayerKind, place, site_width
from sae_jax.lm.attention import attend, rotate
from sae_jax.lm.cache import Cache
from sae_jax.lm.edits import INPUTS, POSITIONS, TOKENS, apply, sites_read

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def forward(params, tokens, config: DecoderConfig, taps=(), edits=None, logits=True):
    """Runs a decoder on tokens, and returns its logits and the activations of sites.

    Positions count from 0 at every row, and a row's documents see each other. Norms, rotations
    and the softmax of attention are float32 whatever the parameters are; the residual stream has
    the parameters' dtype. Products of float32 have full float32 precision on every device.

    Raises UserError for an unknown site, for an edit that changes the shape or reads a site that
    comes later, and for a context longer than the model's.

    Args:
      params: the tree of `architecture.layout`. Its layers are a list, or one dict of parameters
        stacked along a leading axis (`load_params(scan=True)`). Stacked layers without taps and
        edits run in a loop, which compiles once whatever the depth.
      tokens: (B, T) integers.
      config: the decoder's config.
      taps: the names of sites whose activations are returned.
      edits: functions by site. Each takes the site's activations (B, T, width) and returns their
        replacement, with which the rest of the model goes on (`lm.edits` has some, and those of
        `lm.reading` take activations of other sites too).
      logits: whether logits are computed. Without them the model stops after the last tap's layer.

    Returns:
      The float32 logits (B, T, vocab), or None, and {tap: (B, T, width)}. A tap at an edited site
      gives the replacement.
    """
    tokens = jnp.asarray(tokens)
    if tokens.shape[1] > config.max_context:
        raise UserError(
            f"a context of {tokens.shape[1]} tokens is longer than the model's {config.max_context}"
        )
    depth = config.num_layers
    if not logits:
        depth = 1 + max((place(site)[0] for site in taps), default=-1)
    with _precision(params):
        x_BxTxD, kept, _ = _layers(params, tokens, config, depth, taps, edits or {})
        return (_unembed(params, x_BxTxD, config) if logits else None), {s: kept[s] for s in taps}


def extend(params, tokens, config: DecoderConfig, cache: Cache, edits=None):
    """Runs a decoder on tokens that follow those of a cache.

    A cache that holds tokens is followed by one token a row.

    Raises UserError as `forward` does, but for a long context, which its caller has to bound.

    Args:
      params: as in `forward`.
      tokens: (B, T) integers.
      config: the decoder's config.
      cache: keys and values of the tokens before.
      edits: as in `forward`.

    Returns:
      The float32 logits (B, vocab) after the last token, and the cache with the tokens in it.
    """
    with _precision(params):
        x_BxTxD, _, cache = _layers(
            params, tokens, config, config.num_layers, (), edits or {}, cache
        )
        return _unembed(params, x_BxTxD[:, -1:], config)[:, 0], cache.after(tokens.shape[1])


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the cross-entropy (B, T - 1) in nats of each token after the first.

    Args:
      logits: (B, T, vocab).
      tokens: (B, T).
    """
    # A masked sum and not a gather, so that it stays local where the vocabulary is sharded.
    logits = logits[:, :-1].astype(jnp.float32)
    is_next = tokens[:, 1:, None] == jnp.arange(logits.shape[-1])[None, None]
    chosen = jnp.sum(logits, axis=-1, where=is_next)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _precision(params):
    full = params["embed"].dtype == jnp.float32
    return jax.default_matmul_precision("highest" if full else "default")


def _layers(params, tokens, config: DecoderConfig, depth: int, taps, edits, cache=None):
    """Runs the first `depth` layers.

    Returns what leaves the last of them, the activations of all sites that are tapped or read, and
    the cache with the tokens' keys and values.
    """
    reads = {other for edit in edits.values() for other in sites_read(edit)} - set(INPUTS)
    for site in (*taps, *edits, *reads):
        site_width(config, site)
    for site, edit in edits.items():
        for other in set(sites_read(edit)) & reads:
            if place(other) >= place(site):
                raise UserError(
                    f"the edit of {site} reads {other}, which does not come before it in the "
                    "forward pass; read an earlier site"
                )
    visited = {place(site)[0] for site in (*taps, *edits, *reads)}
    length = tokens.shape[1]
    positions = jnp.arange(length)[None] if cache is None else cache.positions(length)
    kept = {POSITIONS: positions, TOKENS: tokens}
    run = apply if cache is None else _apply_in_generation

    def visit(layer, name, x_BxTxW):
        site = f"{name}.{layer}"
        if site in edits:
            x_BxTxW = _replacement(run(edits[site], x_BxTxW, kept), x_BxTxW, site)
        if site in taps or site in reads:
            kept[site] = x_BxTxW
        return x_BxTxW

    x_BxTxD = _embed(params, tokens, config, None if cache is None else positions)
    layer = 0
    while layer < depth:
        stop = min((site for site in visited if layer <= site < depth), default=depth)
        if stop - layer > 1 and isinstance(params["layers"], dict):
            x_BxTxD, cache = _loop(x_BxTxD, cache, params["layers"], layer, stop, config, positions)
            layer = stop
            continue
        p = _layer_of(params["layers"], layer)
        see = functools.partial(visit, layer) if layer in visited else None
        x_BxTxD, cache = _layer(
            x_BxTxD, cache, p, layer, positions, config=config, kind=config.kind(layer), see=see
        )
        layer += 1
    return x_BxTxD, kept, cache


def _loop(x_BxTxD, cache, stacked, first: int, stop: int, config: DecoderConfig, positions):
    """Runs layers without taps and edits in a loop, compiled once for each kind of layer."""
    kinds = list(dict.fromkeys(config.kind(layer) for layer in range(first, stop)))
    bodies = [functools.partial(_layer, config=config, kind=kind) for kind in kinds]
    number = jnp.array([kinds.index(config.kind(layer)) for layer in range(first, stop)])

    def body(layer, carried):
        operands = (*carried, _layer_of(stacked, layer), layer, positions)
        if len(bodies) == 1:
            return bodies[0](*operands)
        return jax.lax.switch(number[layer - first], bodies, *operands)

    return jax.lax.fori_loop(first, stop, body, (x_BxTxD, cache))


def _layer_of(layers, layer) -> dict:
    if isinstance(layers, list):
        return layers[layer]
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), layers)


def _layer(
    x_BxTxD, cache, p, layer, positions, *, config: DecoderConfig, kind: LayerKind, see=None
):
    """Runs a layer, and returns what leaves it and the cache with the layer's keys and values.

    `see(name, x)` takes a site's activations and returns what to go on with.
    """
    visit = see or (lambda name, x: x)
    x_BxTxD = resid_pre = visit("resid_pre", x_BxTxD)
    attn_in = _norm(x_BxTxD, p, "attn_norm", config)
    z, cache = _heads(attn_in, cache, p, layer, positions, config, kind)
    if see is not None:
        z = _split_heads(visit("z", _merge_heads(z)), z)
    attn_out = _add_bias(_mix_heads(z, p["w_o"]), p, "b_o")
    if config.post_norms:
        attn_out = _norm(attn_out, p, "attn_post_norm", config)
    x_BxTxD = x_BxTxD + visit("attn_out", attn_out)
    if not config.parallel:
        x_BxTxD = visit("resid_mid", x_BxTxD)
    reads = resid_pre if config.parallel else x_BxTxD
    mlp_in = visit("mlp_in", _norm(reads, p, "mlp_norm", config))
    act_BxTxF = visit("mlp_act", _mlp_activation(mlp_in, p, config))
    mlp_out = _add_bias(_sum_over_model("btf,fd->btd", act_BxTxF, p["w_down"]), p, "b_down")
    if config.post_norms:
        mlp_out = _norm(mlp_out, p, "mlp_post_norm", config)
    return visit("resid_post", x_BxTxD + visit("mlp_out", mlp_out)), cache


def _heads(x_BxTxD, cache, p, layer, positions, config: DecoderConfig, kind: LayerKind):
    """Returns the outputs (b, t, n, g, k) of the attention heads, axes as in `attention`.

    With a cache, keys and values go into it, and it is returned too.
    """
    q = _add_bias(jnp.einsum("btd,dngk->btngk", x_BxTxD, p["w_q"]), p, "b_q")
    k = _add_bias(jnp.einsum("btd,dnk->btnk", x_BxTxD, p["w_k"]), p, "b_k")
    v = _add_bias(jnp.einsum("btd,dnk->btnk", x_BxTxD, p["w_v"]), p, "b_v")
    if config.qk_norm:
        q, k = _norm(q, p, "q_norm", config), _norm(k, p, "k_norm", config)
    if kind.rope is not None:
        q, k = rotate(q, kind.rope, positions), rotate(k, kind.rope, positions)
    if cache is None:
        return attend(q, k, v, kind, config.attn_softcap), None
    return cache.attend(q, k, v, layer, kind, config.attn_softcap)


def _mix_heads(z, w_o):
    if jax.typeof(z).sharding.mesh.empty:
        # As one matrix, which XLA would transpose for each token that is generated otherwise.
        return jnp.einsum("bth,hd->btd", _merge_heads(z), w_o.reshape(-1, w_o.shape[-1]))
    return _sum_over_model("btngk,ngkd->btd", z, w_o)


def _merge_heads(z):
    """Returns z (b, t, n, g, k) as (b, t, heads * k).

    Where `model` shards the heads of each group (g), a device's heads are not next to each other in
    the result, so the result is whole on each device.
    """
    shape, sharding = (*z.shape[:2], -1), jax.typeof(z).sharding
    if sharding.mesh.empty:
        return z.reshape(shape)
    batch, _, n, g, _ = sharding.spec
    if g is not None:
        z = jax.reshard(z, NamedSharding(sharding.mesh, P(batch)))
    return z.reshape(shape, out_sharding=NamedSharding(sharding.mesh, P(batch, None, n)))


def _split_heads(z_BxTxH, like):
    """Returns z (b, t, heads * k) in the shape and sharding of `like` (b, t, n, g, k)."""
    sharding = jax.typeof(like).sharding
    if sharding.mesh.empty:
        return z_BxTxH.reshape(like.shape)
    batch, _, n, *_ = sharding.spec
    own = NamedSharding(sharding.mesh, P(batch, None, n))
    return jax.reshard(z_BxTxH.reshape(like.shape, out_sharding=own), sharding)


def _mlp_activation(x_BxTxD, p, config: DecoderConfig):
    act = ACTIVATIONS[config.activation]
    up = _add_bias(jnp.einsum("btd,df->btf", x_BxTxD, p["w_up"]), p, "b_up")
    if not config.gated_mlp:
        return act(up)
    return act(_add_bias(jnp.einsum("btd,df->btf", x_BxTxD, p["w_gate"]), p, "b_gate")) * up


def _norm(x, p, name: str, config: DecoderConfig):
    """Returns x normalised over its last axis, rounded to x's dtype where each family rounds."""
    y, weight = x.astype(jnp.float32), p[name].reshape(*[1] * (x.ndim - 1), -1)
    if config.norm == "layer":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.norm_eps)
    if config.norm == "layer":
        return _add_bias(y * weight, p, f"b_{name}").astype(x.dtype)
    if config.norm_plus_one:
        return (y * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
    return y.astype(x.dtype) * weight


def _embed(params, tokens_BxT, config: DecoderConfig, positions_BxT=None):
    """Returns the embeddings; `positions_BxT` are None where every row counts from 0."""
    x_BxTxD = _look_up(params["embed"], tokens_BxT)
    if config.embed_scale != 1.0:
        x_BxTxD = x_BxTxD * jnp.asarray(config.embed_scale, x_BxTxD.dtype)
    if "positions" not in params:
        return x_BxTxD
    if positions_BxT is None:
        return x_BxTxD + params["positions"][None, : tokens_BxT.shape[1]]
    known = jnp.clip(positions_BxT, 0, config.max_context - 1)  # padding has others
    return x_BxTxD + _look_up(params["positions"], known)


def _unembed(params, x_BxTxD, config: DecoderConfig):
    x_BxTxD = _norm(x_BxTxD, params, "final_norm", config)
    tied = config.tie_embeddings
    w, equation = (params["embed"], "vd") if tied else (params["unembed"], "dv")
    multiply = functools.partial(
        jnp.einsum, f"btd,{equation}->btv", preferred_element_type=jnp.float32
    )
    if _is_sharded(w, equation.index("d")):
        like = _like_batch(x_BxTxD, w)
        x_BxTxD = jax.reshard(x_BxTxD, NamedSharding(like.mesh, P(*like.spec, None, "model")))
        logits = multiply(x_BxTxD, w, out_sharding=like)
    else:
        logits = multiply(x_BxTxD, w)
    cap = config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _add_bias(x, p, name: str):
    return x + p[name][None, None] if name in p else x


def _look_up(embed_VxD, tokens_BxT):
    like = _like_batch(tokens_BxT, embed_VxD)
    if like is None or not _is_sharded(embed_VxD, 1):
        return embed_VxD.at[tokens_BxT].get(out_sharding=like)
    own = NamedSharding(like.mesh, P(*like.spec, None, "model"))
    return jax.reshard(embed_VxD.at[tokens_BxT].get(out_sharding=own), like)


def _sum_over_model(equation: str, x, w):
    """Contracts over an axis that `model` shards, by one all-reduce. The result is not sharded."""
    return jnp.einsum(equation, x, w, out_sharding=_like_batch(x, w))


def _like_batch(x, w) -> NamedSharding | None:
    """Returns a sharding over the batch only, as x has it; None where there is no mesh."""
    mesh = jax.typeof(w).sharding.mesh
    return None if mesh.empty else NamedSharding(mesh, P(jax.typeof(x).sharding.spec[0]))


def _is_sharded(w, axis: int) -> bool:
    sharding = jax.typeof(w).sharding
    return not sharding.mesh.empty and sharding.spec[axis] is not None


def _apply_in_generation(edit, x_BxTxW, kept):
    try:
        return apply(edit, x_BxTxW, kept)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"an edit fails on activations {x_BxTxW.shape}, which it is given in generation "
            f"({on_one_line(error)}); it must treat each row and position by itself"
        ) from error


def _replacement(new, old, site: str):
    """Returns an edit's result in the dtype and sharding of the activations it replaces."""
    if new.shape != old.shape:
        raise UserError(f"the edit of {site} turned shape {old.shape} into {new.shape}")
    sharding = jax.typeof(old).sharding
    new = new.astype(old.dtype)
    return new if sharding.mesh.empty else jax.reshard(new, sharding)
