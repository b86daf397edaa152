"""Measures how well an SAE reconstructs its targets, and how sparsely.

A jitted function returns a batch's sums in float32, which are added up on the host in float64.
Every metric is a function of sums over all rows, and not a mean of the batches' metrics.

The targets y are an autoencoder's inputs, the other site of a transcoder, or the sites of a
crosscoder side by side. With reconstructions y_hat, N rows, and norms over the d_out dimensions:

    mse                           1/N sum ||y - y_hat||^2, summed over d_out, in the units of y
    fvu                           sum ||y - y_hat||^2 / sum ||y - mean||^2, the mean over all N rows
    explained_variance            1 - fvu
    cosine_similarity             1/N sum y . y_hat / (||y|| ||y_hat||)
    norm_in, norm_out             1/N sum ||y||, 1/N sum ||y_hat||
    norm_ratio (shrinkage)        1/N sum ||y_hat|| / ||y||
    relative_reconstruction_bias  sum ||y_hat||^2 / sum y . y_hat; below 1: shrunk
                                  (Rajamanoharan et al. 2024, arXiv:2404.16014, eq. 10)
    l0                            1/N sum of latents above zero
    l1                            1/N sum over latents of activation
    dead_fraction                 latents that fired on none of the N rows

An activation here is the length of what its latent adds to y_hat, in the units of y: the latent
times the norm of its decoder row, divided by the scale of the SAE's targets. So it does not depend
on how the SAE splits length between encoder, decoder and normalisation.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.errors import UserError
from sae_jax.evaluate.processes import add_up_all, from_all
from sae_jax.sae import SAE

_TINY = 1e-12  # norms below count as zero: such a row has cosine similarity and ratio 0


@dataclasses.dataclass(frozen=True)
class RowMetrics:
    """Metrics of an SAE over rows.

    Attributes:
      rows: how many rows there are.
      scalars: the metrics above, by name.
      density: the part of the rows on which each latent fires, (d_sae,).
      mean_activation: the mean activation of each latent where it fires, (d_sae,).
      max_activation: the largest activation of each latent, (d_sae,).
      mean: the mean of the targets, (d_out,).
      site_fvu: FVU at each of a crosscoder's sites, else at the only one, (sites,).
    """

    rows: int
    scalars: dict[str, float]
    density: np.ndarray
    mean_activation: np.ndarray
    max_activation: np.ndarray
    mean: np.ndarray
    site_fvu: np.ndarray


def measure_rows(
    saes: Sequence[SAE], batches: Iterable[tuple[np.ndarray, np.ndarray]]
) -> list[RowMetrics]:
    """Returns the metrics of each of `saes` over the rows of `batches`.

    A batch is a pair of rows (B, width) of any float type, with the columns of a stream, and a mask
    (B,) of the rows that count. The batches are read, and put on the device, once. Where there are
    several processes, each gives its own share of the batches, and all get the same metrics.
    Batches of one size compile once.

    Raises UserError if no row counts.
    """
    batches = iter(batches)
    first = next((batch for batch in batches if batch[1].any()), None)
    mean = None if first is None else np.asarray(first[0], np.float32)[first[1]].mean(axis=0)
    mean = next((mean for mean in from_all(mean) if mean is not None), None)
    if mean is None:
        raise UserError("there are no rows to evaluate on: all of them are excluded")
    # The mean of the first batch is subtracted from all rows, so that the variance is not the
    # difference of two large sums.
    shifts = [sae.split(mean)[1] for sae in saes]
    totals = add_up_each(
        _sums_of_each(saes, jnp.asarray(rows), jnp.asarray(used), shifts)
        for rows, used in itertools.chain([] if first is None else [first], batches)
    )
    return [
        _finish(sums, shift.astype(np.float64), sae.config.site_widths or (len(shift),))
        for sae, sums, shift in zip(saes, totals, shifts, strict=True)
    ]


def _sums_of_each(saes, rows: jax.Array, used: jax.Array, shifts) -> list[dict[str, jax.Array]]:
    return [
        batch_sums(sae, rows, used, jnp.asarray(shift))
        for sae, shift in zip(saes, shifts, strict=True)
    ]


def add_up_each(steps: Iterable[Sequence[dict[str, jax.Array]]]) -> list[dict[str, np.ndarray]]:
    """Adds up sums by name, over steps and over all processes, in float64 on the host.

    A step has a dict of sums for each SAE, and so has the result. Of values named `max_*` the
    maximum is taken. A step's sums are read after the next step was dispatched, so that the device
    does not wait.
    """
    own: list[dict[str, np.ndarray]] = []
    for sums in _one_behind(steps):
        own = [add_up_all(pair) for pair in zip(own or [{}] * len(sums), sums, strict=True)]
    shares = [share for share in from_all(own) if share]
    return [add_up_all(parts) for parts in zip(*shares, strict=True)]


def _one_behind(steps: Iterable[Sequence[dict]]) -> Iterator[list[dict[str, np.ndarray]]]:
    """Yields each step's sums on the host after the next step was dispatched."""
    pending = None
    for sums in steps:
        if pending is not None:
            yield jax.device_get(pending)
        pending = sums
    if pending is not None:
        yield jax.device_get(pending)


