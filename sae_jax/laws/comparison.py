"""Compares runs by two of their metrics, such as FVU against L0, group by group.

Runs that differ by their seed alone are one setting, whose metrics have a mean and a spread. The
settings of a group that no other setting of it beats in both metrics are its frontier, and groups
are compared where they have the same L0, by their frontiers there or in between.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from sae_jax import paths, plots, typeset
from sae_jax.errors import UserError, choose, known_arguments, nearest, some
from sae_jax.json_files import read_json
from sae_jax.laws import comparison_figure, labels
from sae_jax.laws.alike import (
    Setting,
    columns_apart,
    differences,
    groups,
    make_settings,
    mean,
    sd,
)
from sae_jax.laws.equal_x import at_place, not_reached, off_frontier, shared_places
from sae_jax.laws.run_rows import Row, finished
from sae_jax.laws.settings import SOURCE, TARGETS, as_text, meant_column
from sae_jax.paths import AnyPath
from sae_jax.progress_bar import progress
from sae_jax.tables import as_number
from sae_jax.train.evaluated_rows import unlike_evaluations
from sae_jax.train.results import NEAR_TARGET
from sae_jax.typeset import Math

FILES = ("compare.csv", "compare.png", "table.md", "table.tex", "frontier.tex")
BEST = ("low", "high")
_GROUPS = ("architecture", "kind", SOURCE, "site", "d_sae", "k")  # the first that varies
_L0 = ("eval_l0", "l0")
# Words in the name of a metric that say which values are better.
_LOW = {"fvu", "loss", "mse", "spliced", "kl", "dead", "l0", "l1", "error", "perplexity"}
_HIGH = {
    "recovered", "explained", "cosine", "accuracy", "acc", "auc", "auroc", "f1", "mcc", "mmcs",
    "precision", "recall", "r2",
}  # fmt: skip
_SECTIONS = ("reconstruction", "sparsity", "language_model", "recovery")  # of eval.json
_MOST_GROUPS = 24
_ALL = "all"  # what a table calls the only group
_LATEX = "% needs \\usepackage{booktabs}; means and standard deviations over seeds\n"

_Table = tuple[list[str], list[list[str]]]  # head and rows


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Groups of runs, compared by `compare`.

    Attributes:
      source: what the runs are from.
      x: the column of the first metric, of which less is better.
      y: that of the second.
      best: whether "low" or "high" values of y are better.
      by: the columns that make the groups.
      groups: the names of the groups, in order.
      settings: the settings of every group, in order of x.
      at: the values of x at which groups are compared.
      values: for each group and value of `at` the y of each seed there, as `equal_x.at_place` says;
        an empty array where the group's frontier does not reach it.
      notes: what was left out, and what to doubt.
    """

    source: str
    x: str
    y: str
    best: str
    by: tuple[str, ...]
    groups: tuple[str, ...]
    settings: tuple[Setting, ...]
    at: tuple[float, ...]
    values: dict[str, tuple[np.ndarray, ...]]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        """The table and the notes, which is what a notebook shows."""
        return "\n".join([self.as_markdown(), *(f"note: {note}" for note in self.notes)])

    @property
    def rows(self) -> list[dict]:
        """A dict for each setting, as compare.csv has it: its group and settings, the number of its
        runs, mean and standard deviation of x and y, and whether it is on the frontier.
        """
        return [
            {"group": setting.group}
            | setting.cells
            | {"runs": len(setting.x)}
            | {self.x: mean(setting.x), f"{self.x}_sd": sd(setting.x)}
            | {self.y: mean(setting.y), f"{self.y}_sd": sd(setting.y)}
            | {"frontier": int(setting.on_frontier)}
            for setting in self.settings
        ]

    def as_markdown(self) -> str:
        """Returns the groups at equal x, and the settings on the frontiers, as Markdown tables."""
        return "\n".join(typeset.as_markdown(*table) for table in self._tables())

    def as_latex(self) -> str:
        """Returns the same tables as LaTeX, which needs the package booktabs."""
        return _LATEX + "\n".join(typeset.as_latex(*table) for table in self._tables())

    def figure(self):
        """Returns the figure, drawn in the style that is set (`plots.paper`)."""
        return comparison_figure.draw(self)

    def save(
        self, out: str | AnyPath, figures: Sequence[str] = (), style: str | None = None
    ) -> None:
        """Writes compare.csv, compare.png, table.md, table.tex and frontier.tex to a directory.

        table.tex has the groups at equal x, frontier.tex the settings on their frontiers.

        Args:
          out: the directory, made if absent.
          figures: more files for the figure, which end in .pdf, .svg or .png.
          style: a matplotlib style for the figures, one that `plots.paper` takes.

        Raises UserError, before anything is written, where `out` holds files of others, and where
        the figure cannot be drawn in that style.
        """
        out = paths.path(out)
        check_out(out)
        drawn = {
            file: plots.rendered(self.figure, str(file), style)
            for file in (*map(paths.path, figures), out / "compare.png")
        }
        names = dict.fromkeys(name for row in self.rows for name in row)
        out.mkdir(parents=True, exist_ok=True)
        paths.write(out / "compare.csv", typeset.as_csv(list(names), self.rows))
        paths.write(out / "table.md", self.as_markdown())
        at_equal_x = self._at_equal_x() if self.at else None
        alone = typeset.as_latex(*at_equal_x) if at_equal_x else "% no x is shared by all groups\n"
        paths.write(out / "table.tex", _LATEX + alone)
        paths.write(out / "frontier.tex", _LATEX + typeset.as_latex(*self._on_frontiers()))
        for file, content in drawn.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            paths.write(file, content)

    def _tables(self) -> list[_Table]:
        return [*([self._at_equal_x()] if self.at else []), self._on_frontiers()]

    def _at_equal_x(self) -> _Table:
        """Returns the head and the cells of the table of groups at equal x."""
        x, y = labels.short(self.x), labels.short(self.y)
        head = [self._what, *(f"{y} at {x} = {place:g}" for place in self.at)]
        body = []
        for group in self.groups:
            seeds = {
                seed
                for s in self.settings
                if s.group == group and s.on_frontier
                for seed in s.seeds
            }
            cells = [_cell(found, len(seeds)) for found in self.values[group]]
            body.append([group or _ALL, *cells])
        return head, body

    def _on_frontiers(self) -> _Table:
        """Returns the head and the cells of the table of settings on the groups' frontiers."""
        best = [setting for setting in self.settings if setting.on_frontier]
        telling = [
            name
            for name in dict.fromkeys(name for setting in best for name in setting.cells)
            if name not in self.by and len({s.cells.get(name, "none") for s in best}) > 1
        ]
        x, y = labels.short(self.x), labels.short(self.y)
        head = [self._what, *map(labels.short, telling), "runs", x, y]
        body = [
            [setting.group or _ALL]
            + [_shown(setting.cells.get(name, "none")) for name in telling]
            + [str(len(setting.x)), _cell(setting.x), _cell(setting.y)]
            for setting in best
        ]
        return head, body

    @property
    def _what(self) -> str:
        """What the groups are, for the head of a table."""
        return ", ".join(labels.short(name) for name in self.by) or "group"


