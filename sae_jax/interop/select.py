"""Selects runs of a sweep by conditions on the columns of its results.csv."""

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.tables import conditions, read_csv, that_meet
from sae_jax.train.watching import at_once, state


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
        if not (sweep / "sweep.json").is_file():
            what = f"{sweep} holds no sweep" if sweep.is_dir() else f"there is no {sweep}"
            raise UserError(f"--results: {what}; give the --workdir of one that was started")
        raise UserError(
            f"--results: there is no {file}; sae-jax sweep --workdir={sweep} --status writes it"
        )
    rows = _rows(file)
    done = [row for row in rows if row.get("status") == "done"]
    if not done:
        raise UserError(f"none of the {len(rows)} runs of {sweep} is done")
    parsed = conditions(terms, rows[0])
    return [done[place] for place in that_meet(done, parsed, f"done runs of {sweep}")]


def still_done(sweep: paths.AnyPath, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Returns the rows of `select` whose runs are done now, too.

    Until results.csv is written anew it calls a run done that is being trained again. Raises
    UserError if none of them is done.
    """
    states = at_once(lambda row: state(paths.inside(sweep / "runs", row["run_id"])), rows)
    done = [row for row, now in zip(rows, states, strict=True) if now == "done"]
    if not done:
        raise UserError(
            f"none of the {len(rows)} runs that {sweep}/results.csv calls done is done now; "
            "wait until they are trained again"
        )
    return done


def _rows(file: paths.AnyPath) -> list[dict[str, str]]:
    """Returns the rows of a results.csv. Raises UserError if it is damaged."""
    rows = [row for _, row in read_csv(file)]
    if rows and not {"run_id", "status"} <= rows[0].keys():
        raise UserError(f"{file} has no columns run_id and status, as a sweep's has")
    return rows
