"""Says what to doubt about a fit, in words."""

import numpy as np

from sae_jax.laws import agreement, settings
from sae_jax.laws.intervals import FAR

_WIDE = 10.0  # ratio of the ends of a scale's interval
_SAME_EXPONENT = 0.01  # exponents of two estimators, however narrow the interval
_FAR_APART = 0.05  # exponents of two estimators, however wide the interval
_SAME_LOSS = 0.01  # relative
_DEAD = 0.5  # fraction of dead latents above which a run's size is not its dictionary's
_NO_COST = (
    "the results do not say what a token costs (no column flops, nor d_in; or --flops_factor); "
    "compute is counted as d_sae x tokens"
)
_NO_COMMON_COST = (
    "the column flops is no affine function of d_sae for a token, so it does not say what another "
    "run costs, and there is no compute-optimal run; --select runs that cost alike, or --by=d_in"
)


def warnings(fit, cost) -> list[str]:
    """Returns the warnings of a Fit.

    Args:
      fit: the fit.
      cost: the cost of its runs; None where the results do not tell it.
    """
    out = list(fit.results.notes)
    out += settings.warnings(fit.name, fit.varying)
    out += _at_bound(fit)
    out += _weakly_identified(fit)
    out += _disagreeing_estimators(fit)
    out += dead_latents(fit.results)
    if fit.holdout is None:
        out.append(
            "nothing is held out: without the largest budgets too few points would be left to "
            "fit this law, so that its extrapolation is untested"
        )
    elif fit.holdout["rms_relative_error"] > max(_SAME_LOSS, 3 * fit.estimate.rms_log_error):
        out.append(
            f"the law misses the points held out ({fit.holdout['what']}) by "
            f"{fit.holdout['rms_relative_error']:.1%} (rms), those it is fitted to by only "
            f"{fit.estimate.rms_log_error:.1%}: do not trust it beyond these runs"
        )
    if fit.law.name in ("chinchilla", "joint"):
        if cost is None and "flops" in fit.results.columns:
            out.append(_NO_COMMON_COST)
        elif fit.frontier is None:
            out.append(
                "the fitted loss does not fall in both d_sae and tokens, so there is no "
                "compute-optimal frontier"
            )
        elif cost is None:
            out.append(_NO_COST)
    if fit.law.name == "chinchilla":
        a = fit.exponents(fit.drawn.theta).get("d_sae_exponent")
        out += agreement.compare_with_isoflop(
            fit.results, fit.estimate, 0.0 if a is None else 2 * a.std()
        )
    return out


def isoflop_warnings(fit) -> list[str]:
    """Returns the warnings of an IsoflopFit."""
    minima = fit.minima
    out = list(fit.results.notes)
    out += settings.warnings(fit.name, fit.varying)
    reasons = dict.fromkeys(curve.rejected for curve in minima.curves if curve.rejected)
    for reason in reasons:
        budgets = [f"{curve.flops:.3g}" for curve in minima.curves if curve.rejected == reason]
        out.append(
            f"{len(budgets)} of {len(minima.curves)} budgets left out: {reason} "
            f"(C = {', '.join(budgets)})"
        )
    if "interpolated" in minima.how:
        out.append(minima.how)
    if "flops" not in fit.results.columns:
        out.append(_NO_COST)
    out += dead_latents(fit.results)
    lines = {fit.estimator: fit.lines} | fit.alternatives
    low, high = np.percentile(fit.drawn[:, :, 1], [2.5, 97.5], axis=0)
    for place, what in ((0, "n*"), (2, "the loss")):
        values = {name: line[place].theta[1] for name, line in lines.items()}
        out += _disagreements(values, fit.estimator, what, low[place], high[place])
    half = 2 * fit.drawn[:, 0, 1].std()
    return out + agreement.compare_with_chinchilla(fit.results, minima, half)


def dead_latents(results) -> list[str]:
    """Returns a warning, if any, of runs with more than half of their latents dead."""
    dead = results.columns.get("dead_fraction")
    if dead is None or not (dead > _DEAD).any():
        return []
    return [
        f"{(dead > _DEAD).sum()} of {len(dead)} runs have more than half of their latents dead "
        "(dead_fraction); their d_sae overstates what they use"
    ]


def _at_bound(fit) -> list[str]:
    """Returns a warning for each scale whose term the runs show nothing of."""
    out = []
    law = fit.law
    for place in np.flatnonzero(fit.estimate.vanished):
        name, high = law.parameters[place], fit.ci95[law.parameters[place]][1]
        slopes = law.terms[law.term_of[place]].slopes
        if law.positive[place]:
            said = f"{name} is at its bound, 0: its 95% interval is one-sided, 0 to {high:.4g}"
        else:
            said = f"{name} is at its bound, exp({name}) = 0: it has no lower end, and is at most "
            said += f"{high:.4g} (95%)"
        if slopes:
            said += f"; {', '.join(slope.name for slope in slopes)} then says nothing"
        out.append(said)
    return out


def _weakly_identified(fit) -> list[str]:
    """Returns a warning for each parameter that the runs hardly bound, besides those of terms that
    vanish.
    """
    out = []
    gone = set(fit.law.term_of[fit.estimate.vanished])
    for place, (name, value) in enumerate(fit.estimate.params.items()):
        if fit.law.term_of[place] in gone:
            continue
        positive, (low, high) = fit.law.positive[place], fit.ci95[name]
        interval = f"its 95% interval is {low:.4g} to {high:.4g}"
        if positive and name == "E":
            if low < 0.01 * fit.results.loss.min() and value > 0.01 * fit.results.loss.min():
                out.append(
                    f"weakly identified: E is {value:.4g}, but {interval}: these runs do not say "
                    "whether the loss has a floor"
                )
        elif positive and high > _WIDE * max(low, 1e-300):
            out.append(f"weakly identified: {name} is {value:.4g}, but {interval}")
        elif not positive and high - low > FAR:
            out.append(f"weakly identified: {name} is {value:.4g}, and these runs do not bound it")
        elif not positive and low < 0 < high:
            out.append(f"weakly identified: {name} is {value:.4g}, but {interval}, and holds 0")
    return out


def _disagreeing_estimators(fit) -> list[str]:
    """Returns a warning for each exponent on which the estimators disagree."""
    out = []
    values = fit.exponents(fit.estimate.theta)
    drawn = fit.exponents(fit.drawn.theta)
    for name, what in (("d_sae_exponent", "n*"), ("loss_exponent", "the loss")):
        if name not in values:
            continue
        low, high = fit.spread(drawn[name], values[name])
        others = {e: fit.exponents(other.theta)[name] for e, other in fit.alternatives.items()}
        every = {fit.estimate.estimator: values[name]} | others
        out += _disagreements(every, fit.estimate.estimator, what, low, high)
    return out


def _disagreements(
    values: dict[str, float], own: str, what: str, low: float, high: float
) -> list[str]:
    """Returns a warning, if any, of estimators whose exponent lies outside the interval of our own,
    or far away.
    """
    far = {
        name: v
        for name, v in values.items()
        if abs(v - values[own]) > _SAME_EXPONENT
        and (not low <= v <= high or abs(v - values[own]) > _FAR_APART)
    }
    if not far:
        return []
    said = ", ".join(f"{v:.3f} by {name}" for name, v in far.items())
    return [
        f"estimators disagree on the exponent of {what} in compute: {values[own]:.3f} by {own}, "
        f"{said}"
    ]
