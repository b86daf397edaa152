"""Measures what taking a latent out does to the model's prediction of every token.

At every position j of a context, x_j becomes x_j - f_i(x_j) d_i: what latent i adds there is taken
out, and all else is left, the SAE's error too (Bricken et al. 2023, "Towards Monosemanticity",
ablations). The model goes on from there, and what is returned is by how much the log-probability of
each token falls: the clean model's, less that without the latent. So above zero the latent helped
to predict the token, below it hurt. The effect on a token comes from the positions before it, and
the first token, which nothing predicts, has 0.

f_i is computed from the untouched model's activations. Of a transcoder x is the site that it
writes, and f_i comes from the one that it reads.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.evaluate.batching import pad_rows, sequences_at_once
from sae_jax.interpret.placed import Placed, check_ids
from sae_jax.sae import SAE


def ablation_effects(
    model: lm.LanguageModel,
    sae: SAE,
    site: str,
    latent: int,
    ids: np.ndarray,
    positions: np.ndarray | None = None,
    target_site: str | None = None,
) -> np.ndarray:
    """Returns by how much a latent raises the log-probability of each token, in nats, (T,).

    Args:
      model: the SAE's language model.
      sae: an autoencoder or a transcoder.
      site: the site that it reads.
      latent: the number of the latent.
      ids: the tokens of the context, (T,).
      positions: at which positions the latent is taken out, (T,) bool. None: at all.
      target_site: the site that a transcoder writes.

    Raises UserError if the SAE does not fit the site, or has no such latent, or for a crosscoder.
    """
    where = None if positions is None else np.asarray(positions)[None]
    return ablation_effects_of(
        model, Placed(sae, site, target_site), [latent], np.asarray(ids)[None], where
    )[0]


def ablation_effects_of(
    model: lm.LanguageModel,
    placed: Placed,
    latents: Sequence[int] | np.ndarray,
    sequences: np.ndarray,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the same for pairs of a latent and a context, many at once: (N, T).

    Args:
      model: the language model.
      placed: the SAE and its sites.
      latents: the latent of each pair, (N,).
      sequences: the tokens of each pair's context, (N, T).
      positions: at which positions the latents are taken out, (N, T) bool. None: at all.

    Raises UserError as `ablation_effects` does.
    """
    placed.check(model)
    ids = check_ids(model, sequences)
    latents = np.asarray(latents)
    directions = placed.sae.direction(latents)  # so that wrong latents are refused before the work
    where = np.ones(ids.shape, bool) if positions is None else np.asarray(positions, bool)
    size = sequences_at_once(model.vocab_size, *ids.shape)
    effects = np.zeros(ids.shape, np.float32)
    for start in range(0, len(ids), size):
        part = slice(start, start + size)
        batch = pad_rows(ids[part], size)
        clean, taps = model.forward(batch, taps=(placed.site,))
        changes = _taken_out(
            placed.sae,
            taps[placed.site],
            pad_rows(latents[part].astype(np.int32), size),
            pad_rows(np.asarray(directions[part]), size),
            pad_rows(where[part], size),
            rows=placed.rows_at_once(batch.size),
        )
        without, _ = model.forward(batch, edits={placed.written: lm.add_direction(changes)})
        effects[part, 1:] = np.asarray(_change(clean, without, batch))[: len(effects[part])]
    return effects


@functools.partial(jax.jit, static_argnames="rows")
def _taken_out(sae, x_BxTxD, latents_B, directions_BxW, where_BxT, rows: int):
    """Returns what is added to take the latents out, (B, T, W)."""
    B, T, D = x_BxTxD.shape
    spare = -(B * T) % rows
    x = jnp.pad(x_BxTxD.reshape(B * T, D), ((0, spare), (0, 0))).reshape(-1, rows, D)
    latents = jnp.pad(jnp.repeat(latents_B, T), (0, spare)).reshape(-1, rows, 1)

    def of_rows(block):
        x_RxD, latents_Rx1 = block
        return jnp.take_along_axis(sae.encode(x_RxD), latents_Rx1, axis=1)

    found = jax.lax.map(of_rows, (x, latents)).reshape(-1)[: B * T].reshape(B, T)
    return -jnp.where(where_BxT, found, 0.0)[:, :, None] * directions_BxW[:, None]


@jax.jit
def _change(clean_BxTxV, without_BxTxV, tokens_BxT):
    tokens_BxT = jnp.asarray(tokens_BxT)
    return lm.next_token_loss(without_BxTxV, tokens_BxT) - lm.next_token_loss(
        clean_BxTxV, tokens_BxT
    )
