"""Predicts losses with intervals, and what a budget buys: the best dictionary size and tokens."""

import dataclasses

import numpy as np
import scipy.stats

from sae_jax.errors import UserError
from sae_jax.laws import curves
from sae_jax.laws.fitting import Fit, cost_is_unknown
from sae_jax.laws.intervals import widening
from sae_jax.laws.isoflop import IsoflopFit

_MULTIPLE = 64  # sizes are multiples of it for matrix units and for sharding; small ones, of 8
_FAR_BEYOND = 3.0  # times the largest fitted value; beyond it a prediction has a warning
_NORMAL = scipy.stats.norm.ppf((np.arange(199) + 0.5) / 199)
_INTERVAL = (
    "95% prediction interval of one more run: the bootstrap's parameters, widened for the degrees "
    "of freedom, and the scatter of the runs about the fit; or twice the rms error held out, if "
    "that is more"
)


@dataclasses.dataclass(frozen=True)
class Losses:
    """Losses that a law expects of M runs, with 95% intervals.

    Attributes:
      loss: the law's loss (M,).
      low: the lower end of the interval of one more run's loss (M,).
      high: the upper end of that.
      law_low: the lower end of the interval of the law's own curve (M,), without a run's scatter.
      law_high: the upper end of that.
      beyond: how many times what was asked lies beyond the runs that were fitted (M,), in the
        quantity that is furthest out: the value over the largest, or the smallest over the value; 1
        within them.
    """

    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray
    law_low: np.ndarray
    law_high: np.ndarray
    beyond: np.ndarray


def predict(found: Fit | IsoflopFit, flops: float) -> dict:
    """Predicts the compute-optimal run of a budget.

    Args:
      found: a fit of a law that knows compute.
      flops: the budget.

    Returns:
      A dict: `flops`; `d_sae`, rounded up to a multiple of 64 (of 8 below 512); `tokens`; `loss`;
      `interval`, the 95% interval of one more run's loss; `interval_is`, what that means;
      `d_sae_interval` and `tokens_interval`, those of the best size and tokens by the law, None
      where no draw of the bootstrap has a frontier; `times_largest_budget`; `warnings`; and `k` for
      the joint law. The power law has None for d_sae, tokens and their intervals.

    Raises UserError for a law without a compute-optimal frontier.
    """
    size, tokens = None, None
    budget = columns = {"flops": np.array([flops])}
    if isinstance(found, IsoflopFit):
        n, data, _ = found.at(np.array([flops]))[0]
        size = round_size(n)
        tokens = int(data * n / size)
    elif found.law.name != "power":
        if found.frontier is None:
            raise UserError(no_frontier(found))
        size = round_size(found.frontier.at(np.array([flops]))["d_sae"][0])
        tokens = int(flops / found.frontier.cost.flops(size, 1))
        columns = {"d_sae": np.array([size]), "tokens": np.array([max(tokens, 1)])}
        if found.k is not None:
            columns["k"] = np.array([found.k])
    expected = losses(found, columns)
    largest = float(found.results.compute.max())
    k = getattr(found, "k", None)
    asked = {"flops": float(flops), "d_sae": size, "tokens": tokens, "k": k}
    out = {
        "flops": float(flops),
        "d_sae": size,
        "tokens": tokens,
        "loss": float(expected.loss[0]),
        "interval": [float(expected.low[0]), float(expected.high[0])],
        "interval_is": _INTERVAL,
        **_intervals(found, budget["flops"]),
        "times_largest_budget": float(flops) / largest,
        "warnings": warnings(found, {name: v for name, v in asked.items() if v is not None}),
    }
    return out if k is None else out | {"k": round(k)}


def _intervals(found: Fit | IsoflopFit, flops: np.ndarray) -> dict[str, list[float] | None]:
    """Returns the 95% intervals of the best size and tokens of one budget (1,)."""
    bands = curves.along_compute(found, flops)
    out = {}
    for name in ("d_sae", "tokens"):
        ends = (
            [float(bands[name].low[0]), float(bands[name].high[0])] if name in bands else [np.nan]
        )
        out[f"{name}_interval"] = ends if np.isfinite(ends).all() else None
    return out


