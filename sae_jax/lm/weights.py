"""Hugging Face model directories: config.json and safetensors, in and out, without torch.

A tensor is read slice by slice, each device's slice straight to that device, so that no parameter
is whole on one device of a mesh that shards it. What would change the function and is not
implemented is refused, never ignored: an unknown field of config.json as much as an unknown tensor.
"""

import contextlib
import hashlib
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding

from sae_jax.config import UserError, choose
from sae_jax.lm.decoder import ACTIVATIONS, DecoderConfig, Leaf, layout
from sae_jax.lm.text import read_json
from sae_jax.paths import save_json

OWN_TYPE = "sae_jax_decoder"
FAMILIES = ("llama", "mistral", "qwen2", OWN_TYPE)

# Fields of config.json that say nothing about the function from tokens to activations.
_WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id", "dtype",
    "eos_token_id", "initializer_range", "max_window_layers", "model_type", "pad_token_id",
    "pretraining_tp", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip

# Fields that are implemented for these values only.
_IMPLEMENTED = {
    "layer_types": lambda value: value is None or set(value) <= {"full_attention"},
    "rope_scaling": lambda value: value is None,
    "use_sliding_window": lambda value: not value,
}

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm.weight",
    "w_q": "self_attn.q_proj.weight",
    "w_k": "self_attn.k_proj.weight",
    "w_v": "self_attn.v_proj.weight",
    "w_o": "self_attn.o_proj.weight",
    "b_q": "self_attn.q_proj.bias",
    "b_k": "self_attn.k_proj.bias",
    "b_v": "self_attn.v_proj.bias",
    "b_o": "self_attn.o_proj.bias",
    "mlp_norm": "post_attention_layernorm.weight",
    "w_gate": "mlp.gate_proj.weight",
    "w_up": "mlp.up_proj.weight",
    "w_down": "mlp.down_proj.weight",
    "b_gate": "mlp.gate_proj.bias",
    "b_up": "mlp.up_proj.bias",
    "b_down": "mlp.down_proj.bias",
}
_TENSORS = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "unembed": "lm_head.weight",
}


