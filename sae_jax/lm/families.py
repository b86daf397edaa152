"""Reads a model's config.json: which function it describes, for each family of models.

What would change the function and is not implemented is refused, never ignored: every field of
config.json is read here, is known to say nothing about the function, or is an error.
"""

import math
import pathlib

from sae_jax.errors import UserError, choose
from sae_jax.json_files import read_json
from sae_jax.lm.architecture import DecoderConfig, Rope
from sae_jax.lm.directory import model_directory

OWN_TYPE = "sae_jax_decoder"
FAMILIES = (
    "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3",
    "gemma3_text", OWN_TYPE,
)  # fmt: skip

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip

# Fields of config.json that say nothing about the function from tokens to activations.
_WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "auto_map",
    "boi_token_index", "bos_token_id", "cache_implementation", "chunk_size_feed_forward",
    "classifier_dropout", "do_sample", "dtype", "embd_pdrop", "eoi_token_index", "eos_token_id",
    "gradient_checkpointing", "hidden_dropout", "id2label", "image_token_index",
    "initializer_range", "is_decoder", "label2id", "max_length", "mm_tokens_per_image",
    "model_type", "n_ctx", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "problem_type", "reorder_and_upcast_attn", "resid_pdrop", "return_dict",
    "sliding_window_size", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params", "temperature", "top_k", "top_p",
    "torch_dtype", "transformers_version", "use_cache", "vision_config",
}  # fmt: skip

# Fields that are implemented where they are false, zero or null.
_MUST_BE_OFF = (
    "add_cross_attention", "is_encoder_decoder", "use_bidirectional_attention", "use_mrope",
)  # fmt: skip

_GPT2_NAMES = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act", "layer_norm_epsilon": "norm_eps",
}  # fmt: skip

