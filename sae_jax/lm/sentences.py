"""Turns sentences into vectors by an encoder of BERT's architecture, such as all-MiniLM-L6-v2.

The encoder is read from the files that transformers and sentence-transformers write: config.json,
model.safetensors and tokenizer.json, and where they are there modules.json, 1_Pooling/config.json,
sentence_bert_config.json and config_sentence_transformers.json. What would change its vectors and
is not implemented is refused, never ignored.
"""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from sae_jax import hub
from sae_jax.errors import UserError, choose
from sae_jax.json_files import checked, parse_json, read_json
from sae_jax.lm.text import Tokenizer, load_tokenizer, well_formed
from sae_jax.lm.weights import with_weights

_POOLING = "1_Pooling"
_EXTRA = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    f"{_POOLING}/config.json",
)

# To how many tokens the sentences of a batch are padded: one program is compiled for each.
_LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

_ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

# Tensors of a BERT that its last hidden states do not depend on.
_NOT_READ = ("pooler.", "cls.", "embeddings.position_ids")

_Size = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_Layers = Annotated[int, msgspec.Meta(ge=1, le=10_000)]


@dataclasses.dataclass(frozen=True)
class _Bert:
    """The fields of config.json on which the function of a BERT depends."""

    vocab_size: _Size
    hidden_size: _Size
    num_hidden_layers: _Layers
    num_attention_heads: _Size
    intermediate_size: _Size
    max_position_embeddings: _Size
    type_vocab_size: _Size = 2
    layer_norm_eps: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1e-12
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    add_cross_attention: bool = False
    auto_map: dict | None = None


@dataclasses.dataclass(frozen=True)
class _Module:
    """A line of modules.json."""

    type: str
    path: str = ""


@dataclasses.dataclass(frozen=True)
class _Sentences:
    """The fields of sentence_bert_config.json."""

    max_seq_length: Annotated[int, msgspec.Meta(ge=3)] | None = None  # two of them special
    do_lower_case: bool = False


