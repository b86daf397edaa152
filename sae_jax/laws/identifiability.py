"""Checks whether results can say anything about a law's parameters."""

import numpy as np

from sae_jax.errors import UserError
from sae_jax.laws.laws import LAWS, Law
from sae_jax.laws.results import Results, distinct

_WHAT = {
    "d_sae": "dictionary sizes",
    "tokens": "numbers of training tokens",
    "k": "values of k",
    "flops": "compute budgets",
}
_TOGETHER = 0.9999  # correlation of two columns' logarithms above which neither tells its own part


def check(law: Law, results: Results, selection: str | None = None) -> None:
    """Raises UserError, which says what is needed, where results cannot identify a law.

    Results must have enough different values of each column, more points than parameters, losses
    that differ, and columns that do not vary together.

    Args:
      law: the law.
      results: the runs.
      selection: a sentence that says how the runs were chosen of more, for the message.
    """
    loss = results.loss
    where = f"{results.source} cannot identify {law.name} ({law.formula})"
    where += f"; {selection}" if selection else ""
    for column, needed in law.levels.items():
        there = distinct(results.columns[column])
        if len(there) < needed:
            these = f"only {there[0]:g}" if len(there) == 1 else f"{len(there)}"
            raise UserError(
                f"{where}: it has {these} of {column} and the law needs at least {needed} "
                f"different {_WHAT[column]}{_instead(law, results)}"
            )
    parameters = len(law.parameters)
    if len(results) <= parameters:
        raise UserError(
            f"{where}: it has {len(results)} points for {parameters} parameters; give at least "
            f"{parameters + 1}{_instead(law, results)}"
        )
    if np.ptp(loss) <= 1e-9 * loss.max():
        raise UserError(
            f"{where}: every loss is {loss[0]:g}; a law needs runs whose losses differ (is "
            f"{results.loss_column} the right column?)"
        )
    logs = {name: np.log(results.columns[name]) for name in law.columns}
    for i, one in enumerate(law.columns):
        for other in law.columns[i + 1 :]:
            if abs(np.corrcoef(logs[one], logs[other])[0, 1]) > _TOGETHER:
                raise UserError(
                    f"{where}: {one} and {other} vary only together, so that their parts of the "
                    f"loss cannot be told apart; give runs that vary one at a fixed other"
                )


def _instead(law: Law, results: Results) -> str:
    """Returns a hint at a law that these results do identify; empty where there is none."""
    for other in LAWS.values():
        if (
            len(other.parameters) < min(len(law.parameters), len(results))
            and all(column in results.columns for column in other.columns)
            and all(len(distinct(results.columns[c])) >= m for c, m in other.levels.items())
        ):
            return f"; --law={other.name} is possible"
    return ""
