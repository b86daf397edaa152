"""Describes a decoder: its switches, its parameters with their shardings, and its sites.

A site is a place in the model whose activations (B, T, width) can be read and replaced. The sites
of a layer L, with their widths and TransformerLens' names, are

    resid_pre.L   d_model  hook_resid_pre       the residual stream that enters the layer
    z.L           heads *  attn.hook_z          what the heads give, before the matrix that mixes
                  head_dim                      them: head after head
    attn_out.L    d_model  hook_attn_out        what attention adds to the residual stream
    resid_mid.L   d_model  hook_resid_mid       the residual stream between attention and MLP (not
                                                where both read resid_pre, as in GPT-NeoX)
    mlp_in.L      d_model  -                    what the MLP reads, its norm's weight applied
    mlp_act.L     d_mlp    mlp.hook_post        what the MLP's last matrix reads: the activation
                                                function's output, times the other branch where
                                                there is one
    mlp_out.L     d_model  hook_mlp_out         what the MLP adds to the residual stream
    resid_post.L  d_model  hook_resid_post      the residual stream that leaves the layer

Where the outputs of attention and MLP have norms of their own (Gemma), attn_out and mlp_out are
what comes after these. TransformerLens has no hook at mlp_in: its ln2.hook_normalized is before the
norm's weight and bias, whether it folds these into the MLP or not.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sae_jax.errors import UserError

_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_in": None,
    "mlp_act": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
SITES = tuple(_HOOKS)
_SITE_OF_HOOK = {hook: site for site, hook in _HOOKS.items() if hook}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864).

    Feature i of a head is rotated together with feature i + features/2, as Hugging Face has it. The
    scalings other than `default` are for contexts longer than those of training: `linear` divides
    all frequencies by `factor`, `llama3` divides low ones, with a smooth transition (Llama 3.1),
    and `yarn` is that of Peng et al. 2023, arXiv:2309.00071.

    Attributes:
      features: how many features of a head are rotated, from its first; None stands for all.
      theta: the base of the frequencies.
      scaling: default, linear, llama3 or yarn.
      factor: what scaled frequencies are divided by.
      original_context: the tokens of a context in training, for llama3 and yarn.
      low: llama3's low_freq_factor, or yarn's beta_slow.
      high: llama3's high_freq_factor, or yarn's beta_fast.
      attention_factor: what sine and cosine are multiplied by, for yarn.
      truncate: whether yarn's ramp begins and ends at whole features.
    """

    features: int | None = None
    theta: float = 10_000.0
    scaling: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low: float = 1.0
    high: float = 4.0
    attention_factor: float = 1.0
    truncate: bool = True

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Returns the frequencies (features / 2,) in radians a position, float32."""
        features = self.features or head_dim
        exponents = np.arange(0, features, 2, dtype=np.float32) / np.float32(features)
        plain = 1.0 / np.power(np.float32(self.theta), exponents)
        if self.scaling == "linear":
            return plain / np.float32(self.factor)
        if self.scaling == "llama3":
            turns = self.original_context * plain / (2 * np.pi)  # in the original context
            kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        elif self.scaling == "yarn":
            kept = 1 - self._yarn_ramp(features)
        else:
            return plain
        return np.float32(plain * kept + plain / self.factor * (1 - kept))

    def _yarn_ramp(self, features: int) -> np.ndarray:
        def feature(turns: float) -> float:
            """Returns the feature that turns so often in the original context."""
            ratio = self.original_context / (turns * 2 * math.pi)
            return features * math.log(ratio) / (2 * math.log(self.theta))

        first, last = feature(self.high), feature(self.low)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, features - 1)
        last += 0.001 * (first == last)
        return np.clip((np.arange(features // 2) - first) / (last - first), 0, 1)


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """Holds what differs between layers beside their parameters.

    Attributes:
      rope: the layer's rotary positions, or None.
      window: how many tokens a token attends to, itself included; None: all before it.
      attn_scale: what attention scores are multiplied by.
    """

    rope: Rope | None
    window: int | None
    attn_scale: float


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Describes the function of a decoder, apart from its parameters.

    It is hashable, so it can be a static argument of `jax.jit`.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_mlp: int
    max_context: int
    norm: str = "rms"  # or "layer": mean subtracted, with biases
    norm_eps: float = 1e-5
    norm_plus_one: bool = False  # the scale is 1 + weight, applied in float32 (Gemma)
    post_norms: bool = False  # attention's and the MLP's outputs are normalised too (Gemma)
    qk_norm: bool = False  # queries and keys are, head by head (Qwen 3, Gemma 3)
    rope: Rope | None = Rope()  # None: learned positions (GPT-2)
    local_rope: Rope | None = None  # of layers with a window, where it differs (Gemma 3)
    windows: tuple[int | None, ...] = ()  # by layer; (): none has a window
    attn_scale: float | None = None  # of the scores; None: head_dim ** -0.5
    attn_scale_by_layer: bool = False  # divided by layer + 1 (GPT-2's option)
    attn_softcap: float | None = None  # scores become cap * tanh(scores / cap) (Gemma 2)
    logit_softcap: float | None = None
    parallel: bool = False  # attention and MLP both read resid_pre (GPT-NeoX)
    activation: str = "silu"
    gated_mlp: bool = True  # down(act(gate x) * up x); otherwise down(act(up x))
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    embed_scale: float = 1.0
    tie_embeddings: bool = False

    @property
    def group(self) -> int:
        """How many query heads share a key/value head."""
        return self.num_heads // self.num_kv_heads

    def kind(self, layer: int) -> LayerKind:
        """Returns how the layer of this number attends."""
        window = self.windows[layer] if self.windows else None
        local = window is not None and self.local_rope is not None
        scale = self.head_dim**-0.5 if self.attn_scale is None else self.attn_scale
        if self.attn_scale_by_layer:
            scale /= layer + 1
        return LayerKind(self.local_rope if local else self.rope, window, scale)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Describes a parameter.

    Attributes:
      shape: its shape.
      model_axes: the axes that the mesh's axis `model` may shard, the preferred one first.
      inputs: how many of its leading axes are inputs of the matrix; 0 for a vector.
    """

    shape: tuple[int, ...]
    model_axes: tuple[int, ...] = ()
    inputs: int = 0

    def model_axis(self, model_size: int) -> int | None:
        """Returns the first of `model_axes` that `model_size` devices divide, None if none is."""
        return next((a for a in self.model_axes if self.shape[a] % model_size == 0), None)

    def spec(self, model_size: int) -> P:
        """Returns the parameter's PartitionSpec on a mesh whose axis `model` has this size."""
        axis = self.model_axis(model_size)
        return P(*("model" if i == axis else None for i in range(len(self.shape))))


