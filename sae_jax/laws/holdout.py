"""Chooses the points that are held out to see how well a law extrapolates.

They are the points of the largest budgets.
"""

import numpy as np

from sae_jax.errors import UserError
from sae_jax.laws.results import Results

SAME_BUDGET = 0.02  # relative: runs whose compute differs by less share a budget
_PART = 0.1  # the least part of the points that is held out by default


def groups(values: np.ndarray, tolerance: float = SAME_BUDGET) -> np.ndarray:
    """Returns the group (N,) of each value, counted from the smallest; a group spans at most
    `tolerance`.
    """
    order = np.argsort(values, kind="stable")
    group, first, out = -1, -np.inf, np.empty(len(values), int)
    for place in order:
        if values[place] > first * (1 + tolerance) or group < 0:
            group, first = group + 1, values[place]
        out[place] = group
    return out


def budget_column(results: Results, needed: tuple[str, ...]) -> tuple[np.ndarray, str]:
    """Returns the values (N,) that a law is extrapolated in, and their name.

    They are compute, or the dictionary's size for a law that knows no tokens.

    Args:
      results: the runs.
      needed: the columns that the law needs.
    """
    columns = results.columns
    if "tokens" not in needed and "flops" not in needed:
        return columns["d_sae"], "d_sae"
    if "flops" in columns:
        return columns["flops"], "compute"
    return columns["d_sae"] * columns["tokens"], "d_sae x tokens"


def split(results: Results, needed: tuple[str, ...], count: int | None):
    """Splits rows into those that are fitted and those that are held out.

    Args:
      results: the runs.
      needed: the columns that the law needs.
      count: how many of the largest budgets are held out; None takes the fewest that hold a tenth
        of the points.

    Returns:
      The rows kept, the rows held out, and a description of the latter.

    Raises UserError unless at least one budget is held out and one is kept.
    """
    values, name = budget_column(results, needed)
    group = groups(values)
    total = group.max() + 1
    if count is None:
        sizes = np.bincount(group)[::-1].cumsum()
        count = int(np.argmax(sizes >= _PART * len(values))) + 1
    if not 1 <= count < total:
        raise UserError(
            f"--holdout={count}: {results.source} has {total} different budgets; hold out at "
            f"least 1 and keep at least 1"
        )
    held = group >= total - count
    unit = {"compute": "FLOPs", "d_sae": "latents"}.get(name, "")
    low, high = values[held].min(), values[held].max()
    span = f"{low:.3g}" if high <= low * (1 + SAME_BUDGET) else f"{low:.3g} to {high:.3g}"
    which = "the largest" if count == 1 else f"the {count} largest"
    points = "1 point" if held.sum() == 1 else f"{held.sum()} points"
    what = f"{which} of {total} values of {name}: {points} at {span} {unit}"
    return np.flatnonzero(~held), np.flatnonzero(held), what.strip()
