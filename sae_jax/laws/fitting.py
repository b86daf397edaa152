"""Fits one law to results: parameters, intervals, held-out error, frontier, and warnings."""

import dataclasses

import numpy as np

from sae_jax.errors import UserError
from sae_jax.laws import holdout, identifiability, isoflop
from sae_jax.laws import warnings as cautions
from sae_jax.laws.estimators import ESTIMATORS, Estimate, estimate
from sae_jax.laws.frontier import Cost, Frontier
from sae_jax.laws.intervals import Bootstrap, bootstrap, public_intervals, spread, widening
from sae_jax.laws.laws import LAWS, Law
from sae_jax.laws.results import ACCOUNTINGS, Results

RESAMPLES = 400
LAW_NAMES = (*LAWS, isoflop.NAME)
EXPONENTS = ("d_sae_exponent", "tokens_exponent", "loss_exponent")
_INTERVALS = (
    "ci95: profile intervals of the objective, its scale by the bootstrap over runs; of the "
    "frontier: quantiles of that bootstrap, widened by Student's t for the degrees of freedom"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a fit.

    Attributes:
      estimator: one of `estimators.ESTIMATORS`; None takes the law's own.
      holdout: how many of the largest budgets are held out; None takes the fewest that hold a tenth
        of the points.
      resamples: the number of bootstrap draws.
      seed: the seed of the draws.
    """

    estimator: str | None = None
    holdout: int | None = None
    resamples: int = RESAMPLES
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law fitted to all points of some results.

    Attributes:
      results: the runs that the law is fitted to.
      estimate: the parameters.
      drawn: the parameters of every bootstrap draw.
      ci95: the 95% interval of each parameter, as users see it.
      holdout: the error on the points held out when the law is fitted without them; None where too
        few points would be left.
      held: the rows (H,) of the points held out.
      frontier: the compute-optimal frontier; None where the law has none, or where the rows do not
        say what n latents and D tokens cost.
      k: the k at which the joint law's frontier is taken; None for other laws.
      alternatives: the parameters by the other estimators.
      warnings: what to doubt about the fit, in words.
    """

    results: Results
    estimate: Estimate
    drawn: Bootstrap
    ci95: dict[str, tuple[float, float]]
    holdout: dict | None
    held: np.ndarray
    frontier: Frontier | None
    k: float | None
    alternatives: dict[str, Estimate]
    warnings: list[str]

    def at(self, flops: np.ndarray, theta: np.ndarray | None = None) -> np.ndarray:
        """Returns the least loss that budgets can buy.

        Args:
          flops: budgets (B,).
          theta: internal parameters (..., P); those of the fit by default.

        Returns:
          Losses (..., B).
        """
        theta = self.estimate.theta if theta is None else theta
        if self.law.name == "power":
            return np.exp(self.law.log_loss(theta, {"flops": flops}))
        return Frontier.from_law(self.law, theta, self.frontier.cost, self.k).at(flops)["loss"]

    @property
    def law(self) -> Law:
        """The law that was fitted."""
        return self.estimate.law

    @property
    def name(self) -> str:
        """The name of the law."""
        return self.law.name

    @property
    def estimator(self) -> str:
        """The estimator, one of `estimators.ESTIMATORS`."""
        return self.estimate.estimator

    @property
    def varying(self) -> dict[str, dict]:
        """The columns that vary among the fitted runs and that the law does not know."""
        return self.results.varying(self.law.columns)

    @property
    def factor(self) -> float:
        """The factor by which deviations of the bootstrap are widened (`intervals.widening`)."""
        return widening(self.drawn.runs, len(self.estimate.theta))

    def at_k(self, k: float) -> "Fit":
        """Returns the fit of the joint law with its frontier at another k."""
        _, frontier, _ = frontier_of(self.results, self.law, self.estimate.theta, k)
        return dataclasses.replace(self, k=k, frontier=frontier)

    def spread(self, values: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Returns the 95% interval (2, ...) of a quantity whose fitted value is `at` and whose
        bootstrap values are `values` (R, ...).
        """
        return spread(values, at, self.factor)

    def frontiers(self) -> Frontier:
        """Returns the frontiers of all bootstrap draws that have one."""
        every = Frontier.from_law(self.law, self.drawn.theta, self.frontier.cost, self.k)
        return every.take(every.exists)

    def exponents(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the exponents of the frontier by name, as far as the law has them.

        Args:
          theta: internal parameters (P,), or (S, P) of draws. Draws without a frontier are left
            out.
        """
        if self.law.name == "power":
            return {"loss_exponent": -theta[..., self.law.parameters.index("alpha")]}
        if self.frontier is None:
            return {}
        frontier = Frontier.from_law(self.law, theta, self.frontier.cost, self.k)
        return (frontier.take(frontier.exists) if theta.ndim > 1 else frontier).exponents

    def summary(self) -> dict:
        """Returns the content of fit.json."""
        law, estimate = self.law, self.estimate
        with np.errstate(over="ignore", invalid="ignore"):  # of scales near the largest number
            sd = law.public(self.drawn.theta).std(axis=0)
        return {
            "law": law.name,
            "formula": law.formula,
            "estimator": estimate.estimator,
            "params": estimate.params,
            "ci95": self.ci95,
            "objective": estimate.objective,
            "rms_log_error": estimate.rms_log_error,
            "rms_of": "the points",
            "n_points": len(self.results),
            "n_runs": self.drawn.runs,
            "holdout": self.holdout,
            "frontier": self._frontier_summary(),
            "bootstrap": {
                "resamples": len(self.drawn.theta),
                "sd": {n: v if np.isfinite(v) else None for n, v in law.named(sd).items()}
                | {n: float(v.std()) for n, v in self.exponents(self.drawn.theta).items()},
            },
            "intervals": _INTERVALS,
            "alternatives": {
                name: {
                    "params": other.params,
                    "rms_log_error": other.rms_log_error,
                    "frontier": self._named_exponents(other),
                }
                for name, other in self.alternatives.items()
            },
            "results": self.results.source,
            "loss": self.results.loss_column,
            "varying": self.varying,
            "warnings": self.warnings,
        }

    def _named_exponents(self, estimate: Estimate) -> dict[str, float | None]:
        """Returns every exponent by name; None where the law does not have it."""
        there = self.exponents(estimate.theta)
        return {name: float(there[name]) if name in there else None for name in EXPONENTS}

    def _frontier_summary(self) -> dict:
        """Returns what fit.json says of the frontier."""
        out = self._named_exponents(self.estimate)
        drawn = self.exponents(self.drawn.theta)
        out["ci95"] = {name: self.spread(v, out[name]).tolist() for name, v in drawn.items()}
        if self.frontier is not None:
            out["flops_per_token"] = dataclasses.asdict(self.frontier.cost)
        if self.k is not None:
            out["k"] = self.k
        return out


def fit(results: Results, name: str, options: Options) -> "Fit | isoflop.IsoflopFit":
    """Fits a law to results.

    Args:
      results: the runs.
      name: one of `LAW_NAMES`.
      options: how to fit.

    Returns:
      A Fit, or an IsoflopFit for the law "isoflop".

    Raises UserError where the results lack a column of the law, or cannot identify it.
    """
    results.require(needed_columns(name))
    if name == isoflop.NAME:
        found = isoflop.fit(results, options)
        return dataclasses.replace(found, warnings=cautions.isoflop_warnings(found))
    law, selection = LAWS[name], None
    if name == "power":
        results, selection = envelope(results)
    identifiability.check(law, results, selection)
    estimator = options.estimator or law.estimator
    best = estimate(law, results.columns, results.loss, estimator)
    drawn = bootstrap(best, results.run, options.resamples, options.seed)
    held, error = hold_out(results, law, estimator, options.holdout)
    k, frontier, cost = frontier_of(results, law, best.theta)
    found = Fit(
        results=results,
        estimate=best,
        drawn=drawn,
        ci95=public_intervals(best, drawn),
        holdout=error,
        held=held,
        frontier=frontier,
        k=k,
        alternatives={
            other: estimate(law, results.columns, results.loss, other)
            for other in ESTIMATORS
            if other != estimator
        },
        warnings=[],
    )
    return dataclasses.replace(
        found, warnings=[*([selection] if selection else []), *cautions.warnings(found, cost)]
    )


def frontier_of(results: Results, law: Law, theta: np.ndarray, k: float | None = None):
    """Returns what a fitted law has for a frontier.

    Args:
      results: the runs.
      law: the law.
      theta: its internal parameters (P,).
      k: at which the joint law's frontier is taken; by default the middle one of the runs.

    Returns:
      That k, the frontier, and the cost of the runs. Each is None where there is none. Runs whose
      compute has no such cost have no frontier; those without compute are counted as d_sae x
      tokens.
    """
    cost = None
    if {"d_sae", "tokens", "flops"} <= set(results.columns):
        cost = Cost.from_columns(results.columns)
    if law.name not in ("chinchilla", "joint"):
        return None, None, cost
    if law.name == "joint" and k is None:
        k = float(np.exp(np.median(np.log(results.columns["k"]))))
    if cost is None and "flops" in results.columns:  # `cost_is_unknown`
        return k, None, None
    frontier = Frontier.from_law(law, theta, cost or Cost(1.0), k)
    return k, frontier if frontier.exists else None, cost


def cost_is_unknown(results: Results) -> bool:
    """Whether the runs' compute does not say what another run costs."""
    known = {"d_sae", "tokens", "flops"} <= set(results.columns)
    return known and Cost.from_columns(results.columns) is None


def frontiers_by_accounting(
    results: Results, found, accounting: str, options: Options
) -> dict[str, dict]:
    """Returns the frontier by each accounting of compute that the results have.

    Args:
      results: the runs, with compute as they were read.
      found: the fit by `accounting`, which is not fitted again.
      accounting: one of `results.ACCOUNTINGS`.
      options: how to fit by the other accountings.

    Returns:
      The frontier's part of fit.json by accounting; {"refused": reason} where a fit is refused.
    """
    frontiers = {accounting: found.summary()["frontier"]}
    for other in set(ACCOUNTINGS) - {accounting}:
        if other in results.columns:
            try:
                again = fit(results.with_accounting(other), found.name, options)
                frontiers[other] = again.summary()["frontier"]
            except UserError as error:
                frontiers[other] = {"refused": str(error)}
    return frontiers


def envelope(results: Results) -> tuple[Results, str | None]:
    """Returns the runs on the compute frontier: those with less loss than every cheaper run.

    All runs are returned where they form one path to begin with. That is so where there is no
    column d_sae, or where there is one run to a budget and sizes never fall as compute grows.

    Returns:
      The runs, and a sentence that says how they were chosen; None where all are.
    """
    order = np.argsort(results.columns["flops"], kind="stable")
    size = results.columns.get("d_sae")
    group = holdout.groups(results.columns["flops"])[order]
    if size is None or (np.diff(size[order]) >= 0).all() and len(set(group)) == len(group):
        return results, None
    loss = results.loss[order]
    best = np.array([loss[group == g].min() for g in range(group[-1] + 1)])
    before = np.concatenate([[np.inf], np.minimum.accumulate(best)[:-1]])
    chosen = order[(loss == best[group]) & (best < before)[group]]
    return results.take(chosen), (
        f"{len(chosen)} of {len(results)} runs are on the compute frontier (less loss than every "
        "cheaper run) and are fitted; with noise such runs are the lucky ones"
    )


def needed_columns(name: str) -> tuple[str, ...]:
    """Returns the columns of results that a law needs, besides the loss."""
    return isoflop.COLUMNS if name == isoflop.NAME else LAWS[name].columns


def hold_out(results: Results, law: Law, estimator: str, count: int | None):
    """Fits a law without the largest budgets, and measures its error there.

    Args:
      results: the runs.
      law: the law.
      estimator: one of `estimators.ESTIMATORS`.
      count: how many budgets are held out, as the user says; None takes the fewest that hold a
        tenth of the points.

    Returns:
      The held-out rows (H,), and the error as fit.json shows it. Where the other rows do not
      identify the law, no row is held out and the error is None.

    Raises UserError where the rest does not identify the law and `count` is given.
    """
    if count is None and len(results) <= len(law.parameters) + 1:
        return np.array([], int), None
    kept, held, what = holdout.split(results, law.columns, count)
    rest = results.take(kept)
    try:
        identifiability.check(law, rest)
    except UserError as error:
        if count is not None:
            raise UserError(f"--holdout={count} leaves too little: {error}") from error
        return np.array([], int), None
    without = estimate(law, rest.columns, rest.loss, estimator)
    out = results.take(held)
    relative = without.loss(out.columns) / out.loss - 1
    return held, {
        "what": what,
        "rms_relative_error": float(np.sqrt(np.mean(relative**2))),
        "mean_relative_error": float(relative.mean()),
        "n_points": len(held),
        "params": without.params,
    }
