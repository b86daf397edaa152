"""One law for all groups of runs, common exponents, or a law for each: which the runs tell apart.

With common exponents the scales of the terms and the floor are each group's own. The rise of the
objective from one of the three to the next, over the bootstrap's scale, is an F statistic; the
groups' own fits give the scale, and its degrees of freedom.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

from sae_jax.errors import UserError
from sae_jax.laws import fitting, holdout, identifiability, isoflop
from sae_jax.laws.estimators import Estimate, estimate
from sae_jax.laws.laws import Law, Slope
from sae_jax.laws.results import Results


def models(found: Sequence[fitting.Fit | isoflop.IsoflopFit]) -> list[dict]:
    """Compares one law, common exponents and a law for each group.

    Args:
      found: the fit of each group, all of one law.

    Returns:
      A dict for each of the three, as `groups.Groups.models` describes; none for isoflop, and for
      fewer than two groups.
    """
    if len(found) < 2 or isinstance(found[0], isoflop.IsoflopFit):
        return []
    law, estimator = found[0].law, found[0].estimator
    columns = {
        name: np.concatenate([one.results.columns[name] for one in found])
        for name in dict.fromkeys((*law.columns, *_budget_columns(found), "loss"))
    }
    group = np.repeat(np.arange(len(found)), [len(one.results) for one in found])
    columns |= {name: np.where(group == place, math.e, 1.0) for place, name in _marks(found)}
    common = _with_own_scales(law, found)
    thetas = [one.estimate.theta for one in found]

    one = estimate(law, columns, columns["loss"], estimator)
    shared = _fit_common(common, law, columns, estimator, [*thetas, one.theta], thetas)
    held = _held_out(found, law, common, columns, group, thetas, estimator)
    freedom = [max(each.drawn.runs - len(law.parameters), 1) for each in found]
    scale = np.average([each.drawn.scale for each in found], weights=freedom)
    size = len(columns["loss"])
    apart = math.sqrt(sum(len(e.results) * e.estimate.rms_log_error**2 for e in found) / size)
    models = [
        ("one law for all", len(law.parameters), one.objective, one.rms_log_error),
        ("common exponents", len(common.parameters), shared.objective, shared.rms_log_error),
        (
            "a law for each",
            len(found) * len(law.parameters),
            sum(each.estimate.objective for each in found),
            apart,
        ),
    ]
    out = []
    for (name, parameters, objective, rms), error in zip(models, held, strict=True):
        p = None
        if out:
            more = parameters - out[-1]["parameters"]
            gain = max(out[-1]["objective"] - objective, 0.0)
            f = 2 * gain / (scale * more) if scale > 0 else math.inf
            p = float(scipy.stats.f.sf(f, more, sum(freedom)))
        out.append(
            {
                "model": name,
                "parameters": parameters,
                "objective": float(objective),
                "rms_log_error": float(rms),
                "holdout": error,
                "p": p,
            }
        )
    return out


def _budget_columns(found: list[fitting.Fit]) -> list[str]:
    """Returns the columns that tell budgets and that all groups have."""
    names = ("d_sae", "tokens", "flops")
    return [name for name in names if all(name in one.results.columns for one in found)]


def _marks(found: list[fitting.Fit]) -> list[tuple[int, str]]:
    """Returns the number of each group but the first, and the column that marks it.

    The column is e in its rows and 1 elsewhere, so that its logarithm is the group's indicator.
    """
    return [(place, f"group {place}") for place in range(1, len(found))]


def _with_own_scales(law: Law, found: list[fitting.Fit]) -> Law:
    """Returns a law whose exponents all groups share, with a scale of each term for each group."""
    terms = tuple(
        dataclasses.replace(
            term,
            slopes=(*term.slopes, *(Slope(f"{term.scale} {n}", (n,)) for _, n in _marks(found))),
        )
        for term in law.terms
    )
    marks = tuple(name for _, name in _marks(found))
    return dataclasses.replace(law, columns=(*law.columns, *marks), terms=terms)


def _fit_common(
    common: Law, law: Law, columns, estimator: str, starts: list[np.ndarray], thetas
) -> Estimate:
    """Fits the law with common exponents, from each of the given parameters of the simple law.

    Args:
      common: the law with common exponents.
      law: the simple law.
      columns: the runs' columns, with the groups' marks.
      estimator: one of `estimators.ESTIMATORS`.
      starts: internal parameters of the simple law, whose exponents are starts.
      thetas: those of each group, whose scales are.
    """
    begun = []
    for start in starts:
        for own in (thetas, [start] * len(thetas)):
            parts = []
            for term in range(len(law.terms)):
                at = np.flatnonzero(law.term_of == term)
                first = own[0][at[0]]
                more = [np.clip(theta[at[0]] - first, -50, 50) for theta in own[1:]]
                parts += [first, *start[at[1:]], *more]
            begun.append(parts)
    return estimate(common, columns, columns["loss"], estimator, np.array(begun, float))


def _held_out(found, law, common, columns, group, thetas, estimator) -> list[float | None]:
    """Returns the rms relative errors of the three models on the largest budgets, fitted without
    them; None where a group has too few points left.
    """
    every = Results("all groups", columns, np.arange(len(group)), "loss")
    try:
        kept, held, _ = holdout.split(every, law.columns, None)
        for place in range(len(found)):
            left = kept[group[kept] == place]
            if not len(left):
                return [None] * 3
            identifiability.check(law, every.take(left))
    except UserError:
        return [None] * 3
    rest = {name: values[kept] for name, values in columns.items()}
    out = {name: values[held] for name, values in columns.items()}
    one = estimate(law, rest, rest["loss"], estimator)
    shared = _fit_common(common, law, rest, estimator, [*thetas, one.theta], thetas)
    apart = np.empty(len(held))
    for place in range(len(found)):
        mine, theirs = group[kept] == place, group[held] == place
        part = {name: values[mine] for name, values in rest.items()}
        alone = estimate(law, part, part["loss"], estimator)
        if theirs.any():
            apart[theirs] = alone.loss({name: values[theirs] for name, values in out.items()})
    return [
        float(np.sqrt(np.mean((expected / out["loss"] - 1) ** 2)))
        for expected in (one.loss(out), shared.loss(out), apart)
    ]
