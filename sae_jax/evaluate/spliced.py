"""An SAE inside its language model: what the model loses when it reads x_hat for x.

The site's activations are replaced at the positions that count and stay as they are at others.
Cross-entropy (nats a token, of the token after each replaced position) and KL(clean || replaced)
(over replaced positions) for three replacements: the SAE's reconstruction, zero, and the mean.

    ce_recovered = (ce_ablated - ce_spliced) / (ce_ablated - ce_clean)

for zero and for mean ablation: 1 if nothing is lost, 0 if the SAE is no better than ablation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.config import UserError
from sae_jax.evaluate.metrics import add_up
from sae_jax.evaluate.progress import progress
from sae_jax.evaluate.sources import LanguageModel, pad_rows
from sae_jax.sae import SAE


def measure_spliced(
    sae: SAE,
    model: LanguageModel,
    site: str,
    tokens: np.ndarray,
    replaced: np.ndarray,
    mean: np.ndarray,
) -> dict[str, float]:
    """Metrics over `tokens` (sequences, T): `ce_*`, `ce_recovered_*`, `kl_*`, and how many
    positions were `replaced` and `predicted`.

    replaced: (sequences, T) bool, positions whose activations are replaced. mean: (width,), the
    activation of mean ablation. UserError where nothing is replaced that predicts a token.
    """
    if not replaced[:, :-1].any():
        raise UserError("there is no position to splice the SAE in at: all of them are excluded")
    size = model.sequences_at_once(*tokens.shape)
    step = functools.partial(_batch_sums, config=model.config, site=site)
    mean = jnp.asarray(mean, jnp.float32)
    totals = add_up(
        step(
            model.params,
            sae,
            jnp.asarray(pad_rows(tokens[start : start + size], size)),
            jnp.asarray(pad_rows(replaced[start : start + size], size)),
            mean,
        )
        for start in progress(range(0, len(tokens), size), "splicing the SAE into its model")
    )
    return _finish({name: float(value) for name, value in totals.items()})


@functools.partial(jax.jit, static_argnames=("config", "site"))
def _batch_sums(params, sae, tokens_BxT, replaced_BxT, mean_D, *, config, site) -> dict:
    replacements = {
        "spliced": lambda x: sae(x.astype(jnp.float32)),
        "zero": jnp.zeros_like,
        "mean": lambda x: jnp.broadcast_to(mean_D, x.shape),
    }
    predicts = replaced_BxT[:, :-1]
    clean, _ = lm.forward(params, tokens_BxT, config)
    log_p_BxTxV = jax.nn.log_softmax(clean)
    sums = {
        "replaced": jnp.sum(replaced_BxT),
        "predicted": jnp.sum(predicts),
        "ce_clean": jnp.sum(lm.next_token_loss(clean, tokens_BxT), where=predicts),
    }
    for name, replace in replacements.items():

        def edit(x_BxTxD, replace=replace):
            new = replace(x_BxTxD).astype(x_BxTxD.dtype)
            return jnp.where(replaced_BxT[:, :, None], new, x_BxTxD)

        logits, _ = lm.forward(params, tokens_BxT, config, edits={site: edit})
        difference = log_p_BxTxV - jax.nn.log_softmax(logits)
        kl_BxT = jnp.sum(jnp.exp(log_p_BxTxV) * difference, axis=-1)
        sums[f"ce_{name}"] = jnp.sum(lm.next_token_loss(logits, tokens_BxT), where=predicts)
        sums[f"kl_{name}"] = jnp.sum(kl_BxT, where=replaced_BxT)
    return sums


def _finish(totals: dict[str, float]) -> dict[str, float]:
    count = {"ce": totals["predicted"], "kl": totals["replaced"]}
    out = {name: value / count[name[:2]] for name, value in totals.items() if name[:2] in count}
    for ablation in ("zero", "mean"):
        lost = out[f"ce_{ablation}"] - out["ce_clean"]
        recovered = (out[f"ce_{ablation}"] - out["ce_spliced"]) / lost if lost else float("nan")
        out[f"ce_recovered_{ablation}"] = recovered
    return out | {name: int(totals[name]) for name in ("replaced", "predicted")}