# What Gemma 3's models leave out of their config, the larger ones of their text_config.
_GEMMA3 = {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131_072, "rope_theta": 1e6, "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}  # fmt: skip

_SLIDING, _FULL = "sliding_attention", "full_attention"


def load_config(directory) -> DecoderConfig:
    """Returns the config of a model's directory, or of a name on the hub.

    Raises UserError for a family or a field that is not implemented, naming it and its value.
    """
    file = model_directory(directory) / "config.json"
    values = read_json(file)
    family = str(values.get("model_type"))
    if family not in FAMILIES:
        raise UserError(
            f"model_type in {file} is {family!r}, which is not one of {', '.join(FAMILIES)}; "
            f"transformers can run it: --model=torch:{directory}"
        )
    if family.startswith("gemma3"):
        text = values.pop("text_config", {})
        values = _GEMMA3 | values | text
    fields = _Fields(file, values)
    config = _config(family, fields)
    fields.check_all_are_read()
    if config.num_heads % config.num_kv_heads:
        raise UserError(
            f"{file}: {config.num_kv_heads} key/value heads do not divide {config.num_heads}"
        )
    return config


class _Fields:
    """Holds the fields of config.json that have not been read yet."""

    def __init__(self, file: pathlib.Path, values: dict):
        self.file = file
        self._values = {k: v for k, v in values.items() if k not in _WITHOUT_EFFECT}
        for name in _MUST_BE_OFF:
            if self.take(name):
                raise UserError(f"{file}: {name} = {values[name]!r} is not implemented")

    def take(self, name: str, default=None):
        return self._values.pop(name, default)

    def number(self, name: str, *default: int) -> int:
        """Returns a whole number. Raises UserError if it is missing and there is no default."""
        value = self.take(name)
        value = default[0] if value is None and default else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{self.file}: {name} must be a whole number, not {value!r}")
        return value

    def rename(self, names: dict[str, str]) -> None:
        self._values = {names.get(name, name): value for name, value in self._values.items()}

    def check_all_are_read(self) -> None:
        for name, value in self._values.items():
            if value is not None:
                raise UserError(
                    f"{self.file}: the field {name} = {value!r} is not known, and may change the "
                    "model"
                )


def _config(family: str, fields: _Fields) -> DecoderConfig:
    if family == "gpt2":
        fields.rename(_GPT2_NAMES)
    gemma = family.startswith("gemma")
    d_model, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    layers = fields.number("num_hidden_layers")
    head_dim = fields.number("head_dim", 256 if gemma else d_model // heads)
    context = fields.number("max_position_embeddings", 2048)
    shape = {
        "vocab_size": fields.number("vocab_size"),
        "d_model": d_model,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": fields.number("num_key_value_heads", heads),
        "head_dim": head_dim,
        "d_mlp": fields.number("intermediate_size", *([4 * d_model] if family == "gpt2" else [])),
        "max_context": context,
        "tie_embeddings": fields.take("tie_word_embeddings", gemma or family == "gpt2"),
        "windows": _windows(family, fields, layers),
    }
    if family == "gpt2":
        return DecoderConfig(**shape, **_gpt2(fields))
    if family == "gpt_neox":
        return DecoderConfig(**shape, **_gpt_neox(fields, head_dim, context))
    bias = fields.take("attention_bias", family == "qwen2")
    out_bias = bias and family != "qwen2"
    rope, local = _ropes(fields, head_dim, context, 1e4 if family.startswith("gemma3") else None)
    common = {
        "rope": rope,
        "local_rope": local,
        "qkv_bias": bias,
        "attn_out_bias": out_bias,
        "norm_eps": fields.take("rms_norm_eps", 1e-6),
        "mlp_bias": fields.take("mlp_bias", False),
    }
    if gemma:
        return DecoderConfig(**shape, **common, **_gemma(family, fields, d_model))
    return DecoderConfig(
        **shape,
        **common,
        qk_norm=family == "qwen3",
        activation=_activation(fields, "hidden_act", "silu"),
        gated_mlp=fields.take("gated_mlp", True) if family == OWN_TYPE else True,
    )


def _gpt2(fields: _Fields) -> dict:
    return {
        "norm": "layer",
        "norm_eps": fields.take("norm_eps", 1e-5),
        "rope": None,
        "attn_scale": None if fields.take("scale_attn_weights", True) else 1.0,
        "attn_scale_by_layer": fields.take("scale_attn_by_inverse_layer_idx", False),
        "activation": _activation(fields, "hidden_act", "gelu_new"),
        "gated_mlp": False,
        "qkv_bias": True,
        "attn_out_bias": True,
        "mlp_bias": True,
    }


def _gpt_neox(fields: _Fields, head_dim: int, context: int) -> dict:
    fields.rename({"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"})
    bias = fields.take("attention_bias", True)
    return {
        "norm": "layer",
        "norm_eps": fields.take("layer_norm_eps", 1e-5),
        "rope": _ropes(fields, head_dim, context, partial=0.25)[0],
        "parallel": fields.take("use_parallel_residual", True),
        "activation": _activation(fields, "hidden_act", "gelu"),
        "gated_mlp": False,
        "qkv_bias": bias,
        "attn_out_bias": bias,
        "mlp_bias": True,
    }


def _gemma(family: str, fields: _Fields, d_model: int) -> dict:
    common = {"norm_plus_one": True, "embed_scale": math.sqrt(d_model)}
    if family == "gemma":
        fields.take("hidden_activation")  # transformers reads the other one, and its
        act = _activation(fields, "hidden_act", "gelu_pytorch_tanh")  # "gelu" as the approximation
        return common | {"activation": "gelu_tanh" if act == "gelu" else act}
    fields.take("hidden_act")  # transformers reads the other one
    second = family == "gemma2"
    return common | {
        "post_norms": True,
        "qk_norm": not second,
        "attn_scale": fields.take("query_pre_attn_scalar", 256) ** -0.5,
        "attn_softcap": _attention_cap(family, fields),
        "logit_softcap": fields.take("final_logit_softcapping", 30.0 if second else None),
        "activation": _activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
    }


def _attention_cap(family: str, fields: _Fields) -> float | None:
    cap = fields.take("attn_logit_softcapping", 50.0 if family == "gemma2" else None)
    return cap if family == "gemma2" else None  # Gemma 3's attention does not apply its own


def _activation(fields: _Fields, name: str, default: str) -> str:
    value = fields.take(name, default)
    return _ACTIVATIONS[choose(value, tuple(_ACTIVATIONS), f"{name} in {fields.file}")]


def _windows(family: str, fields: _Fields, layers: int) -> tuple:
    """Returns the attention window of each layer, or () where no layer has one."""
    if family not in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text"):
        return ()
    window = fields.take("sliding_window", 4096)
    if family == "mistral":
        return () if window is None else (window,) * layers
    kinds = fields.take("layer_types")
    if family.startswith("qwen"):
        used, first = fields.take("use_sliding_window"), fields.take("max_window_layers", 28)
        window = window if used else None
        by_rule = [_SLIDING if used and i >= first else _FULL for i in range(layers)]
    elif family == "gemma2":
        by_rule = [_FULL if i % 2 else _SLIDING for i in range(layers)]
    else:
        pattern = fields.take("sliding_window_pattern", fields.take("_sliding_window_pattern", 6))
        by_rule = [_SLIDING if (i + 1) % pattern else _FULL for i in range(layers)]
    kinds = by_rule if kinds is None else kinds
    if len(kinds) != layers or set(kinds) - {_SLIDING, _FULL}:
        raise UserError(
            f"{fields.file}: layer_types = {kinds!r} is not implemented; it must say "
            f"{_SLIDING} or {_FULL} for each of {layers} layers"
        )
    if window is None or _SLIDING not in kinds:
        return ()
    return tuple(window if kind == _SLIDING else None for kind in kinds)


def _ropes(
    fields: _Fields, head_dim: int, context: int, local_theta=None, partial: float = 1.0
) -> tuple[Rope, Rope | None]:
    """Returns the rotary positions of layers without a window, and of those with one.

    The second is None where it is the same. config.json has them as rope_theta and rope_scaling,
    or, written by transformers 5, as rope_parameters.
    """
    plain = {
        "rope_theta": fields.take("rope_theta", 10_000.0),
        "partial_rotary_factor": fields.take("partial_rotary_factor", partial),
    }
    local_theta = fields.take("rope_local_base_freq", local_theta)
    local = plain if local_theta is None else plain | {"rope_theta": local_theta}
    written = (fields.take("rope_scaling") or {}) | (fields.take("rope_parameters") or {})
    full = plain | written
    if _FULL in written or _SLIDING in written:
        full, local = plain | written.get(_FULL, {}), local | written.get(_SLIDING, {})
    elif local_theta is None:
        local = full
    where = f"{fields.file}: rope_parameters"
    full, local = (_rope(values, head_dim, context, where) for values in (full, local))
    return full, None if local == full else local


def _rope(values: dict, head_dim: int, context: int, where: str) -> Rope:
    values = {name: value for name, value in values.items() if value is not None}
    old_name = values.pop("type", "default")
    kind = values.pop("rope_type", old_name)
    if kind not in ("default", "dynamic", "linear", "llama3", "yarn"):
        raise UserError(f"{where} of type {kind!r} are not implemented")
    features = int(head_dim * values.pop("partial_rotary_factor"))
    rope = {
        "features": None if features == head_dim else features,
        "theta": float(values.pop("rope_theta")),
    }
    original = values.pop("original_max_position_embeddings", context)
    if kind == "dynamic":  # differs beyond the model's context only, which `forward` refuses
        values.pop("factor", None)
    elif kind != "default":
        rope |= {"scaling": kind, "factor": float(values.pop("factor", 1.0))}
    if kind in ("llama3", "yarn"):
        rope["original_context"] = original
    if kind == "llama3":
        rope |= {"low": values.pop("low_freq_factor"), "high": values.pop("high_freq_factor")}
    if kind == "yarn":
        rope |= {"low": values.pop("beta_slow", 1), "high": values.pop("beta_fast", 32)}
        rope["truncate"] = values.pop("truncate", True)
        factor, both = rope["factor"], (values.pop("mscale", 0), values.pop("mscale_all_dim", 0))
        scale = _mscale(factor, both[0]) / _mscale(factor, both[1]) if all(both) else None
        rope["attention_factor"] = values.pop("attention_factor", scale or _mscale(factor, 1))
    if values:
        raise UserError(f"{where} with {', '.join(values)} are not implemented")
    return Rope(**rope)


def _mscale(factor: float, mscale: float) -> float:
    """Returns yarn's attention factor (Peng et al. 2023, section 3.4), as transformers has it."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