def no_frontier(found: Fit) -> str:
    """Returns why a fit does not say what a budget buys, and what it does say."""
    if found.law.name == "openai_nk":
        return (
            "openai_nk knows no tokens, so it has no compute-optimal run; it predicts a loss at "
            'given n and k, --predict_at="d_sae=16384 k=32", and --law=joint has a frontier'
        )
    at = " ".join(f"{name}=..." for name in found.law.columns)
    why = f"the loss of {found.law.name} as fitted does not fall in both d_sae and tokens"
    if found.law.name in ("chinchilla", "joint") and cost_is_unknown(found.results):
        why = "the column flops does not say what another run costs"
    return (
        f"{why}, so it has no compute-optimal run; it predicts a loss at given values, "
        f'--predict_at="{at}"'
    )


def losses(found: Fit | IsoflopFit, columns: dict[str, np.ndarray]) -> Losses:
    """Returns the losses to expect at columns of M rows, those that the law needs.

    Args:
      found: the fit.
      columns: values (M,) by our names; of isoflop, flops. More than the law needs only counts for
        how far beyond the runs they are.
    """
    if isinstance(found, IsoflopFit):
        at, moved, scatter, factor = _by_isoflop(found, columns["flops"])
    else:
        estimate, drawn = found.estimate, found.drawn
        at = estimate.law.log_loss(estimate.theta, columns)
        moved = estimate.law.log_loss(drawn.theta, columns) - at
        z = estimate.problem.coordinates(estimate.theta)
        scatter = estimate.problem.residuals(z, estimate.problem.y_N)[0][0]
        factor = widening(drawn.runs, len(estimate.theta))
    law_ends = np.exp(at + factor * np.percentile(moved, [2.5, 97.5], axis=0))
    ends = [
        # How far each draw of the parameters moves the loss, with how far each run lies off.
        np.percentile(of[:, None] + scatter, [2.5, 97.5])
        for of in moved.T
    ]
    low, high = np.exp(at + factor * np.array(ends).T)
    loss = np.exp(at)
    if found.holdout:  # a law that misses what it has not seen will miss the next run too
        missed = np.exp(2 * found.holdout["rms_relative_error"])
        low, high = np.minimum(low, loss / missed), np.maximum(high, loss * missed)
    beyond = np.max([_beyond(found, name, values) for name, values in columns.items()], axis=0)
    return Losses(loss, low, high, *law_ends, beyond)


def _beyond(found: Fit | IsoflopFit, name: str, values: np.ndarray) -> np.ndarray:
    """Returns how many times values of a column lie beyond those that were fitted; 1 within."""
    fitted = _fitted(found, name)
    return np.maximum(1.0, np.maximum(values / fitted.max(), fitted.min() / values))


def _fitted(found: Fit | IsoflopFit, name: str) -> np.ndarray:
    """Returns the values (N,) of a column that a law was fitted to."""
    return found.results.compute if name == "flops" else found.results.columns[name]


def _by_isoflop(found: IsoflopFit, flops: np.ndarray):
    """Returns the log-losses (M,) by the power law of the minima, how far the resamples move them
    (R, M), how far one run lies off (S,), and the factor of widening.
    """
    at = np.log(found.at(flops)[:, 2])
    moved = np.log(found.at(flops, found.drawn)[..., 2]) - at
    # One run scatters as runs about their parabola do, or as minima about their line.
    scatter = max(found.lines[2].rms_log_error, found.run_scatter)
    degrees = len(found.minima.used) - 2
    factor = scipy.stats.t.ppf(0.975, degrees) / 1.96 * np.sqrt((degrees + 2) / degrees)
    return at, moved, scatter * factor * _NORMAL, 1.0


def warnings(found: Fit | IsoflopFit, asked: dict[str, float]) -> list[str]:
    """Returns a warning, if any, that a prediction lies far beyond the runs that were fitted.

    Args:
      found: the fit.
      asked: the values of one run by our names.
    """
    far = []
    for name, value in asked.items():
        times = float(_beyond(found, name, np.float64(value)))
        if times > _FAR_BEYOND:
            what = "budget" if name == "flops" else found.results.names.get(name, name)
            is_more = value > _fitted(found, name).max()
            far.append(
                f"{times:.3g} times the largest {what}"
                if is_more
                else f"1/{times:.3g} of the smallest {what}"
            )
    if not far:
        return []
    return [
        f"the prediction is for {' and '.join(far)} that was fitted; no law is known to hold so "
        "far, and its interval does not include the law's being wrong"
    ]


def round_size(size: float) -> int:
    """Rounds a dictionary size up to a multiple of 64, or of 8 below 512."""
    multiple = _MULTIPLE if size >= 8 * _MULTIPLE else 8
    return int(-(-size // multiple) * multiple)
