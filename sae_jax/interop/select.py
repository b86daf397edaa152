"""Selects runs of a sweep by conditions on the columns of its results.csv."""

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.tables import conditions, read_csv, that_meet


def select(sweep: paths.AnyPath, terms: str = "") -> list[dict[str, str]]:
    """Returns the rows of SWEEP/results.csv of runs that are done and meet every term.

    Raises UserError for a term that cannot be read, for an unknown column, and if no run meets all
    terms.

    Args:
      sweep: the sweep's directory.
      terms: what `tables.conditions` reads, such as "d_sae=16384 eval_l0<60".
    """
    file = sweep / "results.csv"
    if not file.is_file():
        raise UserError(
            f"--results: there is no {file}; sae-jax sweep --workdir={sweep} --status writes it"
        )
    rows = _rows(file)
    done = [row for row in rows if row.get("status") == "done"]
    if not done:
        raise UserError(f"none of the {len(rows)} runs of {sweep} is done")
    parsed = conditions(terms, rows[0])
    return [done[place] for place in that_meet(done, parsed, f"done runs of {sweep}")]


def _rows(file: paths.AnyPath) -> list[dict[str, str]]:
    """Returns the rows of a results.csv. Raises UserError if it is damaged."""
    rows = [row for _, row in read_csv(file)]
    if rows and not {"run_id", "status"} <= rows[0].keys():
        raise UserError(f"{file} has no columns run_id and status, as a sweep's has")
    return rows
