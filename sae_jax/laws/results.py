"""Reads the runs that a law is fitted to, from a table or a sweep, and checks them."""

import dataclasses
import math

import numpy as np

from sae_jax import paths
from sae_jax.errors import UserError, choose, some
from sae_jax.json_files import parse_json
from sae_jax.paths import AnyPath
from sae_jax.tables import read_csv

COLUMNS = ("d_sae", "tokens", "k", "flops", "loss")
_OPTIONAL = ("dead_fraction", "flops_executed")
ACCOUNTINGS = ("flops", "flops_executed")  # 12 n d a token; what the step executes
_SETTINGS = ("architecture", "kind", "d_in", "sparsity_coefficient")  # alike in a law's runs
_BOUNDS = 1e-100, 1e100  # of a value, so that products of a few are finite
_LONGEST = 40  # characters of a value that a note shows
_SAME = 1e-6  # relative: values of a column closer than this are one value


@dataclasses.dataclass(frozen=True)
class Results:
    """The points that a law is fitted to, one to a row.

    Attributes:
      source: the file or directory that they are from.
      columns: float64 values (N,) by our names, those of `COLUMNS` and a few more.
      run: the number (N,) of the run that each row belongs to.
      loss_column: what the file calls the loss.
      notes: what the user should know about rows that were left out.
    """

    source: str
    columns: dict[str, np.ndarray]
    run: np.ndarray
    loss_column: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.run)

    @property
    def loss(self) -> np.ndarray:
        """The loss (N,) of each row."""
        return self.columns["loss"]

    @property
    def compute(self) -> np.ndarray:
        """The FLOPs (N,) of each row, or d_sae times tokens where a token's cost is not known."""
        if "flops" in self.columns:
            return self.columns["flops"]
        return self.columns["d_sae"] * self.columns["tokens"]

    def with_accounting(self, name: str) -> "Results":
        """Returns results with compute counted by one of `ACCOUNTINGS`.

        Raises UserError where they lack its column.
        """
        if name == "flops":
            return self
        if name not in self.columns:
            raise UserError(f"{self.source} has no column {name}, which --accounting={name} needs")
        columns = self.columns | {"flops": self.columns[name]}
        return dataclasses.replace(self, columns=columns)

    def take(self, rows) -> "Results":
        """Returns the chosen rows, by a mask or indices; their runs are numbered anew."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        _, run = np.unique(self.run[rows], return_inverse=True)
        return dataclasses.replace(self, columns=columns, run=run)

    def without_largest_losses(self, count: int) -> "Results":
        """Returns the rows with losses strictly below the `count`-th largest (Besiroglu et al. 2024
        drop five).

        Raises UserError where none would be left.
        """
        if count < 1:
            return self
        if count >= len(self):
            raise UserError(
                f"--drop_largest_losses={count} leaves nothing of the {len(self)} rows of "
                f"{self.source}"
            )
        kept = self.take(self.loss < np.sort(self.loss)[-count])
        note = f"{len(self) - len(kept)} rows with the largest losses were dropped, as asked"
        return dataclasses.replace(kept, notes=(*self.notes, note))


def read(
    path: str | AnyPath,
    needed: tuple[str, ...],
    names: dict[str, str] | None = None,
    flops_factor: float | None = None,
) -> Results:
    """Reads the rows of finished runs from a .csv or .jsonl file, or from SWEEP/results.csv.

    Rows of unfinished runs, exact repeats, and runs with a learning rate that is not the best of
    their size and budget are left out, and `Results.notes` says so.

    Args:
      path: the file, or a sweep's directory.
      needed: which of `COLUMNS` must be there, besides the loss.
      names: what the file calls columns, by our names.
      flops_factor: F of C = F n D, from which a missing column of flops or tokens is computed. It
        is 12 d_in by default, where the file has that column.

    Raises UserError, with the row's line, for a missing column and for a value that is no number,
    not finite or not positive.
    """
    file = paths.path(path)
    if file.is_dir():
        file = file / "results.csv"
        if not file.is_file():
            raise UserError(
                f"{path} is a directory without results.csv; give a sweep's directory, or a .csv "
                "or .jsonl file"
            )
    if not file.is_file():
        raise UserError(f"--results: there is no file {path}")
    rows = _read_rows(file)
    notes = []
    rows, note = _only_done(rows)
    notes += note
    rows, note = _without_repeats(rows)
    notes += note
    rows, note = _best_learning_rates(rows, names or {})
    notes += note
    if not rows:
        raise UserError(f"{file} has no rows of finished runs, so there is nothing to fit")
    names = _resolve_names(rows, names or {}, file)
    columns = {}
    for name in (*COLUMNS, *_OPTIONAL):
        source = names.get(name, name)
        if source in rows[0][1] and (name in (*needed, "loss") or _is_numeric(rows, source)):
            columns[name] = _read_column(rows, source, file, positive=name not in _OPTIONAL)
    _add_derived(columns, rows, flops_factor, file)
    missing = [name for name in (*needed, "loss") if name not in columns]
    if missing:
        raise UserError(_missing_column(missing[0], names, rows, file))
    ids = [str(row.get("run_id") or f"line {line}") for line, row in rows]
    notes += _differing_settings(rows, needed)
    # The rows' order in the file is of no consequence, not even for the bootstrap's draws.
    order = np.lexsort(tuple(columns.values()))
    columns = {name: values[order] for name, values in columns.items()}
    seen: dict[str, int] = {}
    run = np.array([seen.setdefault(ids[row], len(seen)) for row in order])
    return Results(str(path), columns, run, names["loss"], tuple(notes))


def distinct(values: np.ndarray) -> np.ndarray:
    """Returns the different values in ascending order; values that are equal but for rounding count
    as one.
    """
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], np.diff(ordered) > _SAME * ordered[1:]])]


def _read_rows(file: AnyPath) -> list[tuple[int, dict]]:
    """Returns (line of the file, row) of every row."""
    if file.suffix == ".csv":
        return read_csv(file)
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
            cells = {_text(name): _cell(value) for name, value in row.items()}
            rows.append((number, cells))
    return rows


def _cell(value):
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if value is None or is_number else _text(value)


def _text(value) -> str:
    return str(value).encode(errors="backslashreplace").decode()


def _only_done(rows):
    """Returns the rows of runs that are done, and a note on the others."""
    counts: dict[str, int] = {}
    kept = []
    for line, row in rows:
        status = row.get("status") or "done"
        if status == "done":
            kept.append((line, row))
        else:
            counts[status] = counts.get(status, 0) + 1
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    note = f"{sum(counts.values())} of {len(rows)} runs are left out, not being done: {text}"
    return kept, [note] if counts else []


def _without_repeats(rows):
    """Returns the rows without exact repeats, and a note on these."""
    seen, kept = set(), []
    for line, row in rows:
        key = tuple(sorted((name, str(value)) for name, value in row.items()))
        if key not in seen:
            kept.append((line, row))
        seen.add(key)
    repeats = len(rows) - len(kept)
    return kept, [f"{repeats} rows repeat another row exactly and count once"] if repeats else []


def _best_learning_rates(rows, names: dict[str, str]):
    """Returns for each size, budget and k the runs with the best learning rate, and a note on the
    others.

    The others say what a wrong rate costs, not what the budget buys.
    """
    size, data, k, loss = (names.get(name) or name for name in ("d_sae", "tokens", "k", "loss"))
    if not rows or not {"lr", size, data} <= set(rows[0][1]):
        return rows, []
    loss = loss if loss in rows[0][1] else "eval_loss"
    cells: dict[tuple, dict] = {}
    for line, row in rows:
        cell = tuple(row.get(name) for name in (size, data, k, "sparsity_coefficient"))
        cells.setdefault(cell, {}).setdefault(row.get("lr"), []).append((line, row))
    kept = []
    for rates in cells.values():
        losses = {rate: [_number(row.get(loss)) for _, row in of] for rate, of in rates.items()}
        known = [v is not None and math.isfinite(v) for of in losses.values() for v in of]
        if len(rates) == 1 or not all(known):
            kept += [row for of in rates.values() for row in of]
        else:
            kept += rates[min(losses, key=lambda rate: np.mean(losses[rate]))]
    left = len(rows) - len(kept)
    note = f"{left} runs are left out, another learning rate being better for their size and budget"
    return sorted(kept, key=lambda row: row[0]), [note] if left else []


def _differing_settings(rows, needed) -> list[str]:
    """Returns notes on settings in which the runs differ, and which the law does not know."""
    out = []
    for name in (*_SETTINGS, *(() if "k" in needed else ("k",))):
        values = {str(row.get(name)) for _, row in rows if row.get(name) not in (None, "")}
        if len(values) > 1:
            shown = some([_shortened(value) for value in sorted(values)], 4)
            out.append(f"the runs differ in {name} ({shown}), which this law does not know")
    return out


def _shortened(text: str) -> str:
    """Returns a text of a table on one line, cut where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _resolve_names(rows, names: dict[str, str], file) -> dict[str, str]:
    """Returns what the file calls each of our columns, as the user says or by default."""
    present = list(rows[0][1])
    resolved = {name: name for name in COLUMNS} | {n: c for n, c in names.items() if c}
    if not names.get("loss") and "loss" not in present:
        resolved["loss"] = "eval_loss"  # what result.json calls it
    for name, column in names.items():
        if column:
            try:
                choose(column, present, f"the column of {file} for --{name}")
            except UserError as error:
                raise UserError(str(error)) from None
    return resolved