class SentenceEncoder:
    """An encoder of sentences. `open_sentence_encoder` opens one.

    Attributes:
      directory: where its files are.
      width: the width of its vectors.
      max_length: how many tokens of a sentence it reads, special ones included.
      pooling: mean, over the tokens of a sentence, or cls for its first token.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        config: _Bert,
        params: dict,
        tokenizer: Tokenizer,
        pooling: str,
        sentences: _Sentences,
    ):
        self.directory, self.width, self.pooling = directory, config.hidden_size, pooling
        positions = config.max_position_embeddings
        self.max_length = min(sentences.max_seq_length or positions, positions)
        self._params, self._lower = params, sentences.do_lower_case
        self._backend = tokenizer.backend
        self._backend.enable_truncation(self.max_length)
        self._config = config

    def encode(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Returns the vector of each text, (n, width) float32 and of length 1.

        What comes after the first `max_length` tokens of a text is not read. Texts of similar
        length are computed together, and one that comes several times is computed once; a text's
        vector does not depend on the others.

        Args:
          texts: the texts.
          batch_size: how many are computed together.
        """
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        clean = [well_formed(text) for text in numbers]
        if self._lower:
            clean = [text.lower() for text in clean]
        ids = [e.ids for e in self._backend.encode_batch_fast(clean, add_special_tokens=True)]
        order = np.argsort([len(i) for i in ids], kind="stable")
        vectors = np.empty((len(ids), self.width), np.float32)
        batch_size = min(batch_size, 1 << max(len(ids) - 1, 0).bit_length())
        for start in range(0, len(ids), batch_size):
            rows = order[start : start + batch_size]
            batch = self._padded(ids, rows, batch_size)
            found = _vectors(self._params, *batch, config=self._config, pooling=self.pooling)
            vectors[rows] = found[: len(rows)]
        return vectors[[numbers[text] for text in texts]]

    def _padded(self, ids: list[list[int]], rows, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of some texts (batch_size, T), and how many of each count. Rows beyond
        them count one token, so that nothing is a mean of none."""
        longest = max(len(ids[row]) for row in rows)
        width = min(next((n for n in _LENGTHS if n >= longest), self.max_length), self.max_length)
        padded = np.zeros((batch_size, width), np.int32)
        lengths = np.ones(batch_size, np.int32)
        for place, row in enumerate(rows):
            padded[place, : len(ids[row])] = ids[row]
            lengths[place] = len(ids[row])
        return padded, lengths


def open_sentence_encoder(spec: str | os.PathLike) -> SentenceEncoder:
    """Opens an encoder of sentences in a directory, or hf://org/repository[@revision] on the hub.

    Raises UserError for another architecture than BERT's and for what else is not implemented, if a
    file or a tensor is missing, damaged, unknown or of another shape, and if the hub does not have
    or give the files.
    """
    if hub.is_hub_name(spec):
        hub.fetch(spec, ("config.json", *_EXTRA), needed=["config.json"])
    directory = with_weights(spec)
    config = _config(directory / "config.json")
    pooling = _pooling(directory)
    file = directory / "sentence_bert_config.json"
    sentences = checked(read_json(file, default={}), _Sentences, file)
    params = _params(directory / "model.safetensors", config)
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{directory / 'tokenizer.json'} has {tokenizer.vocab_size:,} tokens, and config.json "
            f"says {config.vocab_size:,}"
        )
    return SentenceEncoder(directory, config, params, tokenizer, pooling, sentences)


def _config(file: pathlib.Path) -> _Bert:
    values = read_json(file)
    family = values.get("model_type")
    if family != "bert":
        raise UserError(
            f"model_type in {file} is {family!r:.60}; encoders of sentences of the type bert are "
            "implemented, such as hf://sentence-transformers/all-MiniLM-L6-v2"
        )
    config = checked(values, _Bert, file)
    for name, needed in (
        ("position_embedding_type", "absolute"),
        ("is_decoder", False),
        ("add_cross_attention", False),
        ("auto_map", None),  # code of its own
    ):
        if (value := getattr(config, name)) != needed:
            raise UserError(f"{file}: {name} = {value!r:.60} is not implemented")
    choose(config.hidden_act, tuple(_ACTIVATIONS), f"hidden_act in {file}")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{file}: {config.num_attention_heads} heads do not divide hidden_size "
            f"{config.hidden_size}"
        )
    return config


def _pooling(directory: pathlib.Path) -> str:
    """Returns how a sentence's vector is made of those of its tokens, as the files say."""
    prompts = directory / "config_sentence_transformers.json"
    if read_json(prompts, default={}).get("default_prompt_name") is not None:
        raise UserError(f"{prompts}: a default prompt is not implemented")
    file = directory / "modules.json"
    if file.is_file():
        modules = checked(parse_json(file.read_bytes(), file), list[_Module], file)
        for module in modules:
            kind = module.type.rpartition(".")[2]
            if kind not in ("Transformer", "Pooling", "Normalize") or (
                kind != "Normalize" and module.path != {"Pooling": _POOLING}.get(kind, "")
            ):
                raise UserError(
                    f"{file}: the module {module.type} in {module.path!r} is not implemented"
                )
    file = directory / _POOLING / "config.json"
    if not file.is_file():
        logging.warning("%s is not there: a sentence's vector is the mean of its tokens'", file)
        return "mean"
    prefix = "pooling_mode_"
    modes = [name for name, on in read_json(file).items() if name.startswith(prefix) and on]
    # That of mean_sqrt_len is longer than the mean, and has its direction.
    known = {"mean_tokens": "mean", "mean_sqrt_len_tokens": "mean", "cls_token": "cls"}
    if len(modes) != 1 or modes[0].removeprefix(prefix) not in known:
        raise UserError(f"{file}: pooling by {' and '.join(modes) or 'nothing'} is not implemented")
    return known[modes[0].removeprefix(prefix)]


def _shapes(config: _Bert) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Returns the shapes of the tensors of the embeddings, and of those of a layer, by name."""
    d, inner = config.hidden_size, config.intermediate_size

    def dense(name: str, inputs: int, outputs: int) -> dict[str, tuple]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name: str) -> dict[str, tuple]:
        return {f"{name}.weight": (d,), f"{name}.bias": (d,)}

    top = {
        "embeddings.word_embeddings.weight": (config.vocab_size, d),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, d),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, d),
        **norm("embeddings.LayerNorm"),
    }
    layer = {
        **dense("attention.self.query", d, d),
        **dense("attention.self.key", d, d),
        **dense("attention.self.value", d, d),
        **dense("attention.output.dense", d, d),
        **norm("attention.output.LayerNorm"),
        **dense("intermediate.dense", d, inner),
        **dense("output.dense", inner, d),
        **norm("output.LayerNorm"),
    }
    return top, layer


def _params(file: pathlib.Path, config: _Bert) -> dict:
    """Returns the parameters by the names of their tensors, those of layers stacked."""
    if not file.is_file():
        raise UserError(f"no {file.name} in {file.parent}; transformers' save_pretrained writes it")
    try:
        tensors = safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or truncated: {error}") from None
    tensors = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    if config.num_hidden_layers > len(tensors):
        raise UserError(
            f"config.json of {file.parent} says {config.num_hidden_layers:,} layers, and {file} "
            f"holds {len(tensors):,} tensors"
        )

    def take(name: str, shape: tuple) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"{file} has no tensor {name}")
        tensor = tensors.pop(name)
        if tensor.shape != shape:
            raise UserError(f"tensor {name} of {file} has shape {tensor.shape}, not {shape}")
        return tensor.astype(np.float32)

    top, layer = _shapes(config)
    params: dict[str, Any] = {name: jnp.asarray(take(name, shape)) for name, shape in top.items()}
    layers = range(config.num_hidden_layers)
    params["layers"] = {
        name: jnp.stack([take(f"encoder.layer.{i}.{name}", shape) for i in layers])
        for name, shape in layer.items()
    }
    if unknown := [name for name in tensors if not name.startswith(_NOT_READ)]:
        raise UserError(f"{file} has a tensor {unknown[0]} that its config.json does not explain")
    return params


@functools.partial(jax.jit, static_argnames=("config", "pooling"))
def _vectors(params: dict, ids, lengths, *, config: _Bert, pooling: str) -> jax.Array:
    """Returns the vectors (B, width) of sentences, ids (B, T) of which the first `lengths` (B,)
    count."""
    with jax.default_matmul_precision("highest"):
        counts = jnp.arange(ids.shape[1]) < lengths[:, None]
        x = params["embeddings.word_embeddings.weight"][ids]
        x += params["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x += params["embeddings.token_type_embeddings.weight"][0]
        x = _norm(x, params, "embeddings.LayerNorm", config)
        x, _ = jax.lax.scan(
            lambda x, layer: (_layer(x, layer, counts, config), None), x, params["layers"]
        )
        if pooling == "cls":
            pooled = x[:, 0]
        else:
            pooled = jnp.where(counts[..., None], x, 0).sum(axis=1) / lengths[:, None]
        return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)


def _layer(x, layer: dict, counts, config: _Bert) -> jax.Array:
    batch, length, width = x.shape
    q, k, v = (
        _dense(x, layer, f"attention.self.{name}").reshape(
            batch, length, config.num_attention_heads, -1
        )
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(counts[:, None, None], scores, -jnp.inf))
    mixed = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, width)
    mixed = _dense(mixed, layer, "attention.output.dense")
    x = _norm(x + mixed, layer, "attention.output.LayerNorm", config)
    inner = _ACTIVATIONS[config.hidden_act](_dense(x, layer, "intermediate.dense"))
    return _norm(x + _dense(inner, layer, "output.dense"), layer, "output.LayerNorm", config)


def _dense(x, params: dict, name: str) -> jax.Array:
    return jnp.einsum("bti,oi->bto", x, params[f"{name}.weight"]) + params[f"{name}.bias"]


def _norm(x, params: dict, name: str, config: _Bert) -> jax.Array:
    x -= x.mean(axis=-1, keepdims=True)
    normed = x / jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + config.layer_norm_eps)
    return normed * params[f"{name}.weight"] + params[f"{name}.bias"]
