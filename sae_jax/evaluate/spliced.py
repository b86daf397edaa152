"""An SAE inside its language model: what the model loses when it reads y_hat for y.

The SAE's targets y are the activations that it reads, for a transcoder those of another site. They
are replaced at the positions that count and stay as they are at others; of a crosscoder's sites,
one at a time. y_hat is computed from the untouched model's activations. Cross-entropy (nats a
token, of the token after each replaced position) and KL(clean || replaced) (over replaced
positions) for three replacements: y_hat, zero, and the mean of y.

    ce_recovered = (ce_ablated - ce_spliced) / (ce_ablated - ce_clean)

for zero and for mean ablation: 1 if nothing is lost, 0 if the SAE is no better than ablation.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.config import UserError
from sae_jax.evaluate.metrics import add_up
from sae_jax.evaluate.processes import shared_out
from sae_jax.evaluate.progress import progress
from sae_jax.evaluate.sources import LanguageModel, input_and_target_sites, pad_rows
from sae_jax.sae import SAE

_REPLACEMENTS = ("spliced", "zero", "mean")


def measure_spliced(
    sae: SAE,
    model: LanguageModel,
    sites: Sequence[str],
    tokens: np.ndarray,
    replaced: np.ndarray,
    mean: np.ndarray,
) -> dict[str, dict[str, float]]:
    """By target site, metrics over `tokens` (sequences, T): `ce_*`, `ce_recovered_*`, `kl_*`, and
    how many positions were `replaced` and `predicted`.

    sites: the SAE's, a transcoder's target last. replaced: (sequences, T) bool, positions whose
    activations are replaced. mean: (d_out,) of the targets, for mean ablation. UserError where
    nothing is replaced that predicts a token.
    """
    if not replaced[:, :-1].any():
        raise UserError("there is no position to splice the SAE in at: all of them are excluded")
    share = -(-len(tokens) // jax.process_count())
    size = model.sequences_at_once(share, tokens.shape[1])
    inputs, targets = input_and_target_sites(sae, sites)
    mean = jnp.asarray(mean, jnp.float32)
    found, first = {}, 0
    for site in targets:
        columns = (first, first + lm.site_width(model.config, site))
        step = functools.partial(
            _batch_sums, config=model.config, inputs=tuple(inputs), site=site, columns=columns
        )
        starts = shared_out(range(0, len(tokens), size))
        totals = add_up(
            step(
                model.params,
                sae,
                jnp.asarray(pad_rows(tokens[start : start + size], size)),
                jnp.asarray(pad_rows(replaced[start : start + size], size)),
                mean,
            )
            for start in progress(starts, f"splicing the SAE into its model at {site}")
        )
        found[site] = _finish({name: float(value) for name, value in totals.items()})
        first = columns[1]
    return found


@functools.partial(jax.jit, static_argnames=("config", "inputs", "site", "columns"))
def _batch_sums(
    params, sae, tokens_BxT, replaced_BxT, mean_D, *, config, inputs, site, columns
) -> dict:
    """Sums for one target site, which has `columns` (first, stop) of the SAE's d_out."""
    clean, tapped = lm.forward(params, tokens_BxT, config, taps=inputs)
    log_p_BxTxV = jax.nn.log_softmax(clean)
    x_BxTxD = jnp.concatenate([tapped[name] for name in inputs], axis=-1)
    y_hat_BxTxD = sae(x_BxTxD.astype(jnp.float32))[..., slice(*columns)]
    mean_BxTxD = jnp.broadcast_to(mean_D[slice(*columns)], y_hat_BxTxD.shape)
    predicts = replaced_BxT[:, :-1]

    def losses(new_BxTxD):
        def edit(y_BxTxD):
            return jnp.where(replaced_BxT[:, :, None], new_BxTxD.astype(y_BxTxD.dtype), y_BxTxD)

        logits, _ = lm.forward(params, tokens_BxT, config, edits={site: edit})
        difference = log_p_BxTxV - jax.nn.log_softmax(logits)
        kl_BxT = jnp.sum(jnp.exp(log_p_BxTxV) * difference, axis=-1)
        ce = jnp.sum(lm.next_token_loss(logits, tokens_BxT), where=predicts)
        return ce, jnp.sum(kl_BxT, where=replaced_BxT)

    # One after the other: the model is compiled once, and one batch of their logits held.
    new_3xBxTxD = jnp.stack([y_hat_BxTxD, jnp.zeros_like(mean_BxTxD), mean_BxTxD])
    ce, kl = jax.lax.map(losses, new_3xBxTxD)
    return {
        "replaced": jnp.sum(replaced_BxT),
        "predicted": jnp.sum(predicts),
        "ce_clean": jnp.sum(lm.next_token_loss(clean, tokens_BxT), where=predicts),
        **{f"ce_{name}": ce[i] for i, name in enumerate(_REPLACEMENTS)},
        **{f"kl_{name}": kl[i] for i, name in enumerate(_REPLACEMENTS)},
    }


def _finish(totals: dict[str, float]) -> dict[str, float]:
    count = {"ce": totals["predicted"], "kl": totals["replaced"]}
    out = {name: value / count[name[:2]] for name, value in totals.items() if name[:2] in count}
    for ablation in ("zero", "mean"):
        lost = out[f"ce_{ablation}"] - out["ce_clean"]
        recovered = (out[f"ce_{ablation}"] - out["ce_spliced"]) / lost if lost else float("nan")
        out[f"ce_recovered_{ablation}"] = recovered
    return out | {name: int(totals[name]) for name in ("replaced", "predicted")}
