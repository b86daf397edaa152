"""Finds the maxima of latents' activations, which steering is measured by."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.evaluate import report
from sae_jax.evaluate.batching import rows_at_once
from sae_jax.evaluate.metrics import measure_rows
from sae_jax.evaluate.sources import HeldOutRows, ModelRows, check_sites
from sae_jax.interpret.collection import Collection
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE


@dataclasses.dataclass(frozen=True)
class Maxima:
    """The maxima of latents' activations, and what they are the maxima of.

    Attributes:
      values: (latents,), as lengths in the model's units (see `evaluate.metrics`).
      rows: of how many tokens.
      where: of which, in words.
    """

    values: np.ndarray
    rows: int
    where: str


def find_maxima(
    sae: SAE,
    latents: Sequence[int],
    run: paths.AnyPath | None = None,
    source: HeldOutRows | ModelRows | None = None,
) -> Maxima:
    """Returns the maxima of latents: those that a run's evaluation or dashboard has, whichever saw
    more tokens, or else those on `source`.

    Raises UserError if the SAE has no such latent, or if there is nothing to find them on.

    Args:
      sae: the SAE.
      latents: the latents' indices.
      run: the directory of the run that the SAE is of, as it has ended; None: it is of none.
      source: rows to measure them on where the run has none.
    """
    sae.direction(np.asarray(latents))  # refuses those that there are not
    found = [] if run is None else [_evaluated(run), _collected(run)]
    known = [maxima for maxima in found if maxima is not None]
    if known:
        best = max(known, key=lambda maxima: maxima.rows)
        return dataclasses.replace(best, values=best.values[np.asarray(latents)])
    if source is None:
        raise UserError(
            "the latents' maxima are not known: run `sae-jax eval` on the run first, or give "
            "--text to measure them on"
        )
    check_sites(sae, source)
    size = rows_at_once(sae.config.d_sae)
    what = f"maxima over {source.num_rows:,} tokens"
    batches = progress(source.batches(size), what, source.num_batches(size))
    (rows,) = measure_rows([sae], batches)
    where = source.settings["rows"]
    return Maxima(rows.max_activation[np.asarray(latents)], rows.rows, where)


def _evaluated(run: paths.AnyPath) -> Maxima | None:
    file = run / "eval.json"
    if not report.is_of(file, run):
        return None
    rows = report.load(file).rows
    return Maxima(rows.max_activation, rows.rows, str(file))


def _collected(run: paths.AnyPath) -> Maxima | None:
    folder = run / "dashboard" / "collection"
    if not report.is_of(folder / "collection.json", run):
        return None
    collection = Collection(folder)
    return Maxima(collection.max_activation, collection.about.rows, str(folder))