def _is_numeric(rows, name: str) -> bool:
    """Whether an unasked-for column is full of numbers, so that it can be used."""
    return all(_number(row.get(name)) is not None for _, row in rows)


def _number(value) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):  # an integer of hundreds of digits
        return None


def _read_column(rows, name: str, file, positive: bool) -> np.ndarray:
    """Returns the numbers (N,) of a column. Raises UserError that names the first bad line."""
    values = []
    for line, row in rows:
        value = _number(row.get(name))
        where = f"{file}, line {line}: {name}"
        if value is None:
            shown = row.get(name)
            shown = "empty" if shown in (None, "") else repr(_shortened(str(shown)))
            raise UserError(f"{where} is {shown}; every row needs a number there")
        if not math.isfinite(value):
            raise UserError(
                f"{where} is {value}; remove the row, or mark the run in a column `status` as "
                "failed"
            )
        if positive and value <= 0:
            raise UserError(f"{where} is {value:g}; laws are of positive quantities only")
        if positive and not _BOUNDS[0] <= value <= _BOUNDS[1]:
            raise UserError(f"{where} is {value:g}, which is no quantity of a run")
        values.append(value)
    return np.array(values)


def _add_derived(columns, rows, factor: float | None, file) -> None:
    """Adds flops or tokens to the columns where the others tell it."""
    if factor is None and "d_in" in rows[0][1]:
        widths = distinct(_read_column(rows, "d_in", file, positive=True))
        factor = 12 * widths[0] if len(widths) == 1 else None
    if factor is None or "d_sae" not in columns:
        return
    if "flops" not in columns and "tokens" in columns:
        columns["flops"] = factor * columns["d_sae"] * columns["tokens"]
    if "tokens" not in columns and "flops" in columns:
        columns["tokens"] = columns["flops"] / (factor * columns["d_sae"])


def _missing_column(name: str, names, rows, file) -> str:
    """Returns the message for a column that is not there."""
    present = ", ".join(rows[0][1])
    if name == "loss":
        return f"{file} has no column loss or eval_loss; say --loss=COLUMN (it has {present})"
    hint = f"say --{name}=COLUMN if it is called otherwise"
    if name in ("tokens", "flops"):
        hint += ", or --flops_factor=F where C = F * d_sae * tokens gives it from the others"
    return f"{file} has no column {names[name]}, which this law needs; {hint} (it has {present})"
