"""Predicts what a budget buys: the best dictionary size and tokens, and the loss to expect."""

import numpy as np
import scipy.stats

from sae_jax.errors import UserError
from sae_jax.laws.fitting import Fit
from sae_jax.laws.intervals import widening
from sae_jax.laws.isoflop import IsoflopFit

_MULTIPLE = 64  # sizes are multiples of it for matrix units and for sharding; small ones, of 8
_FAR_BEYOND = 3.0  # times the largest fitted budget; beyond it a prediction has a warning
_INTERVAL = (
    "95% prediction interval of one more run: the bootstrap's parameters, widened for the degrees "
    "of freedom, and the scatter of the runs about the fit; or twice the rms error held out, if "
    "that is more"
)


def predict(found: Fit | IsoflopFit, flops: float) -> dict:
    """Predicts the compute-optimal run of a budget.

    Args:
      found: a fit of a law that knows compute.
      flops: the budget.

    Returns:
      A dict: `flops`; `d_sae`, rounded up to a multiple of 64 (of 8 below 512); `tokens`; `loss`;
      `interval`, the 95% interval of one more run's loss; `interval_is`, what that means;
      `times_largest_budget`; and `k` for the joint law. The power law has None for d_sae and
      tokens.

    Raises UserError for a law without a compute-optimal frontier.
    """
    if isinstance(found, IsoflopFit):
        size, tokens, loss, interval = _predict_by_isoflop(found, flops)
    elif found.law.name == "power":
        size, tokens = None, None
        columns = {"flops": np.array([flops])}
        loss, interval = found.estimate.loss(columns)[0], _prediction_interval(found, columns)
    elif found.frontier is not None:
        size, tokens, loss, interval = _predict_on_frontier(found, flops)
    else:
        raise UserError(
            f"--predict_flops: {found.law.name} as fitted has no compute-optimal frontier "
            f"{'(it knows no tokens); fit --law=joint' if found.law.name == 'openai_nk' else ''}"
        )
    if found.holdout:  # a law that misses what it has not seen will miss the next run too
        missed = np.exp(2 * found.holdout["rms_relative_error"])
        interval = min(interval[0], loss / missed), max(interval[1], loss * missed)
    largest = float(found.results.compute.max())
    out = {
        "flops": float(flops),
        "d_sae": size,
        "tokens": tokens,
        "loss": float(loss),
        "interval": [float(end) for end in interval],
        "interval_is": _INTERVAL,
        "times_largest_budget": float(flops) / largest,
    }
    k = getattr(found, "k", None)
    return out if k is None else out | {"k": round(k)}


def warnings(prediction: dict) -> list[str]:
    """Returns a warning, if any, that a prediction lies far beyond the budgets that were fitted."""
    times = prediction["times_largest_budget"]
    if times <= _FAR_BEYOND:
        return []
    return [
        f"the prediction is for {times:.3g} times the largest budget that was fitted; no law is "
        "known to hold so far, and its interval does not include the law's being wrong"
    ]


def round_size(size: float) -> int:
    """Rounds a dictionary size up to a multiple of 64, or of 8 below 512."""
    multiple = _MULTIPLE if size >= 8 * _MULTIPLE else 8
    return int(-(-size // multiple) * multiple)


def _predict_on_frontier(found: Fit, flops: float):
    """Returns (size, tokens, loss, interval) on the frontier of chinchilla or joint."""
    cost = found.frontier.cost
    size = round_size(found.frontier.at(np.array([flops]))["d_sae"][0])
    tokens = int(flops / cost.flops(size, 1))
    columns = {"d_sae": np.array([size]), "tokens": np.array([max(tokens, 1)])}
    if found.k is not None:
        columns["k"] = np.array([found.k])
    return size, tokens, found.estimate.loss(columns)[0], _prediction_interval(found, columns)


def _prediction_interval(found: Fit, columns) -> np.ndarray:
    """Returns the 95% interval (2,) of the loss of one more run at `columns` of one row."""
    estimate, drawn = found.estimate, found.drawn
    at = estimate.law.log_loss(estimate.theta, columns)[0]
    moved = estimate.law.log_loss(drawn.theta, columns)[:, 0] - at
    z = estimate.problem.coordinates(estimate.theta)
    residual = estimate.problem.residuals(z, estimate.problem.y_N)[0][0]
    return _combine_with_scatter(at, moved, residual, widening(drawn.runs, len(estimate.theta)))


def _combine_with_scatter(at: float, moved_R: np.ndarray, residual_N: np.ndarray, factor: float):
    """Returns the 95% interval (2,) of a loss.

    Args:
      at: the fitted log-loss.
      moved_R: how far each draw of the parameters moves it.
      residual_N: how far each run lies from the fit. Every draw is combined with every run.
      factor: the factor by which the interval is widened.
    """
    total = moved_R[:, None] + residual_N
    return np.exp(at + factor * np.percentile(total, [2.5, 97.5]))


def _predict_by_isoflop(found: IsoflopFit, flops: float):
    """Returns (size, tokens, loss, interval) by the power laws of the minima."""
    n, tokens, loss = found.at(np.array([flops]))[0]
    size = round_size(n)
    moved = np.log(found.at(np.array([flops]), found.drawn)[:, 0, 2] / loss)
    # One run scatters as runs about their parabola do, or as minima about their line.
    scatter = max(found.lines[2].rms_log_error, found.run_scatter)
    degrees = len(found.minima.used) - 2
    factor = scipy.stats.t.ppf(0.975, degrees) / 1.96 * np.sqrt((degrees + 2) / degrees)
    normal = scatter * factor * scipy.stats.norm.ppf((np.arange(199) + 0.5) / 199)
    return (
        size,
        int(tokens * n / size),
        loss,
        _combine_with_scatter(np.log(loss), moved, normal, 1.0),
    )
