"""Finds the runs of a sweep that a user names.

A name has fields, as in "d_sae=1024,seed=1", and what is told of a run by them may have them in any
order, and fewer of them where one run alone is meant. A run that is not quite the one that was
named is never offered in its place.
"""

import difflib
import re
from collections.abc import Sequence

from sae_jax.errors import UserError, nearest, some
from sae_jax.sweep import grid as grids
from sae_jax.sweep.directory import Run, SweepDirectory
from sae_jax.train.watching import at_once

FAILED = "failed"  # in place of a run's name: all that have failed
_FEWEST_DIGITS = 4  # of an id: fewer are rather a value of a field


def find(directory: SweepDirectory, names: Sequence[str], runs: Sequence[Run]) -> list[Run]:
    """Returns those of `runs` that a user means: each by its name, its id, or "failed" for all that
    have failed.

    Fields of a name may come in any order. The beginning of an id or of a name, or some of its
    fields, are enough where they are those of one run alone.

    Raises UserError where there is no such run, or more than one.
    """
    found: dict[str, Run] = {}
    for text in names:
        if text == FAILED:
            going = [run for run in runs if not run.dropped]
            states = at_once(directory.state, going)
            means = [run for run, state in zip(going, states, strict=True) if state == FAILED]
            if not means:
                raise UserError(f"no run of {directory.path} that is not dropped has failed")
        else:
            means = [_find_one(directory, text, runs)]
        found |= {run.id: run for run in means}
    return list(found.values())


def _find_one(directory: SweepDirectory, text: str, runs: Sequence[Run]) -> Run:
    exact = [run for run in directory.all_runs if text in (run.id, directory.name(run))]
    # Where one is called so no other is meant, even if that one is none of `runs`.
    among = [run for run in runs if run in exact or not exact]
    for means in (
        [run for run in among if run in exact],
        [run for run in among if (given := _fields(text)) and _agrees(run, given)],
        [run for run in among if len(text) >= _FEWEST_DIGITS and run.id.startswith(text)],
        [run for run in among if _begins(directory.name(run), text)],
    ):
        if len(means) == 1:
            return means[0]
        if means:
            shown = [f"{directory.name(run)} ({run.id})" for run in means]
            raise UserError(
                f"{text!r} means {len(means)} runs of {directory.path}: {some(shown, 4)}; name "
                "one, by more of its fields or its id"
            )
    raise UserError(f"{directory.path} has no run {text!r}; {_hint(directory, text, runs)}")


def _fields(text: str) -> dict[str, str]:
    """Returns the fields of a name, {} for what is no list of them."""
    parts = [part.partition("=") for part in re.split(r"[,\s]+", text.strip(", "))]
    fields = {field: value for field, _, value in parts}
    return fields if len(fields) == len(parts) and all(all(p) for p in parts) else {}


def _agrees(run: Run, given: dict[str, str]) -> bool:
    return all(_has(run, field, value) for field, value in given.items())


def _has(run: Run, field: str, value: str) -> bool:
    return any(_same(value, its) for name, its in run.swept.items() if _labelled(name, field))


def _labelled(name: str, field: str) -> bool:
    return field in (name, name.rpartition(".")[2])


def _same(text: str, value: object) -> bool:
    """Whether a text means a value: as a name has it, or as the same number."""
    if text in (str(value), grids.plain(value)):
        return True
    return _is_number(value) and _number(text) == value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _begins(name: str, text: str) -> bool:
    """Whether a name begins with a text that ends within no value: seed=1 begins no seed=10, and
    architecture=relu no architecture=relu_l1_unit.
    """
    ends_in_value = "=" in text.rpartition(",")[2]
    if not text or not name.startswith(text):
        return False
    return not ends_in_value or name[len(text) :][:1] in ("", ",")


def _hint(directory: SweepDirectory, text: str, runs: Sequence[Run]) -> str:
    """Returns what a text that names no run can have meant, and how runs are named."""
    if not runs:
        return "no run of it is dropped"
    how = f"a run is named as in {directory.name(runs[0])}, or by its id; results.csv has them all"
    given = _fields(text)
    for run in directory.all_runs:
        name = directory.name(run)
        if run.dropped and (text in (run.id, name) or (given and _agrees(run, given))):
            return f"{name} ({run.id}) is dropped already; --restore={name} or --rerun={name}"
    if not given:
        if difflib.get_close_matches(text, [FAILED], cutoff=0.5):
            return nearest(text, [FAILED])
        fields = {f: v for run in runs for f, v in run.swept.items() if _same(text, v)}
        if fields:
            field = next(iter(fields)).rpartition(".")[2]
            return f"did you mean {f'{field}={text}'!r}, with other fields of its name?"
        return how
    spelt = _spelt_right(given, runs)
    means = [run for run in runs if _agrees(run, spelt)] if spelt != given else []
    if len(means) == 1:
        return f"did you mean {directory.name(means[0])!r}?"
    for field, value in given.items():
        values = _values(field, runs)
        if not values:
            labels = [name.rpartition(".")[2] for name in grids.fields([r.swept for r in runs])]
            return f"its runs differ in no {field!r}, but in {some(labels)}"
        if not any(_same(value, its) for its in values):
            wanted = _number(value)
            if wanted is not None and all(map(_is_number, values)):
                values = sorted(values, key=lambda its: abs(its - wanted))
            shown = some([grids.plain(its) for its in values], 6)
            return f"of {field} there {'is' if len(values) == 1 else 'are'} {shown}"
    return f"none of its runs has all of these together; {how}"


def _values(field: str, runs: Sequence[Run]) -> list:
    """Returns the different values of a field, which may be named by its last part."""
    found = [v for run in runs for name, v in run.swept.items() if _labelled(name, field)]
    return list(dict.fromkeys(found))


def _spelt_right(given: dict[str, str], runs: Sequence[Run]) -> dict[str, str]:
    """Returns fields with what is misspelt of them replaced.

    A number is not misspelt, but another number.
    """
    names = grids.fields([run.swept for run in runs])
    labels = [*(name.rpartition(".")[2] for name in names), *names]
    right = {}
    for field, value in given.items():
        field = field if field in labels else _closest(field, labels)
        values = _values(field, runs)
        if _number(value) is None and not any(_same(value, its) for its in values):
            value = _closest(value, [its for its in values if isinstance(its, str)])
        right[field] = value
    return right


def _closest(text: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(text, choices, n=1, cutoff=0.6)
    return near[0] if near else text
