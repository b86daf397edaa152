"""Tells which columns of a table are settings of its runs, and which vary beside a law.

A law that is fitted to runs which differ in something it does not know follows their mixture. What
a column is, its name tells in a sweep's results.csv. In other tables a column whose values repeat
is a setting, and one of which nearly every run has a value of its own is taken for a measurement.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sae_jax.errors import some
from sae_jax.tables import as_number

SOURCE = "results"  # the column that says which of several tables a row is of
RATES = ("lr", "learning_rate")
TARGETS = ("target_l0", "sae.target_l0")
_NO_SETTINGS = ("run_id", "status", SOURCE, "dead_fraction")
_QUANTITIES = ("d_sae", "tokens", "k")
_MADE_WITH = ("k", "target_l0", "sparsity_coefficient", *RATES)
_OF_SWEEPS = (  # the settings in results.csv, beside the fields that the grid sets
    "architecture", "kind", "site", "d_in", "d_sae", "k", "sparsity_coefficient", "target_l0",
    "seed", "lr", "tokens", "branched_from",
)  # fmt: skip
_OWN = 0.5  # the part of the runs with values of their own from which a column is no setting
_PROPORTIONAL = 0.02  # relative: what rounding to whole batches leaves of proportionality
_SHOWN = 8  # values that a warning shows
_LONGEST = 40  # characters of a value

Cells = Mapping[str, Sequence]


def as_text(cell) -> str:
    """Returns a cell as text on one line.

    Numbers that are equal to six digits have one text, whole ones if they are equal; an empty cell
    is "none".
    """
    if cell is None or cell == "":
        return "none"
    number = as_number(cell)
    if number is not None and math.isfinite(number):
        return str(int(number)) if number.is_integer() and abs(number) < 2**53 else f"{number:.6g}"
    return " ".join(str(cell).split())


def shortened(text: str) -> str:
    """Returns a cell's text for a message, cut where it is long."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def in_order(texts: Iterable[str]) -> list[str]:
    """Returns the different texts in order: numbers by their size, then words."""
    numbers = {text: as_number(text) for text in set(texts)}
    return sorted(numbers, key=lambda text: (numbers[text] is None, numbers[text] or 0.0, text))


def settings(cells: Cells, names: dict[str, str]) -> list[str]:
    """Returns the columns that are settings of the runs and that vary.

    Args:
      cells: the columns (N,) by the file's names.
      names: what the file calls columns, by our names.
    """
    return [name for name, kind in _kinds(cells, names).items() if kind == "setting"]


def varying(cells: Cells, names: dict[str, str], known: dict[str, np.ndarray]) -> dict[str, dict]:
    """Returns the columns that vary and that a law does not know, as fit.json shows them.

    Left out are the columns that the law's own give: those proportional to one of them or to a
    product of them, unless they say how a dictionary is made (k, a target, a learning rate). A
    column that a table has twice, as sae.d_sae beside d_sae, is told once. A law of compute alone
    is of sizes and tokens that vary along it, so that these follow compute.

    Args:
      cells: the columns (N,) of the fitted runs by the file's names.
      names: what the file calls columns, by our names.
      known: the columns (N,) that the law knows, by the file's names.

    Returns:
      For each column a dict: `values`, or `range` of a measurement's numbers; `is`, which is
      "setting", "measured" or "repetition", the last for seeds; and `follows`, the law's column
      that decides the value, None where none does.
    """
    out = {}
    ours = {column: name for name, column in names.items()}
    compute = names.get("flops", "flops")
    axes = (
        [names.get(name, name) for name in ("d_sae", "tokens")] if set(known) == {compute} else []
    )
    deciding = {name: _numbers(cells[name]) for name in axes if name in cells}
    deciding = known | {name: values for name, values in deciding.items() if values is not None}
    for name, kind in _kinds(cells, names).items():
        texts = [as_text(cell) for cell in cells[name]]
        numbers = [as_number(cell) for cell in cells[name]]
        is_made = last_part(ours.get(name, name)) in _MADE_WITH
        is_given = not is_made and None not in numbers and _is_given(np.array(numbers), known)
        if name in known or is_given or _is_twice(name, cells):
            continue
        follows = [
            column for column, values in deciding.items() if _decides(values, texts, numbers)
        ]
        if name in axes:
            follows = [compute]
        elif any(last_part(name) == last_part(column) for column in follows):
            continue  # train.tokens beside tokens, which are whole batches
        kind = "repetition" if last_part(name) == "seed" else kind
        out[name] = {"is": kind, "follows": follows[0] if follows else None}
        if kind == "measured" and None not in numbers:
            out[name]["range"] = [min(numbers), max(numbers)]
        else:
            out[name]["values"] = in_order(texts)
    return out


