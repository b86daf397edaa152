"""Reads tables, .csv files which spreadsheets or other programs may have written, and chooses rows
of them by conditions on their columns.
"""

import csv
import dataclasses
import io
import itertools
import math
import operator
import re
from collections.abc import Iterable

from sae_jax.errors import UserError, choose, nearest, some
from sae_jax.paths import AnyPath


def read_csv(file: AnyPath) -> list[tuple[int, dict[str, str]]]:
    """Returns the rows of a .csv file, each with the number of its line in the file.

    A row is a dict of text by the names in the first line. The file may begin with a byte-order
    mark, and a quoted cell may hold line breaks.

    Raises UserError, which names the file and the line, if it cannot be read, is not UTF-8, has two
    columns of one name, or a row has other fields than the first line.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a text file (UTF-8); save it as CSV in UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    rows = []
    try:
        names = reader.fieldnames or []
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise UserError(f"{file} has two columns of one name: {some(twice)}")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{file}, line {reader.line_num}: its fields are not those of the first line"
                )
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: {error}") from None
    return rows


def as_csv(rows: list[dict], columns: Iterable[str] = ()) -> str:
    """Returns rows as the text of a .csv file: `columns` first, then what else the rows have."""
    text = io.StringIO()
    names = list(dict.fromkeys([*columns, *itertools.chain(*rows)]))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@dataclasses.dataclass(frozen=True)
class Condition:
    """A condition on the rows of a table, such as d_sae=16384 or eval_l0<60."""

    column: str
    sign: str
    value: str

    def __str__(self) -> str:
        """Returns the condition as it is written."""
        return f"{self.column}{self.sign}{self.value}"

    def meets(self, row: dict) -> bool:
        """Whether a row meets it. An empty cell meets only !=."""
        cell = row[self.column]
        if cell in (None, ""):
            return self.sign == "!="
        numbers = as_number(cell), as_number(self.value)
        if None not in numbers:
            return _OPERATORS[self.sign](*numbers)
        return self.sign in ("=", "!=") and _OPERATORS[self.sign](str(cell), self.value)


def conditions(terms: str, columns: Iterable[str]) -> list[Condition]:
    """Returns the conditions that `terms` has with spaces between them.

    Raises UserError for a term that cannot be read, and for an unknown column.

    Args:
      terms: such as "d_sae=16384 eval_l0<60". A term is the name of a column, one of = != < <= >
        >=, and a value.
      columns: the table's columns.
    """
    return [_parse(term, list(columns)) for term in terms.split()]


def that_meet(rows: list[dict], terms: list[Condition], what: str) -> list[int]:
    """Returns the places of the rows that meet every condition.

    Args:
      rows: the rows.
      terms: the conditions.
      what: the rows in words, for the message.

    Raises UserError, which says how many rows meet each condition, and of one that none meets what
    might be meant, if no row meets all.
    """
    found = [place for place, row in enumerate(rows) if all(term.meets(row) for term in terms)]
    if not found:
        counts = []
        for term in terms:
            number = sum(term.meets(row) for row in rows)
            counts.append(f"{term} by {number}{'' if number else _meant(term, rows)}")
        raise UserError(
            f"--select: none of the {len(rows)} {what} meets it; of its terms, {', '.join(counts)}"
        )
    return found


def as_number(cell) -> float | None:
    """Returns the number that a cell holds, None where it is none; 16_384 is one too."""
    try:
        return float(cell.replace("_", "") if isinstance(cell, str) else cell)
    except (TypeError, ValueError, OverflowError):  # an integer of hundreds of digits
        return None


def _meant(term: Condition, rows: list[dict]) -> str:
    """Returns a hint in brackets on what a condition that no row meets might mean; "" for none."""
    if term.sign != "=" or not rows:
        return ""
    if any(f",{name}{sign}" in term.value for name in rows[0] for sign in _OPERATORS):
        return " (spaces separate terms, not commas)"
    cells = (row[term.column] for row in rows)
    values = [str(cell) for cell in dict.fromkeys(cells) if cell not in (None, "")]
    if not values:
        return " (the column is empty)"
    is_word = as_number(term.value) is None
    return f" ({nearest(term.value, values) if is_word else f'there are {some(values)}'})"


def _parse(term: str, columns: list[str]) -> Condition:
    match = _TERM.fullmatch(term)
    if not match:
        raise UserError(
            f"--select: {term!r} is not COLUMN, one of = != < <= > >=, and VALUE, as in "
            '--select="d_sae=16384 eval_l0<60"'
        )
    column, sign, value = match.groups()
    if value.endswith(","):
        raise UserError(f"--select: {term!r} ends with a comma; spaces alone separate terms")
    choose(column, columns, "--select: the column")
    if sign in ("<", "<=", ">", ">=") and as_number(value) is None:
        raise UserError(f"--select: {term} compares with {value!r}, which is no number")
    return Condition(column, sign, value)


def _same(a, b) -> bool:
    return a == b if isinstance(a, str) else math.isclose(a, b, rel_tol=1e-9)


_OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": lambda a, b: not _same(a, b),
    "<": operator.lt,
    ">": operator.gt,
    "=": _same,
}
_TERM = re.compile(rf"([\w.]+)({'|'.join(_OPERATORS)})(\S+)")
