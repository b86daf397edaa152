"""Reads the runs that a law is fitted to, from tables, sweeps or memory, and checks them."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from sae_jax import paths
from sae_jax.errors import UserError, choose
from sae_jax.laws.run_rows import EVALUATIONS_FILE, SWEEP_FILE, best_learning_rates, finished
from sae_jax.laws.settings import (
    SOURCE,
    as_text,
    in_order,
    meant_column,
    shortened,
    varying,
)
from sae_jax.paths import AnyPath
from sae_jax.tables import as_number

COLUMNS = ("d_sae", "tokens", "k", "flops", "loss")
_OPTIONAL = ("dead_fraction", "flops_executed")
ACCOUNTINGS = ("flops", "flops_executed")  # 12 n d a token; what the step executes
_BOUNDS = 1e-100, 1e100  # of a value, so that products of a few are finite
_SAME = 1e-6  # relative: values of a column closer than this are one value


@dataclasses.dataclass(frozen=True)
class Results:
    """The points that a law is fitted to, one to a row.

    Attributes:
      source: the file or directory that they are from; several with commas between them.
      columns: float64 values (N,) by our names, those of `COLUMNS` and a few more.
      run: the number (N,) of the run that each row belongs to.
      loss_column: what the file calls the loss.
      notes: what the user should know about rows that were left out.
      cells: all columns (N,) by the file's names, each cell as it was read.
      places: where each row (N,) is, in words.
      names: what the file calls columns, by our names.
      flops_factor: F of C = F n D, as the user gave it.
    """

    source: str
    columns: dict[str, np.ndarray]
    run: np.ndarray
    loss_column: str
    notes: tuple[str, ...] = ()
    cells: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    places: np.ndarray = dataclasses.field(default_factory=lambda: np.array([], object))
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    flops_factor: float | None = None

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

    def require(self, needed: Iterable[str]) -> "Results":
        """Returns these results if they have all columns of a law.

        Raises UserError, with the row's place, for a column that is missing and for a value that is
        no number, not finite or not positive.

        Args:
          needed: names of `COLUMNS`.
        """
        for name in needed:
            if name not in self.columns:
                source = self.names.get(name, name)
                if source in self.cells:
                    order = np.argsort([_line(place) for place in self.places], kind="stable")
                    cells, places = self.cells[source][order], self.places[order]
                    _read_column(cells, source, name, places, positive=True)
                raise UserError(_missing_column(name, self.names, list(self.cells), self.source))
        return self

    def run_folders(self) -> list[AnyPath]:
        """Returns the directory of each run, where they are of sweeps whose directories are there;
        else none.
        """
        folders = []
        for run_id, place in zip(self.cells.get("run_id", []), self.places, strict=False):
            file = paths.path(place.rpartition(", line ")[0])
            if file.name in (SWEEP_FILE, EVALUATIONS_FILE):
                folders.append((file.parent / "runs", str(run_id)))
        there = {every for every in {every for every, _ in folders} if every.is_dir()}
        return [paths.inside(every, run_id) for every, run_id in folders if every in there]

    def varying(self, columns: Iterable[str]) -> dict[str, dict]:
        """Returns the file's columns that vary and that a law with these columns does not know.

        They are told as `settings.varying` does.
        """
        known = {self.names.get(name, name): self.columns[name] for name in columns}
        return varying(self.cells, self.names, known)

    def take(self, rows) -> "Results":
        """Returns the chosen rows, by a mask or indices; their runs are numbered anew."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        cells = {name: values[rows] for name, values in self.cells.items()}
        _, run = np.unique(self.run[rows], return_inverse=True)
        places = self.places[rows] if len(self.places) else self.places
        return dataclasses.replace(self, columns=columns, run=run, cells=cells, places=places)

    def split(self, by: Sequence[str]) -> dict[str, "Results"]:
        """Returns the rows of each value of some columns, by the values with commas between them.

        They are in ascending order, numbers before words. A column that only some groups fill, such
        as k, is there in these.

        Args:
          by: the columns, by our names or the file's.

        Raises UserError for an unknown column.
        """
        by = [name if name in self.cells else self.names.get(name, name) for name in by]
        by = [meant_column(name, self.cells) for name in by]
        for name in by:
            choose(name, self.cells, f"--by: the column of {self.source}")
        texts = [[as_text(cell) for cell in self.cells[name]] for name in by]
        values = np.array([", ".join(row) for row in zip(*texts, strict=True)])
        groups = {}
        for value in in_order(values):
            group = self.take(values == value)
            columns = _columns(group.cells, group.names, group.places, self.flops_factor)
            groups[value] = dataclasses.replace(group, columns=columns)
        return groups

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
    source,
    needed: Iterable[str] = (),
    names: dict[str, str] | None = None,
    flops_factor: float | None = None,
    select: str = "",
) -> Results:
    """Reads the rows of finished runs.

    Rows of unfinished runs, exact repeats, and runs with a learning rate that is not the best of
    their size, budget and other settings are left out, and `Results.notes` says so.

    Args:
      source: a .csv or .jsonl file, a sweep's directory, a dict of columns, a data frame, or a list
        of such, whose rows are joined.
      needed: which of `COLUMNS` must be there, besides the loss.
      names: what the file calls columns, by our names.
      flops_factor: F of C = F n D, from which a missing column of flops or tokens is computed. It
        is 12 d_in by default, where the file has that column.
      select: conditions that rows must meet, such as "architecture=topk k=32"
        (`tables.conditions`), by the file's names or ours.

    Raises UserError, with the row's place, for a missing column and for a value that is no number,
    not finite or not positive, and where no row is left.
    """
    names = {name: column for name, column in (names or {}).items() if column}
    title, rows, notes = finished(source, names, select)
    rows, note = best_learning_rates(rows, names)
    notes += note
    if not rows:
        raise UserError(f"{title} has no rows of finished runs, so there is nothing to fit")
    names = _resolve_names(rows, names, title)
    places = np.array([place for place, _ in rows], object)
    cells = {name: _column([row[name] for _, row in rows]) for name in rows[0][1]}
    columns = _columns(cells, names, places, flops_factor)
    # The rows' order in the file is of no consequence, not even for the bootstrap's draws.
    order = np.lexsort(tuple(columns.values())) if columns else np.arange(len(rows))
    ids = [f"{row.get(SOURCE, '')} {row.get('run_id') or place}" for place, row in rows]
    seen: dict[str, int] = {}
    run = np.array([seen.setdefault(ids[row], len(seen)) for row in order])
    found = Results(
        title, columns, run, names["loss"], tuple(notes), cells, places, names, flops_factor
    )
    found.require((*needed, "loss"))
    cells, columns = (
        {name: values[order] for name, values in every.items()} for every in (cells, columns)
    )
    return dataclasses.replace(found, columns=columns, cells=cells, places=places[order])


