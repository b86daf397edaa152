"""Settings: runs that differ by their seed alone, in groups, and the frontier of each group.

A setting is on its group's frontier if no other setting of the group has a better y at the same x,
or a smaller one, by their means. The same x is one within 1%: an L0 of 3.9994 gains nothing on 4.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sae_jax.errors import UserError, some
from sae_jax.laws.settings import RATES, TARGETS, as_text, in_order, last_part, settings
from sae_jax.tables import as_number

SAME_X = 0.01  # relative: of settings with means of x so near, only the best is on a frontier
# What a frontier is a path through, which groups need not have alike.
_ALONG = ("k", "sparsity_coefficient", "target_l0")
# Columns of results.csv with what a run came to, of the fields that a grid sets.
_RESOLVED = {name: "lr" for name in RATES}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that differ by their seed alone.

    Attributes:
      group: the group that it is of.
      cells: the columns that tell it from others, by name.
      x: the metric x of each run (R,).
      y: the metric y of each run (R,).
      seeds: the seed of each run, its number where there is no such column.
      on_frontier: whether no setting of its group has a better y at the same x or a smaller one.
    """

    group: str
    cells: dict[str, str]
    x: np.ndarray
    y: np.ndarray
    seeds: tuple[str, ...]
    on_frontier: bool = False


def groups(cells: dict, by: tuple[str, ...]) -> list[str]:
    """Returns the groups that the rows make, numbers in ascending order and before words."""
    places = [{value: i for i, value in enumerate(in_order(map(as_text, cells[n])))} for n in by]
    rows = zip(*(map(as_text, cells[name]) for name in by), strict=True)
    keys = set(rows) if by else {()}
    ordered = sorted(keys, key=lambda key: [place[v] for place, v in zip(places, key, strict=True)])
    return [group_name(by, key) for key in ordered]


def group_name(by: tuple[str, ...], values: Sequence[str]) -> str:
    """Returns the name of a group with these values of the columns `by`: "topk, d_sae 512"."""
    named = zip(by, values, strict=True)
    return ", ".join(v if as_number(v) is None else f"{last_part(n)} {v}" for n, v in named)


def columns_apart(cells: dict, metrics: tuple[str, str], by: tuple[str, ...] = ()) -> list[str]:
    """Returns the columns that tell settings apart.

    Of several with the same values it returns one, and no field of a grid, such as train.tokens,
    beside the column that says what it came to, such as tokens.

    Args:
      cells: the columns (N,) of all runs.
      metrics: the columns that are compared.
      by: the columns that make the groups, which are preferred.
    """
    names = [
        name
        for name in settings({n: c for n, c in cells.items() if n not in metrics}, {})
        if last_part(name) != "seed"
    ]
    names.sort(key=lambda name: (name not in by, "." in name))  # k rather than sae.k
    texts = {name: tuple(map(as_text, cells[name])) for name in names}
    kept: list[str] = []
    for name in names:
        # A coefficient that a run ended at is no setting's, and stands for no field.
        if not any(texts[name] == texts[other] for other in kept) and not any(
            _named(name) == _named(other) != "sparsity_coefficient"
            and _says(texts[other], texts[name])
            for other in kept
        ):
            kept.append(name)
    return kept


def _named(column: str) -> str:
    """Returns the last part of a column's name, lr for learning_rate."""
    return _RESOLVED.get(last_part(column), last_part(column))


