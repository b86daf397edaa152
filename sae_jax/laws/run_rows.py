"""Reads the rows of finished runs from tables, sweeps or memory, joins them and chooses some."""

import math

import numpy as np

from sae_jax import paths
from sae_jax.errors import UserError, some
from sae_jax.json_files import parse_json
from sae_jax.laws.settings import RATES, SOURCE, TARGETS, as_text, last_part, settings
from sae_jax.paths import AnyPath
from sae_jax.tables import as_number, conditions, read_csv, that_meet
from sae_jax.train.evaluated_rows import unlike_evaluations

SWEEP_FILE = "results.csv"
EVALUATIONS_FILE = "evals.csv"  # what `sae-jax eval` writes beside it

Row = tuple[str, dict]
"""Where a row is, in words, and its cells by the file's names."""


def finished(
    source, names: dict[str, str] | None = None, select: str = ""
) -> tuple[str, list[Row], list[str]]:
    """Returns a title of a source, as `read` takes it, the rows of its finished runs that meet
    `select`, and notes on the others.

    All rows have the same columns.
    """
    several = source if isinstance(source, list | tuple) else [source]
    tables = [_rows(one) for one in several]
    title = ", ".join(dict.fromkeys(title for title, _ in tables))
    rows, notes = _join(tables)
    for left in (_only_done, _without_repeats):
        rows, note = left(rows)
        notes += note
    rows, note = _selected(rows, select, names or {}, title)
    unlike = unlike_evaluations([row for _, row in rows])
    return title, rows, [*notes, *note, *([unlike] if unlike else [])]


def _rows(source) -> tuple[str, list[Row]]:
    """Returns a title of one source, and its rows."""
    if isinstance(source, str) or hasattr(source, "read_bytes"):
        file = _file(source)
        return str(source), _rows_of_file(file)
    if not hasattr(source, "keys") or not hasattr(source, "__getitem__"):
        if not hasattr(source, "columns"):
            kind = type(source).__name__
            raise UserError(
                f"results are a file, a sweep's directory, a dict of columns or a data frame, not "
                f"{kind}"
            )
        source = {name: source[name] for name in source.columns}  # polars has no keys
    columns = {_text(name): np.asarray(source[name], object).ravel() for name in source.keys()}
    lengths = {len(values) for values in columns.values()}
    if len(lengths) > 1:
        numbers = some([str(length) for length in sorted(lengths)])
        raise UserError(f"the table's columns have different lengths: {numbers}")
    rows = zip(*columns.values(), strict=True)
    return "the table", [
        (f"the table, row {number}", {n: _cell(v) for n, v in zip(columns, row, strict=True)})
        for number, row in enumerate(rows)
    ]


def _file(source: str | AnyPath) -> AnyPath:
    """Returns the file of a table, or that of a sweep's directory."""
    file = paths.path(source)
    if file.is_dir():
        file = file / SWEEP_FILE
        if not file.is_file():
            raise UserError(
                f"{source} is a directory without results.csv; give a sweep's directory, or a .csv "
                "or .jsonl file"
            )
    if not file.is_file():
        raise UserError(f"--results: there is no file {source}")
    return file


def _rows_of_file(file: AnyPath) -> list[Row]:
    """Returns the rows of a .csv or .jsonl file."""
    if file.suffix == ".csv":
        return [(f"{file}, line {line}", row) for line, row in read_csv(file)]
    if file.suffix != ".jsonl":
        raise UserError(f"{file} is neither .csv nor .jsonl; name it by what it is")
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object of columns")
            # What is no number is text, as in a table, and text that can be written.
            rows.append((where, {_text(name): _cell(value) for name, value in row.items()}))
    return rows


def _cell(value):
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return None if value is None else _text(value)


def _text(value) -> str:
    return str(value).encode(errors="backslashreplace").decode()


