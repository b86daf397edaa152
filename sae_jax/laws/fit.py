"""Fitting one law to results: parameters, intervals, hold-out, frontier, and what to doubt."""

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
    """How to fit. `estimator` None: the law's own; `holdout` None: the largest budgets that hold a
    tenth of the points."""

    estimator: str | None = None
    holdout: int | None = None
    resamples: int = RESAMPLES
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law fitted to all points of `results`. `holdout` is its error on the points `held` (rows)
    when fitted without them, None where too little would be left; `frontier` is None where the
    law has none or the rows do not say what n D costs; `k` is where `joint`'s frontier lies."""

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
        """(..., budgets): the least loss at budgets C, of the fit or of parameters (..., P)."""
        theta = self.estimate.theta if theta is None else theta
        if self.law.name == "power":
            return np.exp(self.law.log_loss(theta, {"flops": flops}))
        return Frontier.from_law(self.law, theta, self.frontier.cost, self.k).at(flops)["loss"]

    @property
    def law(self) -> Law:
        return self.estimate.law

    @property
    def name(self) -> str:
        return self.law.name

    @property
    def factor(self) -> float:
        """By how much a bootstrap's deviations are widened."""
        return widening(self.drawn.runs, len(self.estimate.theta))

    def spread(self, values: np.ndarray, at: np.ndarray) -> np.ndarray:
        """95% interval (2, ...) of something from its bootstrap values (R, ...)."""
        return spread(values, at, self.factor)

    def frontiers(self) -> Frontier:
        """Of every draw that has one."""
        every = Frontier.from_law(self.law, self.drawn.theta, self.frontier.cost, self.k)
        return every.take(every.exists)

    def exponents(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """The frontier's exponents for internal parameters (P,) or (S, P), as far as the law has
        them; of draws, only of those that have a frontier."""
        if self.law.name == "power":
            return {"loss_exponent": -theta[..., self.law.parameters.index("alpha")]}
        if self.frontier is None:
            return {}
        frontier = Frontier.from_law(self.law, theta, self.frontier.cost, self.k)
        return (frontier.take(frontier.exists) if theta.ndim > 1 else frontier).exponents

    def summary(self) -> dict:
        """The content of fit.json."""
        law, estimate = self.law, self.estimate
        sd = law.public(self.drawn.theta).std(axis=0)
        return {
            "law": law.name,
            "formula": law.formula,
            "estimator": estimate.estimator,
            "params": estimate.params,
            "ci95": self.ci95,
            "objective": estimate.objective,
            "rms_log_error": estimate.rms_log_error,
            "n_points": len(self.results),
            "n_runs": self.drawn.runs,
            "holdout": self.holdout,
            "frontier": self._frontier_summary(),
            "bootstrap": {
                "resamples": len(self.drawn.theta),
                "sd": law.named(sd)
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
            "warnings": self.warnings,
        }

    def _named_exponents(self, estimate: Estimate) -> dict[str, float | None]:
        there = self.exponents(estimate.theta)
        return {name: float(there[name]) if name in there else None for name in EXPONENTS}

    def _frontier_summary(self) -> dict:
        out = self._named_exponents(self.estimate)
        drawn = self.exponents(self.drawn.theta)
        out["ci95"] = {name: self.spread(v, out[name]).tolist() for name, v in drawn.items()}
        if self.frontier is not None:
            out["flops_per_token"] = dataclasses.asdict(self.frontier.cost)
        if self.k is not None:
            out["k"] = self.k
        return out


def fit(results: Results, name: str, options: Options) -> "Fit | isoflop.IsoflopFit":
    """Fits one of `LAW_NAMES`. Raises UserError where the results cannot identify it."""
    if name == isoflop.NAME:
        found = isoflop.fit(results, options)
        return dataclasses.replace(found, warnings=cautions.isoflop_warnings(found))
    law, among = LAWS[name], None
    if name == "power":
        results, among = envelope(results)
    identifiability.check(law, results, among)
    estimator = options.estimator or law.estimator
    best = estimate(law, results.columns, results.loss, estimator)
    drawn = bootstrap(best, results.run, options.resamples, options.seed)
    held, error = hold_out(results, law, estimator, options.holdout)
    k = None
    if law.name == "joint":
        k = float(np.exp(np.median(np.log(results.columns["k"]))))
    cost = (
        Cost.from_columns(results.columns)
        if {"d_sae", "tokens", "flops"} <= set(results.columns)
        else None
    )
    frontier = None
    if law.name in ("chinchilla", "joint"):
        frontier = Frontier.from_law(law, best.theta, cost or Cost(1.0), k)
        frontier = frontier if frontier.exists else None
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
        found, warnings=[*([among] if among else []), *cautions.warnings(found, cost)]
    )


def by_accountings(results: Results, found, accounting: str, options: Options) -> dict[str, dict]:
    """The frontier by each accounting of compute that the results have; `found`: the fit by
    `accounting`."""
    frontiers = {accounting: found.summary()["frontier"]}
    for other in set(ACCOUNTINGS) - {accounting}:
        if other in results.columns:
            try:
                again = fit(results.by_accounting(other), found.name, options)
                frontiers[other] = again.summary()["frontier"]
            except UserError as error:
                frontiers[other] = {"refused": str(error)}
    return frontiers


def envelope(results: Results) -> tuple[Results, str | None]:
    """The runs on the compute frontier, those with less loss than every cheaper run, and how they
    were chosen. All runs where there is one path to begin with: no column d_sae, or sizes that
    never fall as compute grows, one to a budget."""
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
    return isoflop.COLUMNS if name == isoflop.NAME else LAWS[name].columns


def hold_out(results: Results, law: Law, estimator: str, count: int | None):
    """(held-out rows, the law's error there when fitted to the others, None if they do not
    identify it). With a `count` of the user's that is an error."""
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
