"""The isoflop law: power laws in compute of the minima of isoFLOP curves.

It says n* = G_n C^a, D* = G_D C^b and L* = G_L C^c, each fitted to the logarithms of the budgets'
minima. The loss has no floor here, because a handful of minima does not identify one; `power` and
`chinchilla` fit it. Where there is a floor, L* beyond the budgets is too low.

Intervals are quantiles over resamples. Each resample draws the residuals of the runs from their
budgets' parabolas anew, scaled for the degrees of freedom, so that each budget keeps its sizes.
(Runs drawn with replacement seldom leave a parabola.) Where the minima scatter about their line by
more than that explains, the line's own Student interval is taken.
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
_QUANTITIES = ("d_sae", "tokens", "loss")
LINE = Law(
    "line",
    "y = scale C^exponent",
    ("flops",),
    (Term("scale", (Slope("exponent", ("flops",)),)),),
    levels={"flops": 2},
)


@dataclasses.dataclass(frozen=True)
class Minima:
    """The minima of isoFLOP curves.

    Attributes:
      curves: the isoFLOP curves of all budgets.
      used: the B curves that have a minimum within their sizes.
      flops: the budgets (B,) of the used curves.
      log: log n*, log D* and log L* (B, 3) of the used curves.
      how: how the curves were made, in words.
    """

    curves: list[Curve]
    used: list[Curve]
    flops: np.ndarray
    log: np.ndarray
    how: str

    @classmethod
    def from_results(cls, results: Results) -> "Minima":
        """Finds the minima of the runs' isoFLOP curves.

        Raises UserError where fewer than three budgets have a minimum within their sizes.
        """
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
        """Returns the minima of the chosen budgets."""
        return dataclasses.replace(
            self, used=self.used[rows], flops=self.flops[rows], log=self.log[rows]
        )

    def lines(self, estimator: str) -> list[Estimate]:
        """Fits the power laws in C of n*, D* and L*, by one of `estimators.ESTIMATORS`."""
        columns = {"flops": self.flops}
        return [estimate(LINE, columns, np.exp(y), estimator) for y in self.log.T]


@dataclasses.dataclass(frozen=True)
class IsoflopFit:
    """The isoflop law fitted to results.

    Attributes:
      results: the runs.
      estimator: one of `estimators.ESTIMATORS`.
      minima: the minima of their isoFLOP curves.
      lines: the power laws of n*, D* and L*.
      drawn: the log scale and exponent of each line in each resample (R, 3, 2), widened as the
        intervals are.
      holdout: the error at the largest budgets of the law fitted without them.
      alternatives: the lines by the other estimators.
      warnings: what to doubt about the fit, in words.
      degrees: the degrees of freedom of each line's intervals; None in a fit that was loaded.
    """

    results: Results
    estimator: str
    minima: Minima
    lines: list[Estimate]
    drawn: np.ndarray
    holdout: dict | None
    alternatives: dict[str, list[Estimate]]
    warnings: list[str]
    degrees: list[int] | None = None

    @property
    def name(self) -> str:
        """The name of the law."""
        return NAME

    @property
    def varying(self) -> dict[str, dict]:
        """The columns that vary among the fitted runs and that the law does not know."""
        return self.results.varying(COLUMNS)

    @property
    def run_scatter(self) -> float:
        """The standard deviation of a run's log-loss about its budget's parabola; 0 where parabolas
        go through all their runs.
        """
        pool = _run_residuals(self.minima.used)
        return 0.0 if pool is None else float(pool.std())

    @property
    def theta(self) -> np.ndarray:
        """The log scale and exponent (3, 2) of each line."""
        return np.array([line.theta for line in self.lines])

    def at(self, flops: np.ndarray, theta: np.ndarray | None = None) -> np.ndarray:
        """Returns n*, D* and L* at budgets.

        Args:
          flops: budgets (B,).
          theta: parameters (..., 3, 2); those of the fit by default.

        Returns:
          An array (..., B, 3).
        """
        theta = self.theta if theta is None else theta
        log_c = np.log(np.asarray(flops, float))[:, None]
        return np.exp(theta[..., None, :, 0] + theta[..., None, :, 1] * log_c)

    def summary(self) -> dict:
        """Returns the content of fit.json."""
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
            "rms_of": f"the {len(self.minima.used)} minima about L*",
            "n_points": len(self.results),
            "n_runs": int(self.results.run.max()) + 1,
            "holdout": self.holdout,
            "frontier": exponents(self.theta) | {"ci95": only_exponents(ci95)},
            "bootstrap": {
                "resamples": len(self.drawn),
                "sd": exponents(self.drawn.std(axis=0)),
            },
            "intervals": _INTERVALS,
            "budgets": [_budget_summary(curve) for curve in self.minima.curves],
            "how": self.minima.how,
            "alternatives": {
                name: {"params": _named(theta), "frontier": exponents(theta)}
                for name, lines in self.alternatives.items()
                for theta in [np.array([line.theta for line in lines])]
            },
            "results": self.results.source,
            "loss": self.results.loss_column,
            "varying": self.varying,
            "warnings": self.warnings,
        }


def fit(results: Results, options) -> IsoflopFit:
    """Fits the isoflop law to results, without the warnings, which `fit.fit` adds.

    Args:
      results: the runs.
      options: a `fit.Options`.

    Raises UserError as `Minima.from_results` does, and where too few budgets are left to fit.
    """
    minima = Minima.from_results(results)
    estimator = options.estimator or "log_least_squares"
    lines = minima.lines(estimator)
    drawn, degrees = _resample_lines(minima, lines, options)
    return IsoflopFit(
        results=results,
        estimator=estimator,
        minima=minima,
        lines=lines,
        drawn=drawn,
        holdout=_hold_out(minima, estimator, options.holdout),
        alternatives={other: minima.lines(other) for other in ESTIMATORS if other != estimator},
        warnings=[],
        degrees=degrees,
    )


def exponents(theta_3x2: np.ndarray) -> dict[str, float]:
    """Returns the exponents of lines with parameters (3, 2) by name."""
    return {f"{of}_exponent": float(v) for of, v in zip(_QUANTITIES, theta_3x2[:, 1], strict=True)}


def only_exponents(named: dict) -> dict:
    """Returns the entries of a dict whose names are those of exponents."""
    return {name: value for name, value in named.items() if name.endswith("_exponent")}


def _named(theta_3x2: np.ndarray) -> dict[str, float]:
    """Returns the scales and exponents of lines with parameters (3, 2) by name."""
    scales = {
        f"{of}_scale": float(np.exp(v)) for of, v in zip(_QUANTITIES, theta_3x2[:, 0], strict=True)
    }
    return scales | exponents(theta_3x2)


def _hold_out(minima: Minima, estimator: str, count: int | None) -> dict:
    """Measures the error of the smaller budgets' laws at the minima of the `count` largest."""
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