def distinct(values: np.ndarray) -> np.ndarray:
    """Returns the different values in ascending order; values that are equal but for rounding count
    as one.
    """
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], np.diff(ordered) > _SAME * ordered[1:]])]


def _column(cells: list) -> np.ndarray:
    column = np.empty(len(cells), object)
    column[:] = cells
    return column


def _resolve_names(rows, names: dict[str, str], title: str) -> dict[str, str]:
    """Returns what the file calls each of our columns, as the user says or by default."""
    present = list(rows[0][1])
    for name, column in names.items():
        choose(column, present, f"the column of {title} for --{name}")
    resolved = {name: name for name in (*COLUMNS, *_OPTIONAL)} | names
    if "loss" not in names and "loss" not in present:
        resolved["loss"] = "eval_loss"  # what result.json calls it
    return resolved


def _columns(cells, names, places, flops_factor: float | None) -> dict[str, np.ndarray]:
    """Returns the numbers (N,) of our columns that are there, whole and usable, or that follow from
    others.
    """
    columns = {}
    for name in (*COLUMNS, *_OPTIONAL):
        source = names[name]
        if source in cells and (name == "loss" or _is_usable(cells[source], name)):
            columns[name] = _read_column(cells[source], source, name, places, name not in _OPTIONAL)
    _add_derived(columns, cells, flops_factor)
    return columns


def _is_usable(cells: np.ndarray, name: str) -> bool:
    """Whether a column is full of numbers that a law can use."""
    numbers = [as_number(cell) for cell in cells]
    if None in numbers or not np.isfinite(numbers).all():
        return False
    return name in _OPTIONAL or _BOUNDS[0] <= min(numbers) <= max(numbers) <= _BOUNDS[1]


def _read_column(cells, name: str, ours: str, places, positive: bool) -> np.ndarray:
    """Returns the numbers (N,) of a column, which we call `ours`. Raises UserError that names the
    first bad row.
    """
    values = []
    for place, cell in zip(places, cells, strict=True):
        value = as_number(cell)
        where = f"{place}: {name}"
        if value is None:
            text = "empty" if cell is None or cell == "" else repr(shortened(as_text(cell)))
            raise UserError(f"{where} is {text}; every row needs a number there")
        if not math.isfinite(value):
            term = name if re.fullmatch(r"[\w.]+", name) else ours  # as --select knows it
            raise UserError(
                f'{where} is {value}; leave the row out, as by --select="{term}<1e99", or mark '
                "the run in a column `status` as failed"
            )
        if positive and value <= 0:
            raise UserError(f"{where} is {value:g}; laws are of positive quantities only")
        if positive and not _BOUNDS[0] <= value <= _BOUNDS[1]:
            raise UserError(f"{where} is {value:g}, which is no quantity of a run")
        values.append(value)
    return np.array(values)


def _line(place: str) -> int:
    """Returns the number of the line or row that a place ends with."""
    return int(re.search("[0-9]*$", place)[0] or 0)


def _add_derived(columns, cells, factor: float | None) -> None:
    """Adds flops or tokens to the columns where the others tell it."""
    if factor is None and "d_in" in cells and _is_usable(cells["d_in"], "d_in"):
        widths = distinct(np.array([as_number(cell) for cell in cells["d_in"]]))
        factor = 12 * widths[0] if len(widths) == 1 else None
    if factor is None or "d_sae" not in columns:
        return
    if "flops" not in columns and "tokens" in columns:
        columns["flops"] = factor * columns["d_sae"] * columns["tokens"]
    if "tokens" not in columns and "flops" in columns:
        columns["tokens"] = columns["flops"] / (factor * columns["d_sae"])


def _missing_column(name: str, names: dict[str, str], present: list[str], title: str) -> str:
    """Returns the message for a column that is not there."""
    there = ", ".join(present)
    if name == "loss":
        return f"{title} has no column loss or eval_loss; say --loss=COLUMN (it has {there})"
    hint = f"say --{name}=COLUMN if it is called otherwise"
    if name in ("tokens", "flops"):
        hint += ", or --flops_factor=F where C = F * d_sae * tokens gives it from the others"
    missing = names.get(name, name)
    return f"{title} has no column {missing}, which this law needs; {hint} (it has {there})"