def _join(tables: list[tuple[str, list[Row]]]) -> tuple[list[Row], list[str]]:
    """Returns the rows of all tables, with the columns of all, and a note on runs that are in
    several.

    Of several tables each row says which it is of, in the column `SOURCE`. Rows with one run_id
    that differ in what was measured on held-out rows alone, as those of results.csv and evals.csv
    do, are one run, and the last measurement counts.
    """
    columns = dict.fromkeys(name for _, rows in tables for _, row in rows for name in row)
    common = [name for name in columns if all(name in rows[0][1] for _, rows in tables if rows)]
    # What eval measured, and a name, which tells a run from the others of a sweep that may have
    # grown since, make no other run of it.
    ours = ("eval_", "name", "warnings") if "eval_rows" in columns else ()
    alike = [name for name in common if not name.startswith(ours)]
    joined: list[Row] = []
    seen: dict[tuple, tuple[int, dict]] = {}
    repeats = newer = 0
    for number, (title, rows) in enumerate(tables):
        for place, row in rows:
            key = tuple(str(row.get(name)) for name in alike)
            whole = {name: row.get(name) for name in columns}
            whole |= {SOURCE: title} if len(tables) > 1 else {}
            first, kept = seen.get(key, (number, whole))
            if "run_id" in common and first != number:
                repeats += 1  # a sweep that was copied, or one that took another's runs over
                newer += any(str(row.get(n)) != str(kept[n]) for n in common)
                cells = {name: cell for name, cell in row.items() if cell not in (None, "")}
                if "eval_fvu" in cells and "eval_rows" in kept:
                    kept["eval_rows"] = None  # unless the new figures say it of themselves
                kept |= cells
                continue
            seen.setdefault(key, (number, whole))
            joined.append((place, whole))
    if not repeats:
        return joined, []
    which = f", {newer} of them with the eval_ figures of the last" if newer else ""
    return joined, [f"{repeats} runs are in several tables and count once{which}"]


def _only_done(rows):
    """Returns the rows of runs that are done, and a note on the others."""
    counts: dict[str, int] = {}
    kept = []
    for place, row in rows:
        status = row.get("status") or "done"
        if status == "done":
            kept.append((place, row))
        else:
            counts[status] = counts.get(status, 0) + 1
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    note = f"{sum(counts.values())} of {len(rows)} runs are left out, not being done: {text}"
    return kept, [note] if counts else []


def _without_repeats(rows):
    """Returns the rows without exact repeats, and a note on these."""
    seen, kept = set(), []
    for place, row in rows:
        key = tuple(sorted((name, str(value)) for name, value in row.items()))
        if key not in seen:
            kept.append((place, row))
        seen.add(key)
    repeats = len(rows) - len(kept)
    return kept, [f"{repeats} rows repeat another row exactly and count once"] if repeats else []


def _selected(rows, select: str, names: dict[str, str], title: str):
    """Returns the rows that meet the conditions of `select`, and a note on the others."""
    if not select.split() or not rows:
        return rows, []
    ours = {name: column for name, column in names.items() if column in rows[0][1]}
    cells = [row | {name: row[column] for name, column in ours.items()} for _, row in rows]
    terms = conditions(select, cells[0])
    kept = that_meet(cells, terms, f"rows of {title}")
    note = f"{len(kept)} of {len(rows)} rows are taken, as --select={select!r} asks"
    return [rows[place] for place in kept], [note]


def best_learning_rates(rows, names: dict[str, str]):
    """Returns for each size, budget and other settings the runs with the best learning rate, and a
    note on the others.

    The others say what a wrong rate costs, not what the budget buys.
    """
    size, data, loss = (names.get(name) or name for name in ("d_sae", "tokens", "loss"))
    if not rows or not {"lr", size, data} <= set(rows[0][1]):
        return rows, []
    loss = loss if loss in rows[0][1] else "eval_loss"
    columns = {name: [row[name] for _, row in rows] for name in rows[0][1]}
    apart = settings(columns, names | {"loss": loss})
    apart = [name for name in apart if last_part(name) not in (*RATES, "seed")]
    cells: dict[tuple, dict] = {}
    for place, row in rows:
        adapted = any(row.get(name) not in (None, "") for name in TARGETS)
        # What the coefficient ended at is the run's, not its setting's.
        own = [n for n in apart if not (adapted and n == "sparsity_coefficient")]
        cell = tuple(as_text(row[name]) for name in dict.fromkeys((size, data, *own)))
        cells.setdefault(cell, {}).setdefault(row.get("lr"), []).append((place, row))
    kept = []
    for rates in cells.values():
        losses = {rate: [as_number(row.get(loss)) for _, row in of] for rate, of in rates.items()}
        known = [v is not None and math.isfinite(v) for of in losses.values() for v in of]
        if len(rates) == 1 or not all(known):
            kept += [row for of in rates.values() for row in of]
        else:
            kept += rates[min(losses, key=lambda rate: np.mean(losses[rate]))]
    left = len(rows) - len(kept)
    place_of = {place: number for number, (place, _) in enumerate(rows)}
    note = f"{left} runs are left out, another learning rate being better for their size and budget"
    return sorted(kept, key=lambda row: place_of[row[0]]), [note] if left else []