def load_config(directory) -> DecoderConfig:
    """The config of a model directory. UserError for a family or a field that is not implemented,
    naming it and its value."""
    file = pathlib.Path(directory) / "config.json"
    values = read_json(file)
    family = choose(str(values.get("model_type")), FAMILIES, f"model_type in {file}")
    values = {name: v for name, v in values.items() if name not in _WITHOUT_EFFECT}
    for name, is_implemented in _IMPLEMENTED.items():
        if not is_implemented(value := values.pop(name, None)):
            raise UserError(f"{file}: {name} = {value!r} is not implemented")

    def take(name, *default):
        value = values.pop(name, None)
        if value is None and default:
            return default[0]
        if not default and not isinstance(value, int):
            raise UserError(f"{file}: {name} must be a whole number, not {value!r}")
        return value

    num_heads, d_model = take("num_attention_heads"), take("hidden_size")
    max_context = take("max_position_embeddings", 2048)
    window = take("sliding_window", None)
    if family != "qwen2" and window is not None and window < max_context:  # there a switch rules
        raise UserError(f"{file}: sliding_window = {window} is not implemented")
    attention_bias = take("attention_bias", False)
    config = DecoderConfig(
        vocab_size=take("vocab_size"),
        d_model=d_model,
        num_layers=take("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=take("num_key_value_heads", num_heads),
        head_dim=take("head_dim", d_model // num_heads),
        d_mlp=take("intermediate_size"),
        max_context=max_context,
        activation=choose(take("hidden_act", "silu"), ACTIVATIONS, f"hidden_act in {file}"),
        gated_mlp=take("gated_mlp", True),
        qkv_bias=attention_bias or family == "qwen2",
        attn_out_bias=attention_bias,
        mlp_bias=take("mlp_bias", False),
        tie_embeddings=take("tie_word_embeddings", False),
        norm_eps=take("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(take, file),
    )
    if values:
        name, value = next(iter(values.items()))
        raise UserError(
            f"{file}: the field {name} = {value!r} is not known, and may change the model"
        )
    if config.num_heads % config.num_kv_heads:
        raise UserError(f"{file}: {config.num_kv_heads} key/value heads do not divide {num_heads}")
    return config


def _rope_theta(take, file) -> float:
    theta = take("rope_theta", 10_000.0)
    rope = dict(take("rope_parameters", {}))  # where transformers 5 writes it
    theta = rope.pop("rope_theta", theta)
    if rope.pop("rope_type", "default") != "default" or rope:
        raise UserError(
            f"{file}: rope_parameters other than rope_theta are not implemented: {rope}"
        )
    return float(theta)


def load_params(directory, dtype=jnp.float32, mesh: jax.sharding.Mesh | None = None) -> dict:
    """Parameters (the tree of `decoder.layout`) in `dtype`, sharded over the mesh's `model` axis.

    UserError naming the file or the tensor where one is missing, truncated, of another shape or
    unknown.
    """
    directory = pathlib.Path(directory)
    config = load_config(directory)
    tree = layout(config)
    with contextlib.ExitStack() as stack:
        tensors = _open(directory, stack)
        expected = {_tensor_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
        # Old checkpoints store the rotary frequencies; tied ones sometimes the tied matrix.
        derived = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
        derived |= {"lm_head.weight"} if config.tie_embeddings else set()
        if missing := sorted(expected - tensors.keys()):
            raise UserError(f"{directory} has no tensor {missing[0]} ({len(missing)} missing)")
        if unknown := sorted(tensors.keys() - expected - derived):
            raise UserError(
                f"{directory} has a tensor {unknown[0]} that its config.json does not explain "
                f"({len(unknown)} such)"
            )
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _read(tensors[_tensor_name(path)], leaf, dtype, mesh, path), tree
        )


def save_model(
    directory, config: DecoderConfig, params: dict, dtype=jnp.bfloat16, **fields
) -> None:
    """Writes config.json and model.safetensors into an existing directory; `fields` (such as
    bos_token_id) are added to config.json. Raises FileExistsError rather than overwrite, and
    ValueError for biases of attention that config.json cannot say."""
    if config.qkv_bias != config.attn_out_bias:
        raise ValueError("qkv_bias and attn_out_bias differ; config.json has one field for both")
    directory = pathlib.Path(directory)
    weights = directory / "model.safetensors"
    if weights.exists():
        raise FileExistsError(weights)
    tensors = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, array), leaf in zip(leaves, jax.tree.leaves(layout(config)), strict=True):
        name = _tensor_name(path)
        stored = np.asarray(array).astype(dtype)
        if leaf.inputs:
            stored = stored.reshape(math.prod(leaf.shape[: leaf.inputs]), -1).T
        stored = stored.reshape(_stored_shape(name, leaf))
        tensors[name] = np.ascontiguousarray(stored)
    temporary = directory / "model.safetensors.tmp"
    safetensors.numpy.save_file(tensors, temporary)
    temporary.replace(weights)
    values = {
        "model_type": OWN_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_mlp,
        "max_position_embeddings": config.max_context,
        "hidden_act": config.activation,
        "gated_mlp": config.gated_mlp,
        "attention_bias": config.attn_out_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }
    save_json(values | fields, directory / "config.json")


def fingerprint(directory) -> str:
    """Tells one model from another: a hash of config.json and, of every weight file, its size,
    its first and last MiB (the header is in the first) and 64 KiB from 64 places between. Not
    all bytes: reading 140 GB takes minutes."""
    directory = pathlib.Path(directory)
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for name in _weight_files(directory):
        with (directory / name).open("rb") as file:
            size = file.seek(0, 2)
            digest.update(f"{name} {size}".encode())
            places = [(0, 1 << 20), (max(size - (1 << 20), 0), 1 << 20)]
            places += [(size * i // 65, 1 << 16) for i in range(1, 65)]
            for start, length in places:
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()


def _tensor_name(path) -> str:
    if path[0].key == "layers":
        return f"model.layers.{path[1].idx}.{_LAYER_TENSORS[path[2].key]}"
    return _TENSORS[path[0].key]


def _stored_shape(name: str, leaf: Leaf) -> list[int]:
    """In files: matrices (outputs, inputs), the embedding (vocabulary, d_model), the rest flat."""
    if name == _TENSORS["embed"]:
        return list(leaf.shape)
    outputs = math.prod(leaf.shape[leaf.inputs :])
    return [outputs, math.prod(leaf.shape[: leaf.inputs])] if leaf.inputs else [outputs]


def _weight_files(directory: pathlib.Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (directory / name).is_file():
            raise UserError(f"no {name} in {directory}")
    return names


def _open(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict:
    """{tensor name: its safetensors slice} over all the files of the directory."""
    slices = {}
    for name in _weight_files(directory):
        file = directory / name
        try:
            handle = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
        except safetensors.SafetensorError as error:
            raise UserError(f"{file} is damaged or truncated: {error}") from None
        slices |= {key: handle.get_slice(key) for key in handle.keys()}
    return slices


def _read(tensor, leaf: Leaf, dtype, mesh, path) -> jax.Array:
    """The tensor as a parameter (*inputs, *outputs). The sharded axis is the first of either, so
    that a shard is some rows or some columns of the file's matrix."""
    name = _tensor_name(path)
    stored = _stored_shape(name, leaf)
    if tensor.get_shape() != stored:
        raise UserError(f"tensor {name} has shape {tensor.get_shape()}; config.json says {stored}")
    axis = leaf.model_axis or 0
    in_columns = axis < leaf.inputs
    per_index = stored[1 if in_columns else 0] // leaf.shape[axis]

    def read(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[axis].indices(leaf.shape[axis])
        part = slice(start * per_index, stop * per_index)
        shard = tensor[:, part] if in_columns else tensor[part]
        shard = shard.T if leaf.inputs else shard
        shape = (*leaf.shape[:axis], stop - start, *leaf.shape[axis + 1 :])
        return shard.reshape(shape).astype(dtype)

    if mesh is None:
        return jnp.asarray(read((slice(None),) * len(leaf.shape)))
    sharding = NamedSharding(mesh, leaf.spec(mesh.shape["model"]))
    return jax.make_array_from_callback(leaf.shape, sharding, read)
