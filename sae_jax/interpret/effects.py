"""Finds which output tokens a latent promotes, and which it suppresses.

Only the direct path counts: the latent's decoder row is part of the residual stream, and goes
through the last norm's weights and the unembedding, without the layers between (the logit weights
of Bricken et al. 2023, "Towards Monosemanticity"). The norm's scale, which differs by token, is
left out, and so is a cap on logits. A value is what a unit of the latent's activation adds to the
logit, times the norm's scale.

What is common to all tokens, which the softmax ignores, is taken out as in that paper: the median
over the vocabulary is 0. As there, tokens that are never used are left out, since nothing has
trained their embeddings; `used_tokens` says which these are.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm, ops
from sae_jax.errors import UserError
from sae_jax.interpret.text import stray_bytes
from sae_jax.ops.kth_largest import kth_largest, sort_keys
from sae_jax.ops.sharding import matmul_f32
from sae_jax.sae import SAE

BINS = 50
_LOGITS = 2**25  # elements of the logits that exist at once
_MATRICES = {"mlp_act": ("w_down", "mlp_post_norm"), "z": ("w_o", "attn_post_norm")}
_INTO_RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_UNUSED = re.compile(r"(<|\[)\|?(unused|reserved)[\w-]*\|?(>|\])")  # as Gemma and Llama 3 name them


@dataclasses.dataclass(frozen=True)
class OutputTokens:
    """The output tokens that latents promote and suppress most, the most affected ones first.

    Attributes:
      promoted: token ids (latents, n).
      suppressed: token ids (latents, n).
      promoted_values: what a unit of activation adds to their logits, (latents, n), as above.
      suppressed_values: the same for `suppressed`.
      low: the smallest value of a token, (latents,).
      high: the largest, (latents,).
      histogram: how many tokens have a value in each of `BINS` equal parts of low..high,
        (latents, BINS).
    """

    promoted: np.ndarray
    suppressed: np.ndarray
    promoted_values: np.ndarray
    suppressed_values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    histogram: np.ndarray


def used_tokens(
    tokenizer: lm.Tokenizer, vocab_size: int, counts: np.ndarray | None = None
) -> np.ndarray:
    """Returns which tokens text can have, (vocab_size,) bool.

    Left out are ids without a token (a padded vocabulary), special tokens, and those that are named
    unused or reserved. Of the others those that were never seen are left out, or, where there are
    no counts, single bytes that are no text by themselves (`text.stray_bytes`).

    Args:
      tokenizer: the tokenizer.
      vocab_size: the model's, which may be larger than the tokenizer's.
      counts: how often each token was seen in a text, (vocab_size,). None: it is not known.

    Raises UserError if the counts are not of this vocabulary.
    """
    if counts is not None and np.shape(counts) != (vocab_size,):
        raise UserError(
            f"counts of {np.shape(counts)} tokens are not of a vocabulary of {vocab_size}"
        )
    left_out = {*tokenizer.marks}
    if counts is None:
        left_out |= stray_bytes(tokenizer)
    names = tokenizer.backend.get_vocab(with_added_tokens=True)
    kept = [i for name, i in names.items() if i not in left_out and not _UNUSED.fullmatch(name)]
    used = np.isin(np.arange(vocab_size), kept)
    return used if counts is None else used & (np.asarray(counts) > 0)


def output_tokens(
    sae: SAE,
    model: lm.LanguageModel,
    site: str,
    latents: np.ndarray,
    count: int = 8,
    used: np.ndarray | None = None,
) -> OutputTokens | None:
    """Returns the `count` output tokens that each latent promotes, and suppresses, most.

    It works through the latents in blocks, so that any number of them may be asked for.

    Args:
      sae: an autoencoder or a transcoder.
      model: its language model.
      site: the site that the SAE writes to.
      latents: the numbers of the latents, (L,).
      count: how many tokens to return for each, or all where there are fewer.
      used: which tokens of the vocabulary count, (vocab_size,) bool. None: `used_tokens` of the
        model's tokenizer.

    Returns None where no linear map leads from the site to the residual stream (mlp_in), for a
    crosscoder, which writes to several, and for a model that our own decoder does not run. Raises
    UserError if the site has another width than the SAE, or if no token counts.
    """
    if sae.config.kind == "crosscoder" or not isinstance(model, lm.JaxModel):
        return None
    name, _, layer = site.rpartition(".")
    if name not in (*_MATRICES, *_INTO_RESIDUAL):
        return None
    if model.site_width(site) != sae.config.d_out:
        raise UserError(
            f"the SAE writes activations of width {sae.config.d_out}, but {site} has "
            f"{model.site_width(site)}; give the site that it was trained on"
        )
    if used is None:
        used = used_tokens(model.tokenizer, model.vocab_size)
    ids = np.flatnonzero(used)
    if not len(ids):
        raise UserError("of the vocabulary no token counts, so there are none to promote")
    path = _path(model, name, int(layer), ids)
    latents = np.asarray(latents, np.int32)
    size = max(1, min(len(latents), _LOGITS // len(ids)))
    blocks = []
    for start in range(0, len(latents), size):
        block = latents[start : start + size]
        rows = sae.direction(np.pad(block, (0, size - len(block))))
        found = _of_block(rows, path, model.config, min(count, len(ids)))
        blocks.append([np.asarray(part)[: len(block)] for part in found])
    parts = [np.concatenate(part) for part in zip(*blocks, strict=True)]
    promoted, suppressed, *others = parts
    return OutputTokens(ids[promoted], ids[suppressed], *others)


def _path(model: lm.JaxModel, name: str, layer: int, ids: np.ndarray) -> tuple:
    """Returns what a decoder row goes through: a matrix or None, the weights of norms, and the
    columns of the unembedding that count."""
    config, params = model.config, model.params
    if model.mesh is not None:
        params = jax.device_get(params)

    def of_layer(parameter):
        layers = params["layers"]  # a list, or stacked
        return layers[parameter][layer] if isinstance(layers, dict) else layers[layer][parameter]

    matrix, norms = None, [params["final_norm"]]
    if name in _MATRICES:
        matrix_name, norm = _MATRICES[name]
        matrix = of_layer(matrix_name).reshape(-1, config.d_model)
        if config.post_norms:
            norms.insert(0, of_layer(norm))
    unembed = params["embed"][ids].T if config.tie_embeddings else params["unembed"][:, ids]
    return matrix, norms, jnp.asarray(unembed, jnp.float32)


@functools.partial(jax.jit, static_argnames=("config", "count"))
def _of_block(rows_LxW, path, config: lm.DecoderConfig, count: int):
    matrix, norms, unembed_DxV = path
    norm_L = jnp.linalg.norm(rows_LxW, axis=1, keepdims=True)
    rows_LxD = rows_LxW / jnp.maximum(norm_L, jnp.finfo(jnp.float32).tiny)
    if matrix is not None:
        rows_LxD = matmul_f32(rows_LxD, matrix.astype(jnp.float32))
    for weight_D in norms:
        if config.norm == "layer":
            rows_LxD = rows_LxD - rows_LxD.mean(axis=1, keepdims=True)
        rows_LxD = rows_LxD * (weight_D.astype(jnp.float32) + config.norm_plus_one)
    values_LxV = matmul_f32(rows_LxD, unembed_DxV)
    values_LxV = values_LxV - _median(values_LxV)[:, None]
    most, promoted = ops.top_k(values_LxV, count)
    least, suppressed = ops.top_k(-values_LxV, count)
    low, high = values_LxV.min(axis=1), values_LxV.max(axis=1)
    return promoted, suppressed, most, -least, low, high, _histogram(values_LxV, low, high)


def _median(values_LxV) -> jax.Array:
    """Returns the median of each row; of an even number the mean of the middle two."""
    keys = sort_keys(values_LxV)
    half, rows = values_LxV.shape[1] // 2 + 1, len(values_LxV)

    def count(tried_LxT):
        return (keys[:, None] >= tried_LxT[:, :, None]).sum(axis=-1)

    lower_key = kth_largest(count, half, rows, 32)[:, None]
    above = keys > lower_key
    lower = jnp.max(values_LxV, axis=1, where=~above, initial=-jnp.inf)
    if values_LxV.shape[1] % 2:
        return lower
    next_above = jnp.min(values_LxV, axis=1, where=above, initial=jnp.inf)
    upper = jnp.where(above.sum(axis=1) == half - 1, next_above, lower)
    return (lower + upper) / 2


def _histogram(values_LxV, low_L, high_L) -> jax.Array:
    width_L = jnp.maximum(high_L - low_L, jnp.finfo(jnp.float32).tiny)
    part = (values_LxV - low_L[:, None]) / width_L[:, None]
    bins_LxV = jnp.clip((BINS * part).astype(jnp.int32), 0, BINS - 1)
    rows_Lx1 = jnp.arange(len(values_LxV))[:, None]
    return jnp.zeros((len(values_LxV), BINS), jnp.int32).at[rows_Lx1, bins_LxV].add(1)
