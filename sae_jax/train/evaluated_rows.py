"""On how many held-out rows runs were evaluated, which figures of dead latents depend on."""

import collections

from sae_jax.errors import some
from sae_jax.tables import as_number


def unlike_evaluations(rows: list[dict], column: str = "eval_rows") -> str | None:
    """Returns a sentence about runs that were evaluated on different numbers of rows, None where
    all are alike but for whole batches.

    Args:
      rows: the runs; those without the column do not count.
      column: the one of the number of held-out rows.
    """
    numbers = [as_number(row.get(column)) for row in rows]
    counts = collections.Counter(sorted(number for number in numbers if number))
    if not counts or max(counts) <= 1.1 * min(counts):
        return None
    said = [f"{number:,.0f} ({runs} runs)" for number, runs in counts.items()]
    return (
        f"runs were evaluated on different numbers of held-out rows, {some(said, 4)}; the fewer "
        "the rows, the more latents seem dead"
    )