def layout(config: DecoderConfig) -> dict:
    """Returns the tree of a decoder's parameters, with a `Leaf` for each.

    The mesh's axis `model` shards the key/value heads (n) with the query heads that share them, or
    else the query heads of each (g); the MLP's width; and the vocabulary, or else the width of its
    vectors.
    """
    d, n, g, k = config.d_model, config.num_kv_heads, config.group, config.head_dim
    f, v = config.d_mlp, config.vocab_size
    layer = {
        "attn_norm": Leaf((d,)),
        "w_q": Leaf((d, n, g, k), (1, 2), 1),
        "w_k": Leaf((d, n, k), (1,), 1),
        "w_v": Leaf((d, n, k), (1,), 1),
        "w_o": Leaf((n, g, k, d), (0, 1), 3),
        "mlp_norm": Leaf((d,)),
        "w_up": Leaf((d, f), (1,), 1),
        "w_down": Leaf((f, d), (0,), 1),
    }
    if config.gated_mlp:
        layer["w_gate"] = Leaf((d, f), (1,), 1)
    if config.qk_norm:
        layer |= {"q_norm": Leaf((k,)), "k_norm": Leaf((k,))}
    if config.post_norms:
        layer |= {"attn_post_norm": Leaf((d,)), "mlp_post_norm": Leaf((d,))}
    if config.norm == "layer":
        layer |= {"b_attn_norm": Leaf((d,)), "b_mlp_norm": Leaf((d,))}
    if config.qkv_bias:
        layer |= {"b_q": Leaf((n, g, k), (0, 1)), "b_k": Leaf((n, k), (0,))}
        layer["b_v"] = Leaf((n, k), (0,))
    if config.attn_out_bias:
        layer["b_o"] = Leaf((d,))
    if config.mlp_bias:
        layer |= {"b_up": Leaf((f,), (0,)), "b_down": Leaf((d,))}
        if config.gated_mlp:
            layer["b_gate"] = Leaf((f,), (0,))
    tree = {
        "embed": Leaf((v, d), (0, 1), 1),
        "layers": [dict(layer) for _ in range(config.num_layers)],
        "final_norm": Leaf((d,)),
    }
    if config.norm == "layer":
        tree["b_final_norm"] = Leaf((d,))
    if config.rope is None:
        tree["positions"] = Leaf((config.max_context, d), (), 1)
    if not config.tie_embeddings:
        tree["unembed"] = Leaf((d, v), (1, 0), 1)
    return tree


