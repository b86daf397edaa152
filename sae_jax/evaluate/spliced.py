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
from sae_jax.evaluate.metrics import add_up_each
from sae_jax.evaluate.processes import own_share
from sae_jax.evaluate.sources import input_and_target_sites
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE


def measure_spliced(
    saes: Sequence[SAE],
    model: lm.LanguageModel,
    sites: Sequence[str],
    tokens: np.ndarray,
    replaced: np.ndarray,
    mean: np.ndarray,
    is_text: np.ndarray | None = None,
) -> list[dict[str, dict[str, float]]]:
    """Returns the metrics of each target site, by the site's name, for each SAE.

    On a batch the model runs untouched, with zero and with mean ablation once for all SAEs, and
    once more for each SAE.

    Args:
      saes: the SAEs; all of them have the same kind and sites.
      model: their language model.
      sites: the SAEs' sites, a transcoder's target last.
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
    inputs, targets = input_and_target_sites(saes[0].config.kind, sites)
    mean = jnp.asarray(mean, jnp.float32)
    found, first = [{} for _ in saes], 0
    for site in targets:
        columns = (first, first + model.site_width(site))
        starts = own_share(range(0, len(tokens), size))
        totals = add_up_each(
            _batch_sums(
                model,
                saes,
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
        for of_sae, sums in zip(found, totals, strict=True):
            of_sae[site] = _finish({name: float(value) for name, value in sums.items()})
        first = columns[1]
    return found


def _batch_sums(
    model, saes, tokens_BxT, replaced_BxT, predicts_BxT, mean_D, inputs, site, columns
) -> list[dict]:
    """Returns each SAE's sums of a batch for one target site, which has `columns` (first, stop) of
    the d_out.

    The model runs one time after the other, because a batch of its logits is large.
    """
    clean, tapped = model.forward(tokens_BxT, taps=inputs)
    inputs_BxTxD = [tapped[name] for name in inputs]
    del tapped

    def with_in_place(name, new_BxTxD):
        edits = {site: lm.at(replaced_BxT, lm.put(new_BxTxD))}
        logits, _ = model.forward(tokens_BxT, edits=edits)
        ce, kl = _losses(clean, logits, tokens_BxT, replaced_BxT, predicts_BxT)
        return {f"ce_{name}": ce, f"kl_{name}": kl}

    spliced = [
        with_in_place("spliced", _reconstruction(sae, inputs_BxTxD, columns)) for sae in saes
    ]
    shape_BxTxD = (*tokens_BxT.shape, columns[1] - columns[0])
    mean_BxTxD = jnp.broadcast_to(mean_D[slice(*columns)], shape_BxTxD)
    shared = {
        "replaced": jnp.sum(replaced_BxT),
        "predicted": jnp.sum(predicts_BxT),
        "ce_clean": _losses(clean, clean, tokens_BxT, replaced_BxT, predicts_BxT)[0],
        **with_in_place("zero", jnp.zeros_like(mean_BxTxD)),
        **with_in_place("mean", mean_BxTxD),
    }
    return [shared | of_sae for of_sae in spliced]


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
