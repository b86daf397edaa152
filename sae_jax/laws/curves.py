"""The numbers that figures of a fit draw, and curve.csv: points, curves, bands and residuals."""

import dataclasses

import numpy as np

from sae_jax.laws.fitting import Fit
from sae_jax.laws.isoflop import IsoflopFit
from sae_jax.laws.results import distinct

COLUMNS = (
    "what", "flops", "d_sae", "tokens", "k", "loss", "fitted", "low", "high", "residual",
    "d_sae_low", "d_sae_high", "tokens_low", "tokens_high",
)  # fmt: skip
_BEYOND = 3.0  # times the range of compute that curves go on


@dataclasses.dataclass(frozen=True)
class Band:
    """A curve (X,) with the ends of its 95% band, NaN where no draw of the bootstrap has one."""

    at: np.ndarray
    low: np.ndarray
    high: np.ndarray


def log_range(values: np.ndarray, beyond: float = 1.0) -> np.ndarray:
    """Returns 100 values, evenly spaced in the logarithm, over the range of `values` and up to
    `beyond` times its end.
    """
    return np.geomspace(values.min(), values.max() * beyond, 100)


def budgets(values: np.ndarray, planned: dict | None) -> np.ndarray:
    """Returns the budgets (100,) at which a curve against compute is drawn, from those of the runs
    to some way beyond them, and beyond the planned run.
    """
    beyond = _BEYOND
    if planned:
        beyond = max(beyond, 1.3 * planned["flops"] / values.max())
    return log_range(values, beyond)


def along_compute(found: Fit | IsoflopFit, flops: np.ndarray) -> dict[str, Band]:
    """Returns what budgets (B,) buy by a fit that has a frontier: `loss`, and but for the law power
    `d_sae` and `tokens`.
    """
    if isinstance(found, IsoflopFit):
        at, draws = found.at(flops), found.at(flops, found.drawn)
        names = ("d_sae", "tokens", "loss")
        return {name: _band(at[:, i], draws[..., i], 1.0) for i, name in enumerate(names)}
    if found.law.name == "power":
        draws = found.at(flops, found.drawn.theta)
        return {"loss": _band(found.at(flops), draws, found.factor)}
    at, draws = found.frontier.at(flops), found.frontiers().at(flops)
    names = ("d_sae", "tokens", "loss")
    return {name: _band(at[name], draws[name], found.factor) for name in names}


def along_size(found: Fit) -> list[tuple[dict[str, np.ndarray], Band]]:
    """Returns the loss against d_sae for each k, at the most tokens, of a law of d_sae.

    Each line is the law's columns (100,) and the loss there.
    """
    columns = found.results.columns
    sizes = log_range(columns["d_sae"])
    lines = []
    for k in distinct(columns["k"]) if "k" in found.law.columns else [None]:
        at = {"d_sae": sizes}
        if k is not None:
            at["k"] = np.full(len(sizes), k)
        if "tokens" in found.law.columns:
            at["tokens"] = np.full(len(sizes), columns["tokens"].max())
        draws = np.exp(found.law.log_loss(found.drawn.theta, at))
        lines.append((at, _band(found.estimate.loss(at), draws, found.factor)))
    return lines


def expected(found: Fit) -> np.ndarray:
    """Returns the loss (N,) that the fit expects of each run; of those held out, that of the fit
    without them.
    """
    loss = found.estimate.loss(found.results.columns)
    if len(found.held):
        theta = found.law.internal(found.holdout["params"])
        out = found.results.take(found.held)
        loss[found.held] = np.exp(found.law.log_loss(theta, out.columns))
    return loss