def init(key: jax.Array, config: DecoderConfig, dtype=jnp.float32) -> dict:
    """Returns random parameters, the tree of `layout`.

    Norms are one and biases zero. Embeddings are drawn from N(0, 0.02^2) and matrices from
    N(0, 1/fan_in). Matrices that write to the residual stream are divided by sqrt(2 * layers), as
    in GPT-2.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(layout(config))
    keys = jax.random.split(key, len(paths))
    leaves = []
    for (path, leaf), leaf_key in zip(paths, keys, strict=True):
        name = path[-1].key
        if name.startswith("b_"):
            leaves.append(jnp.zeros(leaf.shape, dtype))
        elif name.endswith("norm"):
            leaves.append(jnp.full(leaf.shape, 0.0 if config.norm_plus_one else 1.0, dtype))
        else:
            embeds = name in ("embed", "positions")
            std = 0.02 if embeds else math.prod(leaf.shape[: leaf.inputs]) ** -0.5
            if name in ("w_o", "w_down"):
                std /= math.sqrt(2 * config.num_layers)
            leaves.append(std * jax.random.normal(leaf_key, leaf.shape, dtype))
    return jax.tree_util.tree_unflatten(tree, leaves)


def site_width(config: DecoderConfig, site: str) -> int:
    """Returns the width of a site's activations.

    Raises UserError for a site that the model does not have.
    """
    names = [name for name in SITES if not (config.parallel and name == "resid_mid")]
    name, _, layer = site.rpartition(".")
    if name not in names or not layer.isdecimal() or int(layer) >= config.num_layers:
        raise UserError(
            f"unknown site {site!r}; a site is NAME.LAYER with NAME one of {', '.join(names)} "
            f"and LAYER from 0 to {config.num_layers - 1}"
        )
    widths = {"mlp_act": config.d_mlp, "z": config.num_heads * config.head_dim}
    return widths.get(name, config.d_model)


def place(site: str) -> tuple[int, int]:
    """Returns a site's layer and its place in it, which sort as the forward pass visits them."""
    name, _, layer = site.rpartition(".")
    return int(layer), SITES.index(name)


def hook_name(site: str) -> str | None:
    """Returns TransformerLens' name of a site.

    It is None for mlp_in, and for a name that is no site of a decoder.
    """
    name, _, layer = site.rpartition(".")
    hook = _HOOKS.get(name) if layer.isdecimal() else None
    return hook and f"blocks.{layer}.{hook}"


def site_of_hook(hook: str) -> str | None:
    """Returns the site that has the tensor of TransformerLens' hook, such as resid_post.3.

    It is None for a hook at another tensor, and for a name that is none of TransformerLens'.
    """
    layer_and_hook = re.fullmatch(r"blocks\.([0-9]+)\.(.+)", hook)
    site = layer_and_hook and _SITE_OF_HOOK.get(layer_and_hook[2])
    return site and f"{site}.{layer_and_hook[1]}"
