"""Changes a sweep that has begun: makes its grid larger, takes runs out, does some again.

What is there stays. New runs, and those that are done again, come in a round of their own, so that
the passes of the runs before are the same as they were. Whoever makes sweep.json smaller, or trains
a run again, must know that no worker is at it (`check_nobody_works`).
"""

import dataclasses
import time
from collections.abc import Sequence

from absl import logging

from sae_jax import paths
from sae_jax.errors import UserError, nearest, some
from sae_jax.sweep import design
from sae_jax.sweep.directory import Run, SweepDirectory, counted, passes_of
from sae_jax.sweep.leases import Leases
from sae_jax.train.results import run_id

_FAILED = "failed"  # in place of a run's name: all that have failed


def check_nobody_works(directory: SweepDirectory, lease_seconds: float) -> None:
    """Raises UserError, which names a worker, if one trains runs of the sweep.

    One look at an object store cannot tell. Where there are leases it waits until they have run
    out, or are seen to be alive.
    """
    leases = Leases(directory.path / "leases", lease_seconds)
    holders = leases.living()
    if any(holder.age is None for holder in holders):
        seconds = max(holder.lasts for holder in holders)
        logging.info("looking for %.0f s whether somebody works on this sweep", seconds)
        time.sleep(seconds + 1)
        holders = leases.living()
    if holders:
        raise UserError(
            f"{holders[0].owner} works on {directory.path} ({holders[0].heard_of}); stop it "
            "(SIGTERM saves what it has), or wait until it has ended, and give the command again"
        )


def extended(directory: SweepDirectory, runs: list[Run]) -> list[Run]:
    """Returns the runs of a sweep with a larger grid: what is there, and what is new.

    Runs that still wait and are not in the larger grid are left out. New runs that go on from the
    trunk of one that is done, and those that begin, come in a round each.

    Args:
      directory: the sweep.
      runs: the runs of the larger grid.

    Raises UserError if a run that has begun is not in the grid.
    """
    here, there = {run.id for run in runs}, {run.id: run for run in directory.all_runs}
    begun = [
        f"{directory.name(run)} ({state})"
        for run in directory.runs
        if run.id not in here and (state := directory.state(run)) != "waiting"
    ]
    if begun:
        raise UserError(
            f"the grid leaves out {counted(len(begun), 'run')} of {directory.path} that "
            f"{'has' if len(begun) == 1 else 'have'} begun: {some(begun, 3)}; put back into the "
            "grid what it left out, or take it out with --drop=RUN"
        )
    number, done = _next_round(directory), directory.done()
    trunks = {design.trunk_key(run.config) for run in done} - {None}
    merged = []
    for run in runs:
        begins = design.trunk_key(run.config) not in trunks
        known = there.get(run.id, dataclasses.replace(run, round=number + begins))
        merged.append(dataclasses.replace(run, round=known.round, dropped=known.dropped))
    places = {run.id: place for place, run in enumerate(directory.all_runs)}
    merged.sort(key=lambda run: places.get(run.id, len(places)))  # the passes before keep names
    return merged + [run for run in directory.all_runs if run.dropped and run.id not in here]


def extend(directory: SweepDirectory, runs: list[Run], lease_seconds: float) -> None:
    """Makes the grid of a sweep larger, as `extended` says, or leaves it if it is that already.

    Raises UserError where it leaves runs out while somebody works on the sweep.
    """
    before, runs = {run.id for run in directory.all_runs}, extended(directory, runs)
    after = {run.id for run in runs}
    if before - after:  # the passes that are left may have other names, by which they are leased
        check_nobody_works(directory, lease_seconds)
        _check_passes_hold(directory, runs, after - before)
    directory.use_hardware(runs)
    if after != before:
        directory.rewrite(runs)
        logging.info(
            "%s: %s new, %d left out",
            directory.path,
            counted(len(after - before), "run"),
            len(before - after),
        )


def drop(directory: SweepDirectory, names: Sequence[str]) -> None:
    """Takes runs out of a sweep; their directories go to SWEEP/dropped.

    Raises UserError for a name that is none, or if no run would be left.
    """
    ids = {run.id for run in find(directory, names, directory.runs)}
    if all(run.id in ids for run in directory.runs):
        raise UserError(f"{directory.path} would have no run left; remove the directory instead")
    _change(directory, ids, dropped=True)


def rerun(directory: SweepDirectory, names: Sequence[str]) -> None:
    """Makes runs wait to be trained again; dropped ones come back.

    They are trained from the beginning, or go on from the trunk that a done run of another budget
    shares with them.

    Their directories go to SWEEP/dropped. Raises UserError for a name that is none.
    """
    ids = {run.id for run in find(directory, names, directory.all_runs)}
    _change(directory, ids, dropped=False, round=_next_round(directory))


def find(directory: SweepDirectory, names: Sequence[str], runs: Sequence[Run]) -> list[Run]:
    """Returns those of `runs` that a user means: by name, by id or its first digits, or "failed".

    Raises UserError, which names the nearest, where there is none, or more than one.
    """
    found: dict[str, Run] = {}
    for text in names:
        if text == _FAILED:
            means = [run for run in directory.runs if directory.state(run) == _FAILED]
            if not means:
                raise UserError(f"no run of {directory.path} has failed")
        else:
            means = [_find_one(directory, text, runs)]
        found |= {run.id: run for run in means}
    return list(found.values())


def _find_one(directory: SweepDirectory, text: str, runs: Sequence[Run]) -> Run:
    means = [run for run in runs if text in (run.id, directory.name(run))]
    means = means or [run for run in runs if text and run.id.startswith(text)]
    if len(means) > 1:
        ids = some([run.id for run in means])
        raise UserError(f"{text!r} is the beginning of {ids}; give more digits")
    if not means:
        known = [*(directory.name(run) for run in runs), *(run.id for run in runs)]
        raise UserError(f"{directory.path} has no run {text!r}; {nearest(text, known)}")
    return means[0]


def _check_passes_hold(directory: SweepDirectory, runs: list[Run], ids: set[str]) -> None:
    """Raises UserError where a pass of `runs` would join runs that have begun in several passes.

    Such runs have no checkpoint in common, so that they would begin anew.
    """
    before = {run_id(config): work.name for work in directory.work() for config in work.runs}
    for work in passes_of([run for run in runs if not run.dropped], directory.passes):
        begun = [
            run
            for run in runs
            if run.id not in ids
            and run.id in {run_id(config) for config in work.runs}
            and directory.state(run) == "started"
        ]
        if len({before[run.id] for run in begun}) > 1:
            raise UserError(
                f"{some([run.id for run in begun], 3)} of {directory.path} have begun in several "
                "passes, and would have to begin anew in one; start the sweep again and let them "
                "end first"
            )


def _next_round(directory: SweepDirectory) -> int:
    return 1 + max(run.round for run in directory.all_runs)


def _change(directory: SweepDirectory, ids: set[str], **fields) -> None:
    """Changes fields of runs in sweep.json, and then puts their directories aside.

    Raises UserError where runs that have begun, and are not among these, would lose what they have.
    """
    runs = directory.all_runs
    changed = [dataclasses.replace(r, **fields) if r.id in ids else r for r in runs]
    _check_passes_hold(directory, changed, ids)
    directory.rewrite(changed)
    for run in runs:
        if run.id in ids and (place := directory.run_path(run)).is_dir():
            aside, number = directory.path / "dropped" / run.id, 1
            while aside.exists():
                number += 1
                aside = aside.with_name(f"{run.id}-{number}")
            paths.move(place, aside)
