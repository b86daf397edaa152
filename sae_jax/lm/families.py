"""Reads a model's config.json: which function it describes, for each family of models.

What would change the function and is not implemented is refused, never ignored: every field of
config.json is read here, is known to say nothing about the function, or is an error. Every field
that is read has a type with bounds, which `_Fields` holds it against. Fields that are not known but
whose names are those of tools' own notes are left out with a warning.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Annotated, Any

import msgspec
from absl import logging

from sae_jax.errors import UserError, choose
from sae_jax.json_files import checked, read_json
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

# Fields of config.json that say nothing about the function from tokens to activations: those of
# every family, with what sampling takes, then those of single families and of tools.
_WITHOUT_EFFECT = frozenset({
    "_commit_hash", "_name_or_path", "architectures", "assistant_confidence_threshold",
    "assistant_lookbehind", "attn_implementation", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "eos_token_id", "epsilon_cutoff", "eta_cutoff", "experts_implementation",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "is_decoder", "label2id", "length_penalty", "max_length",
    "min_length", "model_type", "name_or_path", "no_repeat_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores",
    "pad_token_id", "prefix", "problem_type", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "target_lookbehind", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tie_last_hidden_states", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",

    "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "boi_token_index",
    "cache_implementation", "classifier_dropout", "embd_pdrop", "eoi_token_index",
    "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "image_token_index",
    "initializer_range", "is_llama_config", "max_sequence_length", "mm_tokens_per_image", "n_ctx",
    "n_special", "neftune_noise_alpha", "output_past", "predict_special_tokens", "pretraining_tp",
    "reorder_and_upcast_attn", "resid_pdrop", "sliding_window_size", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "vision_config",
})  # fmt: skip

# How the names of fields begin in which tools keep notes of their own. A dot is in no name that a
# model reads ("transformers.js_config").
_NOTES = ("_", "unsloth_", "axolotl_", "llamafactory_", "trl_", "wandb_", "mergekit_")

# Fields that are implemented where they are false, zero, empty or null.
_MUST_BE_OFF = (
    "add_cross_attention", "is_encoder_decoder", "per_layer_config", "pruned_heads",
    "rope_interleaved", "use_bidirectional_attention", "use_mrope",
)  # fmt: skip

LAYERS = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
"""How many layers a model has: no file says more, and no list of them is made before it is read."""

# What fields may be. The bounds keep sizes that no model has from taking all memory.
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
_Epsilon = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Base = Annotated[float, msgspec.Meta(gt=1, le=1e30)]
_Part = Annotated[float, msgspec.Meta(gt=0, le=1)]


@dataclasses.dataclass(frozen=True)
class _RopeFields:
    """What rope_parameters, or rope_scaling with rope_theta, may have."""

    rope_theta: _Base
    partial_rotary_factor: _Part
    rope_type: str = "default"
    type: str = "default"  # its old name
    original_max_position_embeddings: _Size = 1
    factor: _Positive = 1.0
    low_freq_factor: _Positive = 1.0
    high_freq_factor: _Positive = 4.0
    beta_slow: _Positive = 1.0
    beta_fast: _Positive = 32.0
    truncate: bool = True
    mscale: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    mscale_all_dim: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    attention_factor: _Positive = 1.0


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
        text = checked(values.pop("text_config", None), dict | None, f"text_config in {file}")
        values = _GEMMA3 | values | (text or {})
    fields = _Fields(file, values)
    config = _config(family, fields)
    fields.check_all_are_read(directory)
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
            if self._values.pop(name, None):
                raise UserError(f"{file}: {name} = {values[name]!r:.60} is not implemented")

    def take(self, name: str, kind, *default) -> Any:
        """Returns a field, which must be of a type; `default` where it is missing or null.

        Raises UserError if it is of another type, or is missing and there is no default.
        """
        value = self._values.pop(name, None)
        if value is None:
            if not default:
                raise UserError(f"{self.file} has no {name}, which its model_type needs")
            return default[0]
        return checked(value, kind, f"{name} = {value!r:.60} in {self.file}")

    def optional(self, name: str, kind, default) -> Any:
        """Returns a field of which null means something; `default` where it is missing."""
        if name in self._values and self._values[name] is None:
            return self._values.pop(name)
        return self.take(name, kind, default)

    def flag(self, name: str, default: bool) -> bool:
        """Returns a field that is true or false; null is false, as Python has it."""
        return bool(self.optional(name, bool, default))

    def rename(self, names: dict[str, str]) -> None:
        self._values = {names.get(name, name): value for name, value in self._values.items()}

    def check_all_are_read(self, directory) -> None:
        """Raises UserError if a field is left that may have an effect, and warns of the others."""
        left = {name: value for name, value in self._values.items() if value is not None}
        notes = [name for name in left if name.startswith(_NOTES) or "." in name]
        for name, value in left.items():
            if name not in notes:
                raise UserError(
                    f"{self.file}: the field {name} = {value!r:.60} is not known, and may change "
                    "the model; if you know that it does not, take it out of the file, else "
                    f"transformers can run the model: --model=torch:{directory}"
                )
        if notes:
            _warn(self.file, ", ".join(notes))


@functools.cache
def _warn(file: pathlib.Path, names: str) -> None:
    """Logs, once for each file, which of its fields are left out."""
    logging.warning("%s: left out %s, as notes of a tool's own", file, names)


def _config(family: str, fields: _Fields) -> DecoderConfig:
    if family == "gpt2":
        fields.rename(_GPT2_NAMES)
    gemma = family.startswith("gemma")
    d_model, heads = fields.take("hidden_size", _Size), fields.take("num_attention_heads", _Size)
    layers = fields.take("num_hidden_layers", LAYERS)
    head_dim = fields.take("head_dim", _Size, 256 if gemma else d_model // heads)
    if not head_dim:
        raise UserError(f"{fields.file}: hidden_size {d_model} is too small for {heads} heads")
    context = fields.take("max_position_embeddings", _Size, 2048)
    shape = {
        "vocab_size": fields.take("vocab_size", _Size),
        "d_model": d_model,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": fields.take("num_key_value_heads", _Size, heads),
        "head_dim": head_dim,
        "d_mlp": fields.take(
            "intermediate_size", _Size, *([4 * d_model] if family == "gpt2" else [])
        ),
        "max_context": context,
        "tie_embeddings": fields.flag("tie_word_embeddings", gemma or family == "gpt2"),
        "windows": _windows(family, fields, layers),
    }
    if family == "gpt2":
        return DecoderConfig(**shape, **_gpt2(fields))
    if family == "gpt_neox":
        return DecoderConfig(**shape, **_gpt_neox(fields, head_dim, context))
    bias = fields.flag("attention_bias", family == "qwen2")
    out_bias = bias and family != "qwen2"
    rope, local = _ropes(fields, head_dim, context, 1e4 if family.startswith("gemma3") else None)
    common = {
        "rope": rope,
        "local_rope": local,
        "qkv_bias": bias,
        "attn_out_bias": out_bias,
        "norm_eps": fields.take("rms_norm_eps", _Epsilon, 1e-6),
        "mlp_bias": fields.flag("mlp_bias", False),
    }
    if gemma:
        return DecoderConfig(**shape, **common, **_gemma(family, fields, d_model))
    return DecoderConfig(
        **shape,
        **common,
        qk_norm=family == "qwen3",
        activation=_activation(fields, "hidden_act", "silu"),
        gated_mlp=fields.flag("gated_mlp", True) if family == OWN_TYPE else True,
    )


def _gpt2(fields: _Fields) -> dict:
    return {
        "norm": "layer",
        "norm_eps": fields.take("norm_eps", _Epsilon, 1e-5),
        "rope": None,
        "attn_scale": None if fields.flag("scale_attn_weights", True) else 1.0,
        "attn_scale_by_layer": fields.flag("scale_attn_by_inverse_layer_idx", False),
        "activation": _activation(fields, "hidden_act", "gelu_new"),
        "gated_mlp": False,
        "qkv_bias": True,
        "attn_out_bias": True,
        "mlp_bias": True,
    }


def _gpt_neox(fields: _Fields, head_dim: int, context: int) -> dict:
    fields.rename({"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"})
    bias = fields.flag("attention_bias", True)
    return {
        "norm": "layer",
        "norm_eps": fields.take("layer_norm_eps", _Epsilon, 1e-5),
        "rope": _ropes(fields, head_dim, context, partial=0.25)[0],
        "parallel": fields.flag("use_parallel_residual", True),
        "activation": _activation(fields, "hidden_act", "gelu"),
        "gated_mlp": False,
        "qkv_bias": bias,
        "attn_out_bias": bias,
        "mlp_bias": True,
    }


def _gemma(family: str, fields: _Fields, d_model: int) -> dict:
    common = {"norm_plus_one": True, "embed_scale": math.sqrt(d_model)}
    if family == "gemma":
        fields.take("hidden_activation", str, "")  # transformers reads the other one, and its
        act = _activation(fields, "hidden_act", "gelu_pytorch_tanh")  # "gelu" as the approximation
        return common | {"activation": "gelu_tanh" if act == "gelu" else act}
    fields.take("hidden_act", str, "")  # transformers reads the other one
    second = family == "gemma2"
    return common | {
        "post_norms": True,
        "qk_norm": not second,
        "attn_scale": fields.take("query_pre_attn_scalar", _Positive, 256) ** -0.5,
        "attn_softcap": _attention_cap(family, fields),
        "logit_softcap": fields.optional(
            "final_logit_softcapping", _Positive, 30.0 if second else None
        ),
        "activation": _activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
    }


def _attention_cap(family: str, fields: _Fields) -> float | None:
    default = 50.0 if family == "gemma2" else None
    cap = fields.optional("attn_logit_softcapping", _Positive, default)
    return cap if family == "gemma2" else None  # Gemma 3's attention does not apply its own


def _activation(fields: _Fields, name: str, default: str) -> str:
    value = fields.take(name, str, default)
    return _ACTIVATIONS[choose(value, tuple(_ACTIVATIONS), f"{name} in {fields.file}")]


def _windows(family: str, fields: _Fields, layers: int) -> tuple:
    """Returns the attention window of each layer, or () where no layer has one."""
    if family not in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text"):
        return ()
    window = fields.optional("sliding_window", _Size, 4096)
    if family == "mistral":
        return () if window is None else (window,) * layers
    kinds = fields.take("layer_types", list[str], None)
    if family.startswith("qwen"):
        used = fields.flag("use_sliding_window", False)
        first = fields.take("max_window_layers", _Count, 28)
        window = window if used else None
        by_rule = [_SLIDING if used and i >= first else _FULL for i in range(layers)]
    elif family == "gemma2":
        by_rule = [_FULL if i % 2 else _SLIDING for i in range(layers)]
    else:
        old = fields.take("_sliding_window_pattern", _Size, 6)
        pattern = fields.take("sliding_window_pattern", _Size, old)
        by_rule = [_SLIDING if (i + 1) % pattern else _FULL for i in range(layers)]
    kinds = by_rule if kinds is None else kinds
    if len(kinds) != layers or set(kinds) - {_SLIDING, _FULL}:
        raise UserError(
            f"{fields.file}: layer_types = {kinds!r:.60} is not implemented; it must say "
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
        "rope_theta": fields.take("rope_theta", _Base, 10_000.0),
        "partial_rotary_factor": fields.take("partial_rotary_factor", _Part, partial),
    }
    local_theta = fields.take("rope_local_base_freq", _Base, local_theta)
    local = plain if local_theta is None else plain | {"rope_theta": local_theta}
    written = fields.take("rope_scaling", dict, {}) | fields.take("rope_parameters", dict, {})
    full = plain | written
    if _FULL in written or _SLIDING in written:
        where = f"rope_parameters in {fields.file}"
        of_full, of_local = (
            checked(written.get(kind) or {}, dict, f"{kind} of {where}")
            for kind in (_FULL, _SLIDING)
        )
        full, local = plain | of_full, local | of_local
    elif local_theta is None:
        local = full
    where = f"{fields.file}: rope_parameters"
    full, local = (_rope(values, head_dim, context, where) for values in (full, local))
    return full, None if local == full else local


def _rope(values: dict, head_dim: int, context: int, where: str) -> Rope:
    values = {name: value for name, value in values.items() if value is not None}
    checked(values, _RopeFields, where)
    old_name = values.pop("type", "default")
    kind = values.pop("rope_type", old_name)
    if kind not in ("default", "dynamic", "linear", "llama3", "yarn"):
        raise UserError(f"{where} of type {kind!r} are not implemented")
    features = int(head_dim * values.pop("partial_rotary_factor"))
    if features < 1:
        raise UserError(f"{where}: the factor leaves no feature of a head to rotate")
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
        missing = {"low_freq_factor", "high_freq_factor"} - values.keys()
        if missing:
            raise UserError(f"{where} of type llama3 have no {' and no '.join(sorted(missing))}")
        rope |= {"low": values.pop("low_freq_factor"), "high": values.pop("high_freq_factor")}
        if rope["low"] >= rope["high"]:
            raise UserError(
                f"{where}: low_freq_factor {rope['low']} is not below high_freq_factor "
                f"{rope['high']}"
            )
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
