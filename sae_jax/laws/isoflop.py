"""The isoflop law: power laws in compute of the minima of isoFLOP curves.

n* = G_n C^a, D* = G_D C^b, L* = G_L C^c, each fitted to the logarithms of the budgets' minima.
The loss has no floor here: a handful of minima does not identify one, and `power` and
`chinchilla` are there to fit it. Where there is one, L* beyond the budgets is too low.

Intervals: every resample draws the residuals of the runs from their budgets' parabolas anew,
scaled for the degrees of freedom, so that each budget keeps its sizes (of a few runs drawn with
replacement seldom a parabola is left). Where the minima scatter about their line by more than
that explains, the line's own Student interval is taken.
"""

import dataclasses

import numpy as np

from sae_jax.errors import UserError
from sae_jax.laws.estimators import ESTIMATORS, Estimate, estimate
from sae_jax.laws.intervals import widening
from sae_jax.laws.isoflop_curves import BUDGETS, Curve, make_curves
from sae_jax.laws.laws import Law, Slope, Term
from sae_jax.laws.results import Results, distinct

NAME = "isoflop"
FORMULA = "n* = G_n C^a, D* = G_D C^b, L* = G_L C^c, of the minima of isoFLOP curves"
COLUMNS = ("d_sae", "tokens")
_INTERVALS = (
    "ci95: quantiles over resampled residuals of the runs about their parabolas, or the power "
    "law's own Student interval where its scatter is more than those explain"
)
_OF = ("d_sae", "tokens", "loss")
_LINE = Law(
    "line",
    "y = scale C^exponent",
    ("flops",),
    (Term("scale", (Slope("exponent", ("flops",)),)),),
    levels={"flops": 2},
)


@dataclasses.dataclass(frozen=True)
class Minima:
    """Of the `used` isoFLOP curves, those with a minimum within their sizes: `flops` (B,), and
    `log` (B, 3): log n*, log D*, log L*. `how`: where the curves came from."""

    curves: list[Curve]
    used: list[Curve]
    flops: np.ndarray
    log: np.ndarray
    how: str

    @classmethod
    def from_results(cls, results: Results) -> "Minima":
        """Raises UserError where fewer than three budgets have a minimum within their sizes."""
        curves, how = make_curves(results, results.compute)
        used = [curve for curve in curves if curve.rejected is None]
        if len(used) < BUDGETS:
            reasons = "; ".join(f"C = {c.flops:.3g}: {c.rejected}" for c in curves if c.rejected)
            raise UserError(
                f"{results.source}: {len(used)} of {len(curves)} budgets have a minimum within the "
                f"sizes that were run, and isoflop needs {BUDGETS} ({reasons})"
            )
        flops = np.array([curve.flops for curve in used])
        return cls(curves, used, flops, np.array([curve.minimum() for curve in used]), how)

    def take(self, rows: slice) -> "Minima":
        return dataclasses.replace(
            self, used=self.used[rows], flops=self.flops[rows], log=self.log[rows]
        )

    def lines(self, estimator: str) -> list[Estimate]:
        """The power laws in C of n*, D* and L*."""
        columns = {"flops": self.flops}
        return [estimate(_LINE, columns, np.exp(y), estimator) for y in self.log.T]


@dataclasses.dataclass(frozen=True)
class IsoflopFit:
    """`lines`: the power laws of n*, D* and L*; `drawn` (R, 3, 2): log scale and exponent of each
    in each resample, widened as the intervals are."""

    results: Results
    estimator: str
    minima: Minima
    lines: list[Estimate]
    drawn: np.ndarray
    holdout: dict | None
    alternatives: dict[str, list[Estimate]]
    warnings: list[str]

    @property
    def name(self) -> str:
        return NAME

    @property
    def run_scatter(self) -> float:
        """Standard deviation of a run's log loss about its budget's parabola; 0 where parabolas
        go through all their runs."""
        pool = _residuals(self.minima.used)
        return 0.0 if pool is None else float(pool.std())

    @property
    def theta(self) -> np.ndarray:
        """(3, 2): log scale and exponent of each line."""
        return np.array([line.theta for line in self.lines])

    def at(self, flops: np.ndarray, theta: np.ndarray | None = None) -> np.ndarray:
        """(..., budgets, 3): n*, D*, L* at budgets C, of the fit or of parameters
        (..., 3, 2)."""
        theta = self.theta if theta is None else theta
        log_c = np.log(np.asarray(flops, float))[:, None]
        return np.exp(theta[..., None, :, 0] + theta[..., None, :, 1] * log_c)

    def summary(self) -> dict:
        """The content of fit.json."""
        low, high = np.percentile(self.drawn, [2.5, 97.5], axis=0)
        params, lows, highs = _named(self.theta), _named(low), _named(high)
        ci95 = {name: [lows[name], highs[name]] for name in params}
        return {
            "law": NAME,
            "formula": FORMULA,
            "estimator": self.estimator,
            "params": params,
            "ci95": ci95,
            "objective": self.lines[2].objective,
            "rms_log_error": self.lines[2].rms_log_error,
            "n_points": len(self.results),
            "n_runs": int(self.results.run.max()) + 1,
            "holdout": self.holdout,
            "frontier": exponents(self.theta) | {"ci95": exponents_of(ci95)},
            "bootstrap": {
                "resamples": len(self.drawn),
                "sd": exponents(self.drawn.std(axis=0)),
            },
            "intervals": _INTERVALS,
            "budgets": [_budget(curve) for curve in self.minima.curves],
            "how": self.minima.how,
            "alternatives": {
                name: {"params": _named(theta), "frontier": exponents(theta)}
                for name, lines in self.alternatives.items()
                for theta in [np.array([line.theta for line in lines])]
            },
            "results": self.results.source,
            "loss": self.results.loss_column,
            "warnings": self.warnings,
        }


