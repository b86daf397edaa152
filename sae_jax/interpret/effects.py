"""Finds which output tokens a latent promotes, and which it suppresses.

Only the direct path counts: the latent's decoder row is part of the residual stream, and goes
through the last norm's weights and the unembedding, without the layers between. The norm's scale,
which differs by token, is left out. So is what is common to all tokens, which the softmax ignores.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.sae import SAE

_MATRICES = {"mlp_act": ("w_down", "mlp_post_norm"), "z": ("w_o", "attn_post_norm")}
_INTO_RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@dataclasses.dataclass(frozen=True)
class OutputTokens:
    """The output tokens that latents promote and suppress most, the most affected ones first.

    Attributes:
      promoted: token ids (latents, n).
      suppressed: token ids (latents, n).
    """

    promoted: np.ndarray
    suppressed: np.ndarray


def output_tokens(
    sae: SAE, model: lm.JaxModel, site: str, latents: np.ndarray, count: int = 8
) -> OutputTokens | None:
    """Returns the `count` output tokens that each latent promotes, and suppresses, most.

    Args:
      sae: the SAE.
      model: its language model.
      site: the site that the SAE writes to.
      latents: the numbers of the latents, (L,).
      count: how many tokens to return for each.

    Returns None where no linear map leads from the site to the residual stream (mlp_in).
    """
    name, _, layer = site.partition(".")
    rows_LxW = sae.w_dec[...][jnp.asarray(latents)]
    if name in _MATRICES:
        matrix, norm = _MATRICES[name]
        weights = model.params["layers"][int(layer)]
        rows_LxD = rows_LxW @ weights[matrix].astype(jnp.float32).reshape(rows_LxW.shape[1], -1)
        if model.config.post_norms:
            rows_LxD = _through_norm(rows_LxD, weights[norm], model.config)
    elif name in _INTO_RESIDUAL:
        rows_LxD = rows_LxW
    else:
        return None
    logits_LxV = _unembed(model.params, rows_LxD, model.config)
    _, promoted = jax.lax.top_k(logits_LxV, count)
    _, suppressed = jax.lax.top_k(-logits_LxV, count)
    return OutputTokens(np.asarray(promoted), np.asarray(suppressed))


def _unembed(params, rows_LxD, config: lm.DecoderConfig):
    scaled = _through_norm(rows_LxD, params["final_norm"], config)
    unembed = params["embed"].T if config.tie_embeddings else params["unembed"]
    logits = scaled @ unembed.astype(jnp.float32)
    return logits - logits.mean(axis=1, keepdims=True)


def _through_norm(rows_LxD, weight_D, config: lm.DecoderConfig):
    weight_D = weight_D.astype(jnp.float32) + config.norm_plus_one
    if config.norm == "layer":
        rows_LxD = rows_LxD - rows_LxD.mean(axis=1, keepdims=True)
    return rows_LxD * weight_D
