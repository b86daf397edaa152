"""Selects runs of a sweep by conditions on the columns of its results.csv."""

import math
import operator
import re

from sae_jax import paths
from sae_jax.errors import UserError, choose
from sae_jax.tables import read_csv

_OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": lambda a, b: not _same(a, b),
    "<": operator.lt,
    ">": operator.gt,
    "=": lambda a, b: _same(a, b),
}
_TERM = re.compile(rf"([\w.]+)({'|'.join(_OPERATORS)})(\S+)")


def select(sweep: paths.AnyPath, terms: str = "") -> list[dict[str, str]]:
    """Returns the rows of SWEEP/results.csv of runs that are done and meet every term.

    Raises UserError for a term that cannot be read, for an unknown column, and if no run meets all
    terms.

    Args:
      sweep: the sweep's directory.
      terms: terms with spaces between them, such as "d_sae=16384 eval_l0<60". A term is the name of
        a column, one of = != < <= > >=, and a value. An empty cell meets only !=.
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
    parsed = [_parse(term, list(rows[0])) for term in terms.split()]
    found = [row for row in done if all(_meets(row, *term) for term in parsed)]
    if not found:
        counts = [
            f"{''.join(term)} by {sum(_meets(row, *term) for row in done)}" for term in parsed
        ]
        raise UserError(
            f"--select: none of the {len(done)} done runs of {sweep} meets it; of its terms, "
            f"{', '.join(counts)}"
        )
    return found


def _rows(file: paths.AnyPath) -> list[dict[str, str]]:
    """Returns the rows of a results.csv. Raises UserError if it is damaged."""
    rows = [row for _, row in read_csv(file)]
    if rows and not {"run_id", "status"} <= rows[0].keys():
        raise UserError(f"{file} has no columns run_id and status, as a sweep's has")
    return rows


def _parse(term: str, columns: list[str]) -> tuple[str, str, str]:
    match = _TERM.fullmatch(term)
    if not match:
        raise UserError(
            f"--select: {term!r} is not COLUMN, one of = != < <= > >=, and VALUE, as in "
            '--select="d_sae=16384 eval_l0<60"'
        )
    column, sign, value = match.groups()
    choose(column, columns, "--select: the column")
    if sign in ("<", "<=", ">", ">=") and _number(value) is None:
        raise UserError(f"--select: {term} compares with {value!r}, which is no number")
    return column, sign, value


def _meets(row: dict[str, str], column: str, sign: str, value: str) -> bool:
    cell = row[column]
    if not cell:
        return sign == "!="
    numbers = _number(cell), _number(value)
    if None not in numbers:
        return _OPERATORS[sign](*numbers)
    return sign in ("=", "!=") and _OPERATORS[sign](cell, value)


def _same(a, b) -> bool:
    return a == b if isinstance(a, str) else math.isclose(a, b, rel_tol=1e-9)


def _number(text: str) -> float | None:
    try:
        return float(text.replace("_", ""))
    except ValueError:
        return None