@known_arguments
def compare(
    results,
    y: str | None = None,
    x: str | None = None,
    *,
    by: str | Sequence[str] | None = None,
    select: str = "",
    best: str | None = None,
    at: Sequence[float] | None = None,
    alike: str | Sequence[str] | None = None,
) -> Comparison:
    """Compares groups of finished runs by two metrics.

    Args:
      results: what `sae_jax.laws.read` takes: a sweep, a table, or several.
      y: a column, such as eval_fvu (the default), a probing score, or, of sweeps, a number in the
        runs' eval.json, such as ce_recovered_zero.
      x: a column of which less is better; L0 by default.
      by: the column or columns (with commas between them) whose values make the groups; by default
        the first of architecture, kind, results (the table), site, d_sae and k that varies, k where
        x is no L0.
      select: conditions that runs must meet, such as "d_sae=16384 eval_l0<60".
      best: whether "low" or "high" values of y are better; by default what its name says.
      at: values of x at which groups are compared; by default powers of two that all groups reach
        within 5%.
      alike: the columns in which runs of one setting are alike; by default all that are settings
        but for seeds. Without it and without a column of seeds every run is a setting of its own.

    Raises UserError for a column that is not there, where no run has both metrics, and where no
    group reaches any of the places `at`.
    """
    title, rows, notes = finished(results, select=select)
    if not rows:
        raise UserError(f"{title} has no rows of finished runs, so there is nothing to compare")
    rows, note = _with_evaluations(title, rows, [name for name in (x, y) if name])
    notes += note
    x = _metric(rows, x, _L0, "x", title)
    y = _metric(rows, y, ("eval_fvu", "fvu"), "y", title)
    best = choose(best, BEST, "--best") if best else _direction(y)
    rows, note = _measured(rows, (x, y), title)
    notes += [*note, *_missed_targets(rows)]
    cells = {name: [row[name] for row in rows] for name in rows[0]}
    by = _grouping(cells, by, x, title)
    order = groups(cells, by)
    if len(order) > _MOST_GROUPS:
        raise UserError(
            f"--by={','.join(by)} makes {len(order)} groups, and more than {_MOST_GROUPS} cannot "
            "be told apart; choose another column, or --select some"
        )
    if alike is None:
        apart = columns_apart(cells, (x, y), by)
    else:
        apart = list(_names(alike, cells, "alike", title))
    made = make_settings(rows, by, apart, (x, y), best, alone=alike is None)
    made.sort(key=lambda setting: (order.index(setting.group), mean(setting.x)))
    notes += differences(made, by, best)
    given = at is not None and len(at) > 0
    at = tuple(map(float, at)) if given else shared_places(made, order)
    if not all(0 < place < math.inf for place in at):
        asked = ",".join(f"{place:g}" for place in at)
        raise UserError(f"--at={asked}: places are positive numbers")
    logs = best == "low" and all((setting.y > 0).all() for setting in made)
    values = {group: tuple(at_place(made, group, place, logs) for place in at) for group in order}
    notes += not_reached(values, at, made, labels.short(x), given)
    notes += off_frontier(made, order, labels.short(x), labels.short(y))
    return Comparison(title, x, y, best, by, tuple(order), tuple(made), at, values, tuple(notes))