def _says(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether runs (N,) with the same text in one column have the same in another, or none."""
    pairs = {(a, b) for a, b in zip(one, other, strict=True) if b != "none"}
    return len(pairs) == len({a for a, _ in pairs})


def make_settings(
    rows: list[dict],
    by: tuple[str, ...],
    apart: list[str],
    metrics: tuple[str, str],
    best: str,
    alone: bool,
) -> list[Setting]:
    """Returns the settings of all runs, with those of each group's frontier marked.

    Args:
      rows: the runs.
      by: the columns that make the groups.
      apart: the columns that tell the settings of a group apart.
      metrics: the columns x and y, which hold numbers.
      best: whether "low" or "high" values of y are better.
      alone: whether each run without a seed is a setting of its own.

    Raises UserError where two runs of a setting have one seed, since then they differ by something
    else.
    """
    drawn = [name for name in rows[0] if last_part(name) == "seed"]
    runs: dict[tuple, list[dict]] = {}
    for number, row in enumerate(rows):
        group = group_name(by, [as_text(row[name]) for name in by])
        cells = {name: as_text(row[name]) for name in dict.fromkeys((*by, *apart))}
        adapted = any(row.get(name) not in (None, "") for name in TARGETS)
        # What the coefficient ended at is the run's, not its setting's.
        if adapted and "sparsity_coefficient" not in by:
            cells.pop("sparsity_coefficient", None)
        own = number if alone and not drawn else None
        runs.setdefault((group, tuple(cells.items()), own), []).append(row)
    made = []
    for (group, cells, _), these in runs.items():
        seeds = tuple(
            " ".join(as_text(row[name]) for name in drawn) if drawn else str(number)
            for number, row in enumerate(these)
        )
        twice = [value for value in dict.fromkeys(seeds) if seeds.count(value) > 1]
        if twice:
            alike = ", ".join(name for name, _ in cells) or "all settings"
            raise UserError(
                f"{seeds.count(twice[0])} runs of {group or 'the results'} have one seed and are "
                f"alike in {alike}, so that they differ by something else; --alike=COLUMNS says in "
                "which columns runs of one setting are alike"
            )
        x, y = (np.array([row[name] for row in these]) for name in metrics)
        made.append(Setting(group, dict(cells), x, y, seeds))
    best_of = _frontiers(made, best)
    return [dataclasses.replace(one, on_frontier=at in best_of) for at, one in enumerate(made)]


def _frontiers(made: list[Setting], best: str) -> set[int]:
    """Returns the places of the settings on their groups' frontiers.

    A setting is beaten by one that is on the frontier itself, so that of many settings, each within
    1% of the next, some stay.
    """
    sign = 1 if best == "low" else -1
    kept: list[int] = []
    for at in sorted(range(len(made)), key=lambda i: (sign * mean(made[i].y), mean(made[i].x))):
        if not any(_beats(made[other], made[at], best) for other in kept):
            kept.append(at)
    return set(kept)


def _beats(other: Setting, one: Setting, best: str) -> bool:
    """Whether a setting of the same group has a better mean y at the same mean x, or a smaller x
    and as good a y.
    """
    sign = 1 if best == "low" else -1
    x, y = mean(one.x), sign * (mean(other.y) - mean(one.y))
    if other.group != one.group or y > 0:
        return False
    return mean(other.x) <= x + SAME_X * abs(x) if y < 0 else mean(other.x) < x


def differences(made: list[Setting], by: tuple[str, ...], best: str) -> list[str]:
    """Returns notes on settings, besides sparsity, that groups do not share, or that make some runs
    of a group better than others, which of learning rates goes without saying.
    """
    notes = []
    for name in dict.fromkeys(name for setting in made for name in setting.cells):
        if name in by or last_part(name) in _ALONG:
            continue
        values: dict[str, set[str]] = {}
        for setting in made:
            values.setdefault(setting.group, set()).add(setting.cells.get(name, "none"))
        if len(set(map(frozenset, values.values()))) > 1:
            said = "; ".join(f"{group}: {some(in_order(v), 4)}" for group, v in values.items())
            notes.append(f"the groups differ in {name} too ({said})")
        elif last_part(name) not in RATES and any(
            _differ_in(name, one, other) and _beats(other, one, best)
            for one in made
            for other in made
        ):
            every = some(in_order(set.union(*values.values())), 6)
            notes.append(
                f"runs of a group differ in {name} ({every}), and its frontier takes the best of "
                "them; --by or --select tells them apart"
            )
    return notes


def _differ_in(name: str, one: Setting, other: Setting) -> bool:
    """Whether two settings differ in the column `name` and in no other but a learning rate, which
    may follow it.
    """
    names = [n for n in one.cells.keys() | other.cells.keys() if last_part(n) not in RATES]
    return [n for n in names if one.cells.get(n) != other.cells.get(n)] == [name]


def mean(values: np.ndarray) -> float:
    """Returns the mean over seeds."""
    return float(values.mean())


def sd(values: np.ndarray) -> float | None:
    """Returns the standard deviation over seeds; None of one run."""
    return float(values.std(ddof=1)) if len(values) > 1 else None
