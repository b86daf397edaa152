"""Saves a fit with its runs and draws, and loads it, so that nothing has to be fitted again.

OUT/state.json    the runs, the options, the parameters and the bootstrap draws
"""

import dataclasses

import numpy as np

from sae_jax import paths
from sae_jax.errors import UserError, choose
from sae_jax.json_files import checked, read_json
from sae_jax.laws import fitting, isoflop
from sae_jax.laws.estimators import ESTIMATORS, Estimate, Problem
from sae_jax.laws.intervals import Bootstrap
from sae_jax.laws.laws import LAWS, Law
from sae_jax.laws.results import ACCOUNTINGS, Results

FILE = "state.json"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class _Runs:
    """The runs, as `Results` has them."""

    source: str
    columns: dict[str, list[float]]
    run: list[int]
    loss_column: str
    notes: list[str]
    cells: dict[str, list[str | float | None]]
    places: list[str]
    names: dict[str, str]
    flops_factor: float | None


@dataclasses.dataclass(frozen=True)
class _Estimate:
    """One estimator's parameters."""

    theta: list[float]
    objective: float
    rms_log_error: float


@dataclasses.dataclass(frozen=True)
class _State:
    """The content of state.json.

    A formula's `estimates` have one entry by estimator; those of isoflop three, the lines of n*, D*
    and L*. `drawn` has the parameters of every draw on end, and those of isoflop line by line.
    """

    version: int
    law: str
    accounting: str
    options: fitting.Options
    runs: _Runs
    estimator: str
    estimates: dict[str, list[_Estimate]]
    drawn: list[float]
    scale: float
    ci95: dict[str, tuple[float, float]]
    holdout: dict | None
    held: list[int]
    warnings: list[str]


def save(runs: Results, accounting: str, options: fitting.Options, found, out) -> None:
    """Writes a fit to OUT/state.json.

    Args:
      runs: the runs that were given, with compute as they were read.
      accounting: how compute is counted.
      options: how the law was fitted.
      found: a Fit or an IsoflopFit.
      out: the directory.
    """
    if isinstance(found, isoflop.IsoflopFit):
        own, others, drawn = found.lines, found.alternatives, found.drawn
        scale, ci95, held = 1.0, {}, []
    else:
        own, drawn = [found.estimate], found.drawn.theta
        others = {name: [estimate] for name, estimate in found.alternatives.items()}
        scale, ci95, held = found.drawn.scale, found.ci95, found.held.tolist()
    estimates = {found.estimator: own} | others
    values = {
        "version": _VERSION,
        "law": found.name,
        "accounting": accounting,
        "options": dataclasses.asdict(options),
        "runs": _runs_to_json(runs),
        "estimator": found.estimator,
        "estimates": {
            name: [
                {"theta": e.theta.tolist(), "objective": e.objective}
                | {"rms_log_error": e.rms_log_error}
                for e in several
            ]
            for name, several in estimates.items()
        },
        "drawn": drawn.ravel().tolist(),
        "scale": scale,
        "ci95": ci95,
        "holdout": found.holdout,
        "held": held,
        "warnings": found.warnings,
    }
    paths.write(paths.path(out) / FILE, paths.as_json(values, indent=None))


def load(out: paths.AnyPath):
    """Reads the fit in a directory.

    Returns:
      The runs, the accounting, the options and the fit, as `save` was given them.

    Raises UserError where there is none, or where it is damaged.
    """
    file = out / FILE
    if not file.is_file():
        raise UserError(f"{out} has no {FILE}; give what fit.save or sae-jax fit wrote")
    state = checked(read_json(file), _State, file)
    if state.version != _VERSION:
        raise UserError(f"{file} is of version {state.version}; this program reads {_VERSION}")
    try:
        runs = _runs_from_json(state.runs)
        if {state.estimator, *state.estimates} != set(ESTIMATORS):
            raise ValueError("its estimators are not those of this program")
        choose(state.accounting, ACCOUNTINGS, "the accounting")
        make = _isoflop if state.law == isoflop.NAME else _formula
        found = make(state, runs.with_accounting(state.accounting))
    except (ValueError, KeyError, IndexError, np.linalg.LinAlgError, UserError) as error:
        raise UserError(f"{file} is damaged ({error}); fit again") from None
    return runs, state.accounting, state.options, found


def _formula(state: _State, results: Results) -> fitting.Fit:
    """Returns the fit of a law that is a formula."""
    law = LAWS[state.law]
    if law.name == "power":
        results, _ = fitting.envelope(results)
    estimates = {}
    for name, (one,) in state.estimates.items():
        estimates[name] = _estimate(one, law, name, results.columns, results.loss)
    best = estimates.pop(state.estimator)
    drawn = np.array(state.drawn, float).reshape(-1, len(law.parameters))
    k, frontier, _ = fitting.frontier_of(results, law, best.theta)
    held = np.array(state.held, int)
    if set(state.ci95) != set(law.parameters) or (held >= len(results)).any():
        raise ValueError("its parts do not go together")
    return fitting.Fit(
        results=results,
        estimate=best,
        drawn=Bootstrap(drawn, state.scale, int(results.run.max()) + 1),
        ci95=state.ci95,
        holdout=state.holdout,
        held=held,
        frontier=frontier,
        k=k,
        alternatives=estimates,
        warnings=state.warnings,
    )


def _isoflop(state: _State, results: Results) -> isoflop.IsoflopFit:
    """Returns the fit of the isoflop law."""
    minima = isoflop.Minima.from_results(results)
    columns = {"flops": minima.flops}
    estimates = {
        name: [
            _estimate(one, isoflop.LINE, name, columns, np.exp(y))
            for one, y in zip(lines, minima.log.T, strict=True)
        ]
        for name, lines in state.estimates.items()
    }
    return isoflop.IsoflopFit(
        results=results,
        estimator=state.estimator,
        minima=minima,
        lines=estimates.pop(state.estimator),
        drawn=np.array(state.drawn, float).reshape(-1, 3, 2),
        holdout=state.holdout,
        alternatives=estimates,
        warnings=state.warnings,
    )


def _estimate(saved: _Estimate, law: Law, name: str, columns, loss: np.ndarray) -> Estimate:
    theta = np.array(saved.theta)
    if theta.shape != (len(law.parameters),):
        raise ValueError(f"{law.name} has {len(law.parameters)} parameters, not {len(theta)}")
    problem = Problem.from_law(law, columns, loss)
    return Estimate(law, name, theta, saved.objective, saved.rms_log_error, problem)


def _runs_to_json(runs: Results) -> dict:
    columns, cells = (
        {name: values.tolist() for name, values in every.items()}
        for every in (runs.columns, runs.cells)
    )
    values = {field.name: getattr(runs, field.name) for field in dataclasses.fields(_Runs)}
    arrays = {"run": runs.run.tolist(), "places": runs.places.tolist()}
    return values | arrays | {"columns": columns, "cells": cells}


def _runs_from_json(saved: _Runs) -> Results:
    count = len(saved.run)
    every = [*saved.columns.values(), *saved.cells.values()]
    if not count or any(len(values) != count for values in every) or min(saved.run) < 0:
        raise ValueError("its columns do not go together")
    cells = {name: np.array(values, object) for name, values in saved.cells.items()}
    return Results(
        saved.source,
        {name: np.array(values, float) for name, values in saved.columns.items()},
        np.array(saved.run),
        saved.loss_column,
        tuple(saved.notes),
        cells,
        np.array(saved.places, object),
        saved.names,
        saved.flops_factor,
    )
