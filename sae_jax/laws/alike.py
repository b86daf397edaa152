"""Settings: runs that differ by their seed alone, in groups, and the frontier of each group.

A setting is on its group's frontier if no other setting of the group is at least as good in both
metrics, and better in one, by their means.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from sae_jax.errors import UserError, some
from sae_jax.laws.settings import RATES, TARGETS, as_text, in_order, last_part, settings
from sae_jax.tables import as_number

# What a frontier is a path through, which groups need not have alike.
_ALONG = ("k", "sparsity_coefficient", "target_l0", *RATES)
_MOST_PLACES = 5  # at which groups are compared by default


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that differ by their seed alone.

    Attributes:
      group: the group that it is of.
      cells: the columns that tell it from others, by name.
      x: the metric x of each run (R,).
      y: the metric y of each run (R,).
      seeds: the seed of each run, its number where there is no such column.
      on_frontier: whether no setting of its group is better in both means.
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


def columns_apart(cells: dict, metrics: tuple[str, str]) -> list[str]:
    """Returns the columns that tell settings apart, each of several with the same values once.

    Args:
      cells: the columns (N,) of all runs.
      metrics: the columns that are compared.
    """
    names = [
        name
        for name in settings({n: c for n, c in cells.items() if n not in metrics}, {})
        if last_part(name) != "seed"
    ]
    names.sort(key=lambda name: "." in name)  # k rather than sae.k
    different = {}
    for name in names:
        different.setdefault(tuple(map(as_text, cells[name])), name)
    return list(different.values())


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
    return [
        dataclasses.replace(one, on_frontier=not any(_beats(other, one, best) for other in made))
        for one in made
    ]


def _beats(other: Setting, one: Setting, best: str) -> bool:
    """Whether a setting of the same group is at least as good in both means, and better in one."""
    sign = 1 if best == "low" else -1
    x = mean(other.x) - mean(one.x)
    y = sign * (mean(other.y) - mean(one.y))
    return other.group == one.group and x <= 0 and y <= 0 and (x < 0 or y < 0)


def differences(made: list[Setting], by: tuple[str, ...], best: str) -> list[str]:
    """Returns notes on settings, besides sparsity and learning rate, that groups do not share, or
    that make some runs of a group better than others.
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
        elif any(_differ_in(name, one, other) and _beats(other, one, best)
                 for one in made for other in made):  # fmt: skip
            every = some(in_order(set.union(*values.values())), 6)
            notes.append(
                f"runs of a group differ in {name} ({every}), and its frontier takes the best of "
                "them; --by or --select tells them apart"
            )
    return notes


def _differ_in(name: str, one: Setting, other: Setting) -> bool:
    """Whether two settings differ in the column `name` and in no other."""
    names = one.cells.keys() | other.cells.keys()
    return [n for n in names if one.cells.get(n) != other.cells.get(n)] == [name]


def shared_places(made: list[Setting], names: list[str]) -> tuple[float, ...]:
    """Returns powers of two that lie on the frontiers of all groups, or else a place in the middle
    of what they share; () where they share nothing.

    Args:
      made: the settings.
      names: the groups.
    """
    ends = []
    for group in names:
        x = [mean(s.x) for s in made if s.group == group and s.on_frontier]
        ends.append((min(x), max(x)))
    low, high = max(end[0] for end in ends), min(end[1] for end in ends)
    if not 0 < low < high:
        return ()
    powers = [2.0**i for i in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    if len(powers) > _MOST_PLACES:
        few = np.linspace(0, len(powers) - 1, _MOST_PLACES).round()
        powers = [powers[int(place)] for place in few]
    return tuple(powers) or (float(f"{math.sqrt(low * high):.2g}"),)


def between(of_group: list[Setting], place: float, logs: bool) -> np.ndarray:
    """Returns the y at x = `place` of each seed's runs on a group's frontier, interpolated in the
    logarithm of x, and of y with `logs`; seeds without runs on both sides are left out.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for setting in of_group:
        if setting.on_frontier:
            for seed, x, y in zip(setting.seeds, setting.x, setting.y, strict=True):
                curves.setdefault(seed, []).append((x, y))
    values = []
    for points in curves.values():
        x, y = np.array(sorted(points)).T
        if x[0] > 0 and x[0] <= place <= x[-1]:
            value = np.interp(math.log(place), np.log(x), np.log(y) if logs else y)
            values.append(math.exp(value) if logs else value)
    return np.array(values)


def mean(values: np.ndarray) -> float:
    """Returns the mean over seeds."""
    return float(values.mean())


def sd(values: np.ndarray) -> float | None:
    """Returns the standard deviation over seeds; None of one run."""
    return float(values.std(ddof=1)) if len(values) > 1 else None