def table(found: Fit | IsoflopFit, planned: dict | None = None) -> list[dict]:
    """Returns the rows of curve.csv, which have the columns `COLUMNS` as far as they apply.

    `what` is `fitted` or `held out` for a run, `curve` for a point of the law with its 95% band,
    `low` to `high`, and `planned` for the prediction. Of isoflop, `near` and `away` are the runs
    that a budget's parabola goes through and the others, and `minimum` is where it is least. The
    `residual` is loss / fitted - 1, where runs held out are expected by the fit without them.

    Args:
      found: the fit.
      planned: the prediction of `predict.predict`, or None.
    """
    isoflop = isinstance(found, IsoflopFit)
    rows = _isoflop_points(found) if isoflop else _points(found)
    if isoflop or found.law.name == "power" or found.frontier is not None:
        flops = budgets(found.minima.flops if isoflop else found.results.compute, planned)
        k = getattr(found, "k", None)
        at = {"flops": flops} | ({} if k is None else {"k": np.full(len(flops), k)})
        rows += _curve(at, along_compute(found, flops))
    else:
        rows += [row for at, loss in along_size(found) for row in _curve(at, {"loss": loss})]
    if planned:
        low, high = planned["interval"]
        names = ("flops", "d_sae", "tokens", "k")
        row = {name: planned[name] for name in names if planned.get(name) is not None}
        rows.append({"what": "planned", **row, "fitted": planned["loss"], "low": low, "high": high})
    return rows


def _band(at: np.ndarray, draws: np.ndarray, factor: float) -> Band:
    """Returns a curve with the band of its draws (R, X), of which those that are not finite are
    left out; deviations are widened by `factor`.
    """
    draws = np.log(draws[np.isfinite(draws).all(axis=1)])
    if not len(draws):
        return Band(at, np.full_like(at, np.nan), np.full_like(at, np.nan))
    low, high = np.percentile(draws, [2.5, 97.5], axis=0) - np.log(at)
    return Band(at, at * np.exp(factor * low), at * np.exp(factor * high))


def _curve(at: dict[str, np.ndarray], bands: dict[str, Band]) -> list[dict]:
    """Returns the rows of a curve at given columns (X,); the law's other columns have bands too."""
    columns = dict(at)
    for name, band in bands.items():
        prefix = "" if name == "loss" else f"{name}_"
        columns["fitted" if name == "loss" else name] = band.at
        columns |= {f"{prefix}low": band.low, f"{prefix}high": band.high}
    return _rows("curve", columns)


def _points(found: Fit) -> list[dict]:
    """Returns a row for each run that a law is fitted to, or that is held out."""
    results = found.results
    fitted = expected(found)
    names = ("flops", "d_sae", "tokens", "k")
    columns = {name: results.columns[name] for name in names if name in results.columns}
    columns |= {"loss": results.loss, "fitted": fitted, "residual": results.loss / fitted - 1}
    rows = _rows("fitted", columns)
    for row in found.held:
        rows[row]["what"] = "held out"
    return rows


def _isoflop_points(found: IsoflopFit) -> list[dict]:
    """Returns a row for each run of each budget, and for each minimum."""
    rows = []
    for curve in found.minima.curves:
        loss, fitted = np.exp(curve.log_loss), np.exp(curve.fitted(curve.log_n))
        columns = {
            "flops": np.full(len(loss), curve.flops),
            "d_sae": np.exp(curve.log_n),
            "tokens": np.exp(curve.log_d),
            "loss": loss,
            "fitted": fitted,
            "residual": loss / fitted - 1,
        }
        of = _rows("near", columns)
        for row in np.flatnonzero(~curve.near):
            of[row]["what"] = "away"
        rows += of
    n, tokens, loss = np.exp(found.minima.log).T
    fitted = found.at(found.minima.flops)[:, 2]
    columns = {"flops": found.minima.flops, "d_sae": n, "tokens": tokens}
    columns |= {"loss": loss, "fitted": fitted, "residual": loss / fitted - 1}
    return rows + _rows("minimum", columns)


def _rows(what: str, columns: dict[str, np.ndarray]) -> list[dict]:
    """Returns rows of numbers; those that are not finite are left out."""
    lines = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [
        {"what": what} | {name: v for name, v in zip(columns, line, strict=True) if np.isfinite(v)}
        for line in lines
    ]
