"""Measures what a language model loses when it reads an SAE's reconstructions y_hat in place of y.

The SAE's targets y are the activations that it reads, or for a transcoder those of another site.
They are replaced at the positions that count and stay as they are at others. The sites of a
crosscoder are replaced one at a time. y_hat is computed from the untouched model's activations.

There are three replacements: y_hat, zero, and the mean of y. For each the metrics are, in nats:

    ce            cross-entropy a token, over the tokens after replaced positions, without padding
    kl            KL(untouched || replaced) of the next token, over replaced positions
    ce_recovered  (ce_ablated - ce_spliced) / (ce_ablated - ce_clean), for zero and mean ablation:
                  1 if nothing is lost, 0 if the SAE is no better than ablation
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.evaluate.batching import pad_rows, sequences_at_once
from sae_jax.evaluate.metrics import add_up
from sae_jax.evaluate.processes import own_share
from sae_jax.evaluate.sources import input_and_target_sites
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE


def measure_spliced(
    sae: SAE,
    model: lm.LanguageModel,
    sites: Sequence[str],
    tokens: np.ndarray,
    replaced: np.ndarray,
    mean: np.ndarray,
    is_text: np.ndarray | None = None,
) -> dict[str, dict[str, float]]:
    """Returns the metrics of each target site, by the site's name.

    Args:
      sae: the SAE.
      model: its language model.
      sites: the SAE's sites, a transcoder's target last.
      tokens: token ids (sequences, T).
      replaced: the positions whose activations are replaced, (sequences, T) bool.
      mean: the mean of the targets (d_out,), for mean ablation.
      is_text: which tokens are text, (sequences, T) bool; no others are to be predicted. None: all.

    The metrics are `ce_clean`, `ce_X` and `kl_X` for X in spliced, zero and mean, `ce_recovered_X`
    for X in zero and mean, and the numbers of positions that were `replaced` and that `predicted`
    a token. Raises UserError if no replaced position predicts a token.
    """
    predicts = replaced.copy()  # a position that counts, before a token that does
    predicts[:, -1] = False
    if is_text is not None:
        predicts[:, :-1] &= is_text[:, 1:]
    if not predicts.any():
        raise UserError("there is no position to splice the SAE in at: all of them are excluded")
    share = -(-len(tokens) // jax.process_count())
    size = sequences_at_once(model.vocab_size, share, tokens.shape[1])
    inputs, targets = input_and_target_sites(sae, sites)
    mean = jnp.asarray(mean, jnp.float32)
    found, first = {}, 0
    for site in targets:
        columns = (first, first + model.site_width(site))
        starts = own_share(range(0, len(tokens), size))
        totals = add_up(
            _batch_sums(
                model,
                sae,
                jnp.asarray(pad_rows(tokens[start : start + size], size)),
                jnp.asarray(pad_rows(replaced[start : start + size], size)),
                jnp.asarray(pad_rows(predicts[start : start + size], size)),
                mean,
                tuple(inputs),
                site,
                columns,
            )
            for start in progress(starts, f"splicing the SAE into its model at {site}")
        )
        found[site] = _finish({name: float(value) for name, value in totals.items()})
        first = columns[1]
    return found


def _batch_sums(
    model, sae, tokens_BxT, replaced_BxT, predicts_BxT, mean_D, inputs, site, columns
) -> dict:
    """Returns a batch's sums for one target site, which has `columns` (first, stop) of the d_out.

    The model runs four times, one after the other, because a batch of its logits is large.
    """
    clean, tapped = model.forward(tokens_BxT, taps=inputs)

    def losses(logits):
        return _losses(clean, logits, tokens_BxT, replaced_BxT, predicts_BxT)

    y_hat_BxTxD = _reconstruction(sae, [tapped[name] for name in inputs], columns)
    mean_BxTxD = jnp.broadcast_to(mean_D[slice(*columns)], y_hat_BxTxD.shape)
    new = {"spliced": y_hat_BxTxD, "zero": jnp.zeros_like(mean_BxTxD), "mean": mean_BxTxD}
    sums = {
        "replaced": jnp.sum(replaced_BxT),
        "predicted": jnp.sum(predicts_BxT),
        "ce_clean": losses(clean)[0],
    }
    for name, new_BxTxD in new.items():
        logits, _ = model.forward(tokens_BxT, edits={site: lm.at(replaced_BxT, lm.put(new_BxTxD))})
        sums[f"ce_{name}"], sums[f"kl_{name}"] = losses(logits)
    return sums


@functools.partial(jax.jit, static_argnames="columns")
def _reconstruction(sae, inputs, columns):
    x_BxTxD = jnp.concatenate(inputs, axis=-1)
    return sae(x_BxTxD.astype(jnp.float32))[..., slice(*columns)]


@jax.jit
def _losses(clean_BxTxV, logits_BxTxV, tokens_BxT, replaced_BxT, predicts_BxT):
    """Returns the sums of cross-entropy and of KL(clean || logits).

    The cross-entropy is that of the tokens after the positions that predict, KL that of replaced
    positions.
    """
    log_p_BxTxV = jax.nn.log_softmax(clean_BxTxV)
    difference = log_p_BxTxV - jax.nn.log_softmax(logits_BxTxV)
    kl_BxT = jnp.sum(jnp.exp(log_p_BxTxV) * difference, axis=-1)
    ce_BxT = lm.next_token_loss(logits_BxTxV, tokens_BxT)
    return jnp.sum(ce_BxT, where=predicts_BxT[:, :-1]), jnp.sum(kl_BxT, where=replaced_BxT)


def _finish(totals: dict[str, float]) -> dict[str, float]:
    count = {"ce": totals["predicted"], "kl": totals["replaced"]}
    out = {name: value / count[name[:2]] for name, value in totals.items() if name[:2] in count}
    for ablation in ("zero", "mean"):
        lost = out[f"ce_{ablation}"] - out["ce_clean"]
        recovered = (out[f"ce_{ablation}"] - out["ce_spliced"]) / lost if lost else float("nan")
        out[f"ce_recovered_{ablation}"] = recovered
    return out | {name: int(totals[name]) for name in ("replaced", "predicted")}
