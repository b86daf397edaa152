"""Reads tables: .csv files, which spreadsheets or other programs may have written."""

import csv
import io
import itertools
from collections.abc import Iterable

from sae_jax.errors import UserError, some
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