def fit(results: Results, options) -> IsoflopFit:
    """Without warnings, which `fit.fit` adds. Raises UserError as `Minima.of`."""
    minima = Minima.from_results(results)
    estimator = options.estimator or "log_least_squares"
    lines = minima.lines(estimator)
    return IsoflopFit(
        results=results,
        estimator=estimator,
        minima=minima,
        lines=lines,
        drawn=_draw(minima, lines, options),
        holdout=_hold_out(minima, estimator, options.holdout),
        alternatives={other: minima.lines(other) for other in ESTIMATORS if other != estimator},
        warnings=[],
    )


def exponents(theta_3x2: np.ndarray) -> dict[str, float]:
    return {f"{of}_exponent": float(v) for of, v in zip(_OF, theta_3x2[:, 1], strict=True)}


def exponents_of(named: dict) -> dict:
    return {name: value for name, value in named.items() if name.endswith("_exponent")}


def _named(theta_3x2: np.ndarray) -> dict[str, float]:
    scales = {f"{of}_scale": float(np.exp(v)) for of, v in zip(_OF, theta_3x2[:, 0], strict=True)}
    return scales | exponents(theta_3x2)


def _hold_out(minima: Minima, estimator: str, count: int | None) -> dict:
    """The error of the laws of the smaller budgets at the minima of the `count` largest."""
    count, total = count or 1, len(minima.used)
    if total - count < 2:
        raise UserError(
            f"--holdout={count}: of {total} budgets with a minimum at least 2 must be left"
        )
    kept, held = minima.take(slice(None, -count)), minima.take(slice(-count, None))
    theta = np.array([line.theta for line in kept.lines(estimator)])
    expected = theta[:, 0] + theta[:, 1] * np.log(held.flops)[:, None]
    errors = np.sqrt(np.mean((np.exp(expected - held.log) - 1) ** 2, axis=0))
    span = " and ".join(f"{flops:.3g}" for flops in held.flops)
    return {
        "what": f"the minima of the {count} largest of {total} budgets, at {span} FLOPs",
        "rms_relative_error": float(errors[2]),
        "d_sae_rms_relative_error": float(errors[0]),
        "tokens_rms_relative_error": float(errors[1]),
        "n_points": count,
        "flops": held.flops.tolist(),
    }


def _draw(minima: Minima, lines: list[Estimate], options) -> np.ndarray:
    """(R, 3, 2) parameters in resamples."""
    random = np.random.default_rng(options.seed)
    theta = np.array([line.theta for line in lines])
    log_c = np.log(minima.flops)
    to_line_2xB = np.linalg.pinv(np.stack([np.ones(len(log_c)), log_c], axis=1))
    fitted = theta[:, 0] + theta[:, 1] * log_c[:, None]
    degrees = len(log_c) - 2
    scatter = np.sqrt(((minima.log - fitted) ** 2).sum(axis=0) / degrees)

    moved_RxBx3 = _moved_minima(minima, options.resamples, random)
    by_runs = np.einsum("rbi,pb->rip", moved_RxBx3, to_line_2xB)
    left = moved_RxBx3 - (by_runs[:, None, :, 0] + by_runs[:, None, :, 1] * log_c[:, None])
    explained = np.percentile(np.sqrt((left**2).sum(axis=1) / degrees), 95, axis=0)

    student = np.sqrt(random.chisquare(degrees, (options.resamples, 1, 1)) / degrees)
    normal = random.standard_normal((options.resamples, len(log_c), 3)) * scatter / student
    by_scatter = np.einsum("rbi,pb->rip", normal, to_line_2xB)
    return theta + np.where((scatter > explained)[:, None], by_scatter, by_runs)


def _moved_minima(minima: Minima, count: int, random) -> np.ndarray:
    """(R, B, 3): how far the minima move when the runs' residuals are drawn anew. Zero where
    parabolas go through all their runs, so that there are no residuals."""
    pool = _residuals(minima.used)
    if pool is None:
        return np.zeros((count, *minima.log.shape))
    drawn = []
    for curve in minima.used:
        noise = random.choice(pool, (count, len(curve.log_n)))
        drawn.append(curve.minimum(curve.fitted(curve.log_n) + noise))
    moved = np.stack(drawn, axis=1) - minima.log
    return np.where(np.isfinite(moved).all(axis=(1, 2), keepdims=True), moved, 0.0)


def _residuals(curves: list[Curve]) -> np.ndarray | None:
    """Log losses of the runs near the minima about their parabolas, scaled for the degrees of
    freedom; None where there are none."""
    points = sum(curve.near.sum() for curve in curves)
    if points <= 3 * len(curves):
        return None
    residuals = [(c.log_loss - c.fitted(c.log_n))[c.near] for c in curves]
    return np.concatenate(residuals) * widening(points, 3 * len(curves))


def _budget(curve: Curve) -> dict:
    minimum = dict.fromkeys(_OF)
    if curve.rejected is None:
        minimum = dict(zip(_OF, np.exp(curve.minimum()).tolist(), strict=True))
    return {
        "flops": curve.flops,
        "sizes": len(distinct(np.exp(curve.log_n))),
        **minimum,
        "rejected": curve.rejected,
    }
