"""Grids: which runs a sweep has, as assignments to dotted fields of its base config.

A grid is a list of {"section.field": value}, one for each run, in the order in which the runs are
listed. `sweep` makes one; `product`, `zipped` and `chain` combine them:

    grid.product(grid.sweep("sae.d_sae", [512, 1024]), grid.sweep("train.seed", range(3)))

The other functions are designs of papers. All of them raise UserError for an unknown field, for a
value of another type, for a field that two combined grids both set, and for an assignment that
comes twice.
"""

import collections
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sae_jax import config as configs
from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.sae.registry import by_name

Assignment = dict[str, object]
Grid = list[Assignment]


def sweep(field: str, values: Iterable) -> Grid:
    """Returns a grid of one run for each value of a field.

    Raises UserError where there is no value, and for a field of the mesh, which says where a run is
    trained and not which run it is.
    """
    values = list(values)
    if not values:
        raise UserError(f"the sweep of {field} has no values")
    if field.startswith("mesh."):
        raise UserError(f"{field} cannot be swept: it says where a run is trained, not which it is")
    return _checked([{field: value} for value in values])


def product(*grids: Grid) -> Grid:
    """Returns a grid of every combination; the last of `grids` varies fastest."""
    return _distinct([_merged(parts) for parts in itertools.product(*grids)])


def zipped(*grids: Grid) -> Grid:
    """Returns a grid of the first runs of all `grids` together, of the second ones, and so on.

    Raises UserError unless all have the same length.
    """
    lengths = [len(grid) for grid in grids]
    if len(set(lengths)) > 1:
        raise UserError(f"zipped grids must be of the same length, not {lengths}")
    return _distinct([_merged(parts) for parts in zip(*grids, strict=True)])


def chain(*grids: Grid) -> Grid:
    """Returns a grid of one grid's runs after the other's.

    A field that only some grids set keeps the base config's value in the others.
    """
    return _distinct(list(itertools.chain(*grids)))


def apply(config: Config, assignment: Assignment) -> Config:
    """Returns `config` with the assignment's fields set."""
    return configs.assign(config, assignment)


def fields(grid: Grid) -> list[str]:
    """Returns every field that the grid sets, in order of appearance."""
    return list(dict.fromkeys(itertools.chain(*grid)))


def shared(grid: Grid) -> Assignment:
    """Returns what all runs of the grid set alike."""
    first, *others = grid
    return {f: v for f, v in first.items() if all(run.get(f) == v for run in others)}


def without(assignment: Assignment, other: Assignment) -> Assignment:
    """Returns the assignment without the fields that `other` sets."""
    return {field: value for field, value in assignment.items() if field not in other}


def describe(assignment: Assignment) -> str:
    """Returns the assignment as text, with numbers in six digits."""
    words = [
        f"{field}={value:.6g}" if isinstance(value, float) else f"{field}={value}"
        for field, value in assignment.items()
    ]
    return " ".join(words) or "the base config"


def names(grid: Grid) -> list[str]:
    """Returns a short name for each run, such as "d_sae=1024,seed=1".

    It has the fields, in the grid's order, that tell the runs from each other, and no more. A name
    needs no quotes in a shell. Assignments of the grid must differ.
    """
    kept: list[str] = []
    groups = 1
    for field in fields(grid):
        values = {tuple(repr(run.get(f)) for f in (*kept, field)) for run in grid}
        if len(values) > groups:
            kept, groups = [*kept, field], len(values)
    short = [field.rpartition(".")[2] for field in kept]
    labels = {f: s if short.count(s) == 1 else f for f, s in zip(kept, short, strict=True)}
    made = [
        ",".join(f"{labels[f]}={plain(run[f])}" for f in kept if f in run) or "base" for run in grid
    ]
    alike = collections.Counter(made)  # texts that differ in characters that names do not have
    return [name if alike[name] == 1 else f"{name}.{i}" for i, name in enumerate(made)]


