"""Compares the chinchilla and isoflop laws on the same runs.

They are approaches 3 and 2 of Hoffmann et al. 2022.
"""

import numpy as np

from sae_jax.errors import UserError
from sae_jax.laws import identifiability, isoflop
from sae_jax.laws.estimators import Estimate, estimate
from sae_jax.laws.frontier import Cost, Frontier
from sae_jax.laws.laws import LAWS
from sae_jax.laws.results import Results

_SAME_EXPONENT = 0.02
_SAME_LOSS = 0.03  # relative, at the budgets and at ten times the largest


def compare_with_chinchilla(
    results: Results, minima: isoflop.Minima, uncertainty: float
) -> list[str]:
    """Warns where chinchilla, fitted to the same runs, disagrees with isoflop.

    Args:
      results: the runs that isoflop was fitted to.
      minima: the minima of their isoFLOP curves.
      uncertainty: half the width of the 95% interval of isoflop's exponent of n*. A smaller
        difference is no disagreement.

    Returns:
      A list of at most one sentence. It is empty too where the runs cannot identify chinchilla.
    """
    law = LAWS["chinchilla"]
    try:
        identifiability.check(law, results)
    except UserError:
        return []
    other = estimate(law, results.columns, results.loss, law.estimator)
    return _compare(results, minima, other, uncertainty, beyond=True)


def compare_with_isoflop(results: Results, chinchilla: Estimate, uncertainty: float) -> list[str]:
    """Warns where the isoflop minima of the same runs disagree with a chinchilla fit.

    Args:
      results: the runs that chinchilla was fitted to.
      chinchilla: the fit.
      uncertainty: half the width of the 95% interval of its exponent of n*. A smaller difference is
        no disagreement.

    Returns:
      A list of at most one sentence. It is empty too where the runs have no isoFLOP curves.
    """
    try:
        minima = isoflop.Minima.from_results(results)
    except UserError:
        return []
    return _compare(results, minima, chinchilla, uncertainty, beyond=False)


def _compare(
    results: Results, minima: isoflop.Minima, chinchilla: Estimate, uncertainty: float, beyond: bool
) -> list[str]:
    """Compares exponents, and losses at the budgets.

    With `beyond`, losses are compared at ten times the largest budget too: there isoflop's power
    law, which has no floor, is the one to be doubted.
    """
    cost = (Cost.from_columns(results.columns) if "flops" in results.columns else None) or Cost(1.0)
    frontier = Frontier.from_law(chinchilla.law, chinchilla.theta, cost)
    if not frontier.exists:
        return [
            "chinchilla disagrees with isoflop: fitted to the same runs its loss does not fall in "
            "both d_sae and tokens"
        ]
    (_, a), _, (log_scale, c) = (line.theta for line in minima.lines("log_least_squares"))
    far = 10 * minima.flops[-1]
    budgets = np.append(minima.flops, far)
    expected = frontier.at(budgets)["loss"]
    straight = np.exp(log_scale + c * np.log(budgets))
    slope = np.polyfit(np.log(minima.flops), np.log(expected[:-1]), 1)[0]
    theirs = float(frontier.exponents["d_sae_exponent"])
    at_budgets = np.sqrt(np.mean((expected[:-1] / np.exp(minima.log[:, 2]) - 1) ** 2))
    if (
        abs(theirs - a) <= max(_SAME_EXPONENT, uncertainty)
        and abs(slope - c) <= _SAME_EXPONENT
        and at_budgets <= _SAME_LOSS
        and not (beyond and abs(expected[-1] / straight[-1] - 1) > _SAME_LOSS)
    ):
        return []
    return [
        f"chinchilla disagrees with isoflop on these runs: n* ~ C^{theirs:.3f} against "
        f"C^{a:.3f}; L* at the budgets ~ C^{slope:.3f} against C^{c:.3f}, and {at_budgets:.1%} "
        f"(rms) off the minima; at C = {far:.2g}, ten times the largest, a loss of "
        f"{expected[-1]:.4g} against {straight[-1]:.4g}. It misses the runs' own losses by "
        f"{chinchilla.rms_log_error:.1%} (rms), with E = {chinchilla.params['E']:.3g}; isoflop "
        "assumes no floor and no form in n and D"
    ]