def check_out(out: str | AnyPath) -> None:
    """Raises UserError where a comparison's directory cannot be made, or holds files of another
    program under the names of a comparison's.
    """
    out = paths.path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; give a directory")
    theirs = next((out / name for name in FILES if (out / name).exists()), None)
    ours = theirs and theirs.name == "compare.csv" and theirs.read_bytes().startswith(b"group,")
    if theirs and not ours:
        raise UserError(f"{theirs} is not of sae-jax compare; give another --out")


def _with_evaluations(
    title: str, rows: list[Row], wanted: list[str]
) -> tuple[list[dict], list[str]]:
    """Returns the rows' cells, with the numbers of the runs' eval.json where a metric that is
    wanted is no column of the results, and a note where these are of different numbers of rows.
    """
    cells = [row for _, row in rows]
    there = all(cells[0].keys() & {name, f"eval_{name}"} for name in wanted)
    if there or "run_id" not in cells[0]:
        return cells, []
    joined, counts = [], []
    for row in progress(cells, "reading eval.json of the runs", len(cells), "run"):
        runs = paths.path(row.get(SOURCE) or title) / "runs"
        file = paths.inside(runs, str(row["run_id"])) / "eval.json"
        evaluation = read_json(file, default={})
        about = evaluation.get("settings")
        if isinstance(about, dict) and about.get("result", "") is None:
            evaluation = {}  # it is of a checkpoint before the run had its result
        sections = [evaluation.get(name) for name in _SECTIONS]
        numbers = {
            name: value
            for section in sections
            if isinstance(section, dict)
            for name, value in section.items()
            if isinstance(value, int | float)
        }
        joined.append(numbers | row)
        counts.append({"eval_rows": evaluation.get("rows")})
    names = dict.fromkeys(name for row in joined for name in row)
    unlike = unlike_evaluations(counts)
    notes = [f"of eval.json, {unlike}"] if unlike else []
    return [{name: row.get(name) for name in names} for row in joined], notes


def _metric(
    rows: list[dict], name: str | None, usual: tuple[str, ...], flag: str, title: str
) -> str:
    """Returns the column of a metric, as the user says or the first of the usual ones that is
    there.

    Raises UserError, which names the columns of numbers that there are.
    """
    there = [
        column for column in rows[0] if any(as_number(row[column]) is not None for row in rows)
    ]
    for column in (name, f"eval_{name}") if name else usual:
        if column in there:
            return column
    what = f"no column {name}" if name else f"neither column {' nor '.join(usual)}"
    hint = f"{nearest(name, there)} " if name and "mean" in nearest(name, there) else ""
    if name and name.startswith(("ce_", "kl_")):
        hint = "sae-jax eval --model=MODEL measures it for runs; "
    raise UserError(f"--{flag}: {title} has {what} of numbers; {hint}it has {some(there, 40)}")