def plain(value: object) -> str:
    """Returns a value as names have it: as text without what a shell or a file's name would not
    take."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "_", text)


# ------------------------------------------------------------- designs of the papers


def isoflop(
    budgets: Sequence[float],
    d_sae: Sequence[int],
    *,
    d_in: int,
    d_out: int | None = None,
    batch_size: int,
) -> Grid:
    """Returns a grid of every compute budget C with every dictionary size n.

    A run has C / (6 n (d_in + d_out)) tokens, rounded to whole batches; that is C / (12 n d) for an
    autoencoder (Templeton et al. 2024, "Scaling Monosemanticity", Scaling Laws; Hoffmann et al.
    2022, approach 2).

    Args:
      budgets: budgets in FLOPs.
      d_sae: dictionary sizes.
      d_in: the width of the activations.
      d_out: the width of what is reconstructed; d_in by default.
      batch_size: tokens of a batch.

    Raises UserError where a run has less than 100 batches, because the runs of a budget would then
    differ in compute by more than half a percent.
    """
    grid = []
    for budget, size in itertools.product(budgets, d_sae):
        steps = round(budget / (6 * size * (d_in + (d_out or d_in))) / batch_size)
        if steps < 100:
            raise UserError(
                f"a budget of {budget:.3g} FLOPs is only {steps} batches of {batch_size} tokens at "
                f"d_sae {size}; give larger budgets or smaller sizes, or a smaller batch_size"
            )
        grid.append({"sae.d_sae": size, "train.tokens": steps * batch_size})
    return _checked(grid)


def nk(d_sae: Sequence[int], k: Sequence[int]) -> Grid:
    """Returns a grid of every dictionary size with every k, for a law L(n, k) (Gao et al. 2024,
    section 3.1.3).
    """
    return product(sweep("sae.d_sae", d_sae), sweep("sae.k", k))


def sparsity_frontier(settings: Mapping[str, Sequence[float]]) -> Grid:
    """Returns a grid of sparsities by architecture (Rajamanoharan et al. 2024, figure 2).

    Args:
      settings: values by architecture, such as {"topk": [16, 32], "relu": [2.0, 5.0]}. They are k
        where the architecture has one, and sparsity coefficients elsewhere.
    """
    grid = []
    for name, values in settings.items():
        used = "sae.sparsity_coefficient" if by_name(name).Config.k is None else "sae.k"
        grid += [{"sae.architecture": name, used: value} for value in values]
    return _checked(grid)


def learning_rates(grid: Grid, rate: float, *, at: int, factors: Sequence[float] = (1.0,)) -> Grid:
    """Returns a grid with learning rates that follow the dictionary size.

    The rate of a run is rate * (d_sae / at)^-0.5 (Gao et al. 2024, A.3: proportional to 1 /
    sqrt(n)).

    Args:
      grid: a grid that sets sae.d_sae.
      rate: the rate that was found best at the size `at`.
      at: that size.
      factors: factors of the rate. More than one make a sweep of rates for each size, around where
        the rule puts it.
    """
    for assignment in grid:
        if "sae.d_sae" not in assignment:
            raise UserError(
                f"learning_rates follows sae.d_sae, which the grid does not set for "
                f"{describe(assignment)}"
            )
    rates = [
        {**run, "optimizer.learning_rate": factor * rate * (run["sae.d_sae"] / at) ** -0.5}
        for run in grid
        for factor in factors
    ]
    return _checked(rates)


def budgets(
    tokens: Sequence[int],
    *,
    batch_size: int,
    warmup_tokens: int,
    decay_fraction: float = 0.2,
    sparsity_warmup_tokens: int | None = None,
) -> Grid:
    """Returns a grid of token budgets that share a trunk (Hagele et al. 2024).

    They have the warm-up/stable/decay schedule, with a warm-up of the same number of steps, so that
    all are one run until the smaller ones decay.

    Args:
      tokens: the budgets in tokens.
      batch_size: tokens of a batch.
      warmup_tokens: tokens of the warm-up of the learning rate.
      decay_fraction: the fraction of a run in which the rate decays.
      sparsity_warmup_tokens: tokens of the warm-up of the sparsity coefficient, for architectures
        that have one (relu, gated, jumprelu).

    Raises UserError where a budget begins to decay before a warm-up has ended.
    """
    warmup = round(warmup_tokens / batch_size)
    sparsity_warmup = sparsity_warmup_tokens and round(sparsity_warmup_tokens / batch_size)
    grid = []
    for budget in tokens:
        steps = int(budget) // batch_size
        stable = steps - round(decay_fraction * steps)
        if stable < max(warmup, sparsity_warmup or 0, 1):
            raise UserError(
                f"a budget of {budget} tokens begins to decay after {stable} steps of {batch_size} "
                f"tokens, before the warm-up of {max(warmup, sparsity_warmup or 0)} steps has "
                "ended; give larger budgets or a shorter warm-up"
            )
        run = {
            "train.tokens": steps * batch_size,
            "optimizer.schedule": "warmup_stable_decay",
            "optimizer.warmup_fraction": warmup / steps,
            "optimizer.decay_fraction": decay_fraction,
        }
        if sparsity_warmup is not None:
            run["sae.sparsity_warmup_fraction"] = sparsity_warmup / steps
        grid.append(run)
    return _checked(grid)


def _checked(grid: Grid) -> Grid:
    """Returns the grid with every field known and every value of its field's type.

    NumPy's numbers become Python's.
    """
    return _distinct([{field: _value(field, v) for field, v in run.items()} for run in grid])


def _value(field: str, value):
    return configs.typed_field(field, value.item() if isinstance(value, np.generic) else value)


def _merged(parts: Iterable[Assignment]) -> Assignment:
    """Returns several assignments as one. Raises UserError for a field that two of them set."""
    merged: Assignment = {}
    for part in parts:
        for field, value in part.items():
            if field in merged:
                raise UserError(
                    f"{field} is set twice, to {merged[field]!r} and to {value!r}: two grids that "
                    "are combined must set different fields"
                )
            merged[field] = value
    return merged


def _distinct(grid: Grid) -> Grid:
    """Returns the grid. Raises UserError for an assignment that comes twice."""
    seen = set()
    for assignment in grid:
        key = tuple(sorted(assignment.items()))
        if key in seen:
            raise UserError(f"{describe(assignment)} comes twice in the grid")
        seen.add(key)
    return grid