def _resample_lines(minima: Minima, lines: list[Estimate], options) -> tuple[np.ndarray, list[int]]:
    """Returns the parameters (R, 3, 2) of the lines in resamples, and each line's degrees of
    freedom: of the budgets about it, or of the runs about the parabolas where these explain it.
    """
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
    is_scattered = scatter > explained
    of_runs = sum(int(curve.near.sum()) - 3 for curve in minima.used)
    drawn = theta + np.where(is_scattered[:, None], by_scatter, by_runs)
    return drawn, np.where(is_scattered, degrees, max(of_runs, 1)).tolist()


def _moved_minima(minima: Minima, count: int, random) -> np.ndarray:
    """Returns how far (R, B, 3) the minima move when the runs' residuals are drawn anew; zero where
    there are no residuals.
    """
    pool = _run_residuals(minima.used)
    if pool is None:
        return np.zeros((count, *minima.log.shape))
    drawn = []
    for curve in minima.used:
        noise = random.choice(pool, (count, len(curve.log_n)))
        drawn.append(curve.minimum(curve.fitted(curve.log_n) + noise))
    moved = np.stack(drawn, axis=1) - minima.log
    return np.where(np.isfinite(moved).all(axis=(1, 2), keepdims=True), moved, 0.0)


def _run_residuals(curves: list[Curve]) -> np.ndarray | None:
    """Returns the log-losses of the runs near the minima about their parabolas, scaled for the
    degrees of freedom; None where parabolas go through all their runs.
    """
    points = sum(curve.near.sum() for curve in curves)
    if points <= 3 * len(curves):
        return None
    residuals = [(c.log_loss - c.fitted(c.log_n))[c.near] for c in curves]
    return np.concatenate(residuals) * widening(points, 3 * len(curves))


def _budget_summary(curve: Curve) -> dict:
    """Returns what fit.json says of one budget."""
    minimum = dict.fromkeys(_QUANTITIES)
    if curve.rejected is None:
        minimum = dict(zip(_QUANTITIES, np.exp(curve.minimum()).tolist(), strict=True))
    return {
        "flops": curve.flops,
        "sizes": len(distinct(np.exp(curve.log_n))),
        **minimum,
        "rejected": curve.rejected,
    }