def _direction(y: str) -> str:
    """Returns which values of a metric are better, as its name says."""
    words = set(re.split(r"[^a-z0-9]+", y.lower()))
    for best, known in (("high", _HIGH), ("low", _LOW)):  # recovered loss is a good thing
        if words & known:
            return best
    raise UserError(f"whether more or less of {y} is better is not known; say --best=high or low")


def _measured(rows: list[dict], metrics: tuple[str, str], title: str):
    """Returns the rows with numbers of both metrics in place of their cells, and a note on the
    others.
    """
    kept = []
    for row in rows:
        numbers = {name: as_number(row[name]) for name in metrics}
        if all(value is not None and math.isfinite(value) for value in numbers.values()):
            kept.append(row | numbers)
    if not kept:
        raise UserError(f"{title} has no run with numbers of both {' and '.join(metrics)}")
    left = len(rows) - len(kept)
    note = f"{left} of {len(rows)} runs are left out, without {' or '.join(metrics)}"
    return kept, [note] if left else []


def _names(columns: str | Sequence[str], cells: dict, flag: str, title: str) -> tuple[str, ...]:
    """Returns the columns that a flag names. Raises UserError, which names those that there are."""
    columns = columns.split(",") if isinstance(columns, str) else columns
    columns = [meant_column(name, cells) for name in columns]
    for name in columns:
        if name not in cells:
            raise UserError(
                f"--{flag}: {title} has no column {name}; it has {some(list(cells), 40)}"
            )
    return tuple(columns)


def _missed_targets(rows: list[dict]) -> list[str]:
    """Returns a note on runs whose L0 is not what was asked of them."""
    missed, adapted = {}, 0
    for row in rows:
        known = [[as_number(row.get(name)) for name in names] for names in (TARGETS, _L0)]
        target, l0 = (next((value for value in values if value), None) for values in known)
        if target is not None and l0 is not None:
            adapted += 1
            if abs(l0 / target - 1) > NEAR_TARGET:
                missed.setdefault(target, []).append(l0)
    if not missed:
        return []
    texts = {target: [f"{l0:.3g}" for l0 in missed[target]] for target in sorted(missed)}
    said = "; ".join(f"{target:g} came to {some(l0, 4)}" for target, l0 in texts.items())
    return [
        f"{sum(map(len, missed.values()))} of {adapted} runs with a target_l0 missed it by more "
        f"than {NEAR_TARGET:.0%} ({said}), and count with the L0 that they have"
    ]


def _grouping(cells: dict, by, x: str, title: str) -> tuple[str, ...]:
    """Returns the columns that make the groups.

    By itself k makes none where x is an L0, which is k or follows it.
    """
    if by:
        return _names(by, cells, "by", title)
    usual = [name for name in _GROUPS if name != "k" or x not in _L0]
    known = [name for name in (meant_column(name, cells) for name in usual) if name in cells]
    varies = [name for name in known if len(set(map(as_text, cells[name]))) > 1]
    return tuple(varies[:1])


def _shown(text: str) -> str:
    """Returns a setting for a table: a number to four digits, nothing for none."""
    number = as_number(text)
    if number is None:
        return "" if text == "none" else text
    return text if number.is_integer() else f"{number:.4g}"


def _cell(values: np.ndarray, seeds: int = 0) -> str:
    """Returns mean and standard deviation for a table, the latter to two digits, and of how many of
    `seeds` they are where it is not all.
    """
    if not len(values):
        return Math("")
    middle, spread = mean(values), sd(values)
    if not spread or spread <= 1e-12 * abs(middle):  # rounding's
        text = f"{middle:.4g}"
    else:
        decimals = max(0, 1 - math.floor(math.log10(spread)))
        text = f"{middle:.{decimals}f} ± {spread:.{decimals}f}"
    return f"{text} ({len(values)} of {seeds} seeds)" if len(values) < seeds else Math(text)