def warnings(law: str, found: dict[str, dict]) -> list[str]:
    """Returns what to doubt because of columns that vary, in words.

    Args:
      law: the law's name.
      found: what `varying` returned.
    """
    out = []
    apart, together, own = [], [], []
    for name, column in found.items():
        if column["is"] == "measured":
            ends = column.get("range")
            own.append(f"{name} ({ends[0]:.4g} to {ends[1]:.4g})" if ends else name)
        elif column["is"] == "setting":
            values = some([shortened(value) for value in column["values"]], _SHOWN)
            if column["follows"]:
                together.append(f"{name} ({values}) with {column['follows']}")
            else:
                apart.append(f"{name} ({values})")
    if apart:
        out.append(
            f"the runs differ in {'; in '.join(apart)}, which {law} does not know: it is one law "
            "through all of them; --select fits some, --by each"
        )
    if together:
        out.append(f"the runs change {'; '.join(together)}: the law's exponents hold for both")
    if own:
        out.append(
            f"nearly every run has its own {', '.join(own)}: taken for measured, not for what "
            f"{law} should know"
        )
    return out


def last_part(name: str) -> str:
    """Returns the last part of a name such as train.tokens."""
    return name.rpartition(".")[2]


def meant_column(name: str, cells: Iterable[str]) -> str:
    """Returns the column that a name means: the one of that name, or else the only one, such as
    data.site, of which it is the last part. Where there is none, it returns the name.
    """
    ends = [each for each in cells if last_part(each) == name]
    return ends[0] if name not in cells and len(ends) == 1 else name


def _kinds(cells: Cells, names: dict[str, str]) -> dict[str, str]:
    """Returns "setting" or "measured" for each column that varies and may be a setting."""
    is_sweep = {"run_id", "status", "architecture"} <= set(cells)
    ours = {names.get(name, name) for name in _QUANTITIES}
    skipped = {*_NO_SETTINGS, names.get("loss", "loss")}
    if {names.get(name, name) for name in ("d_sae", "tokens")} <= set(cells):
        skipped |= {names.get("flops", "flops"), "flops_executed"}  # which follow from those
    out = {}
    for name, column in cells.items():
        if name in skipped or name.startswith("eval_"):
            continue
        if is_sweep and "." not in name and name not in (*_OF_SWEEPS, *ours):
            continue
        values = {as_text(cell) for cell in column}
        if len(values) > 1:
            its_own = len(values) > max(_OWN * len(column), 2)
            by_grid = is_sweep and "." in name
            is_setting = not its_own or by_grid or name in (*_OF_SWEEPS, *ours)
            out[name] = "setting" if is_setting else "measured"
    return out


def _numbers(column: Sequence) -> np.ndarray | None:
    """Returns the cells (N,) of a column as numbers; None where one is none."""
    numbers = [as_number(cell) for cell in column]
    return None if None in numbers else np.array(numbers)


def _is_twice(name: str, cells: Cells) -> bool:
    """Whether a column such as sae.d_sae says what the one of its last part, d_sae, says."""
    other = last_part(name)
    if other == name or other not in cells:
        return False
    texts, others = ([as_text(cell) for cell in cells[each]] for each in (name, other))
    numbers = _numbers(cells[other])
    return texts == others or (
        numbers is not None and _decides(numbers, texts, [as_number(cell) for cell in cells[name]])
    )


def _is_given(values: np.ndarray, known: dict[str, np.ndarray]) -> bool:
    """Whether numbers (N,) are proportional to one of the known columns or to a product of them."""
    if not (np.isfinite(values).all() and (values > 0).all()):
        return False
    logs = [np.log(column) for column in known.values()]
    products = itertools.chain.from_iterable(
        itertools.combinations(logs, count) for count in range(1, len(logs) + 1)
    )
    return any(np.ptp(np.log(values) - sum(product)) < _PROPORTIONAL for product in products)


def _decides(column: np.ndarray, texts: list[str], numbers: list[float | None]) -> bool:
    """Whether a column (N,) decides another.

    It does if the other's numbers never fall, or never rise, as it grows, or, where they are words,
    if each of its values has one and is had by one.
    """
    order = np.argsort(column, kind="stable")
    size, own = column[order], [f"{value:.6g}" for value in column]
    if None not in numbers and len(set(texts)) > 2:
        values = np.array(numbers)[order]
        same = np.diff(size) <= 1e-6 * size[1:]
        step = np.diff(values)
        return not step[same].any() and bool((step >= 0).all() or (step <= 0).all())
    pairs = set(zip(own, texts, strict=True))
    return len(set(own)) == len(set(texts)) == len(pairs) <= max(_OWN * len(own), 2)