@jax.jit
def batch_sums(sae: SAE, rows_BxW, used_B, shift_D) -> dict[str, jax.Array]:
    """Returns sums over the used rows of one batch, by name.

    `centred`, `centred_squared` and `error` have one for each column of the targets, (d_out,).
    `fired`, `activation` and `max_activation` have one for each latent, (d_sae,). The others are
    scalars.
    """
    used_Bx1 = used_B[:, None]
    x, y = sae.split(jnp.where(used_Bx1, rows_BxW.astype(jnp.float32), 0.0))
    latents = sae.encode(x)
    y_hat = sae.decode(latents, x)
    activations = jnp.where(used_Bx1, latents * activation_scale(sae), 0.0)
    norm, norm_hat = jnp.linalg.norm(y, axis=1), jnp.linalg.norm(y_hat, axis=1)
    dot = jnp.sum(y * y_hat, axis=1)
    centred = y - shift_D
    fired = activations > 0

    def total(per_row_B):
        return jnp.sum(per_row_B, where=used_B)

    return {
        "rows": jnp.sum(used_B),
        "centred": jnp.sum(centred, axis=0, where=used_Bx1),
        "centred_squared": jnp.sum(centred**2, axis=0, where=used_Bx1),
        "error": jnp.sum((y - y_hat) ** 2, axis=0, where=used_Bx1),
        "cosine": total(dot / jnp.maximum(norm * norm_hat, _TINY)),
        "dot": total(dot),
        "norm": total(norm),
        "norm_hat": total(norm_hat),
        "squared_norm_hat": total(norm_hat**2),
        "norm_ratio": total(norm_hat / jnp.maximum(norm, _TINY) * (norm > _TINY)),
        "fired": jnp.sum(fired, axis=0),
        "activation": jnp.sum(activations, axis=0),
        "max_activation": jnp.max(activations, axis=0),
    }


def activation_scale(sae: SAE) -> jax.Array:
    """Returns what latents (d_sae,) are multiplied by to give the lengths they add to y_hat."""
    return jnp.linalg.norm(sae.w_dec[...] / sae.target_scale, axis=1)


def _finish(totals: dict, shift: np.ndarray, site_widths: tuple[int, ...]) -> RowMetrics:
    """Returns the metrics that follow from the sums over all rows."""
    n = totals["rows"]
    # One value for each column. Rounding may make a variance of 0 negative.
    variance = np.maximum(totals["centred_squared"] - totals["centred"] ** 2 / n, 0.0)
    starts = np.cumsum((0, *site_widths[:-1]))
    site_variance, site_error = (np.add.reduceat(v, starts) for v in (variance, totals["error"]))
    fvu = _ratio(site_error.sum(), site_variance.sum())
    scalars = {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "mse": totals["error"].sum() / n,
        "cosine_similarity": totals["cosine"] / n,
        "norm_in": totals["norm"] / n,
        "norm_out": totals["norm_hat"] / n,
        "norm_ratio": totals["norm_ratio"] / n,
        "relative_reconstruction_bias": _ratio(totals["squared_norm_hat"], totals["dot"]),
        "l0": totals["fired"].sum() / n,
        "l1": totals["activation"].sum() / n,
        "dead_fraction": np.mean(totals["fired"] == 0),
    }
    return RowMetrics(
        rows=int(n),
        scalars={name: float(value) for name, value in scalars.items()},
        density=totals["fired"] / n,
        mean_activation=totals["activation"] / np.maximum(totals["fired"], 1),
        max_activation=totals["max_activation"],
        mean=shift + totals["centred"] / n,
        site_fvu=_ratio(site_error, site_variance),
    )


def _ratio(a, b):
    """Returns a / b in float64, NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=np.asarray(b) != 0)
