"""Changes a sweep that has begun: makes its grid larger, takes runs out, does some again.

What is there stays. New runs, and those that are done again, come in a round of their own, so that
the passes of the runs before are the same as they were. Whoever makes sweep.json smaller, or trains
a run again, must know that no worker is at it (`check_nobody_works`).
"""

import collections
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence

from absl import logging

from sae_jax import config as configs
from sae_jax import paths
from sae_jax.config import Config
from sae_jax.errors import UserError, some
from sae_jax.paths import AnyPath
from sae_jax.sweep import design
from sae_jax.sweep import grid as grids
from sae_jax.sweep.directory import Run, SweepDirectory, counted, passes_of
from sae_jax.sweep.leases import Leases
from sae_jax.sweep.run_names import find
from sae_jax.train import watching
from sae_jax.train.results import run_id
from sae_jax.train.schedule_steps import ScheduleSteps, count_steps, has_trunk, trunk_steps


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
    number, trunks = _next_round(directory), _trunks(directory.done())
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
    notes = extension_notes(directory, runs)
    before, runs = {run.id for run in directory.all_runs}, extended(directory, runs)
    after = {run.id for run in runs}
    if before - after:  # the passes that are left may have other names, by which they are leased
        check_nobody_works(directory, lease_seconds)
        _check_passes_hold(directory, runs, after - before)
    for sentence in notes:
        logging.warning("%s", sentence)
    directory.use_hardware(runs)
    if after != before:
        directory.rewrite(runs)
        logging.info(
            "%s: %s%s",
            directory.path,
            counted(len(after - before), "new run"),
            f", {len(before - after)} left out, which had not begun" if before - after else "",
        )


def extension_notes(directory: SweepDirectory, runs: list[Run]) -> list[str]:
    """Says what a larger grid does not do: which of its runs stay dropped, and which are larger
    budgets of runs that are done and do not go on from them, and why.
    """
    notes, here = [], {run.id for run in runs}
    if dropped := [directory.name(r) for r in directory.all_runs if r.dropped and r.id in here]:
        notes.append(
            f"{counted(len(dropped), 'run')} of the grid {'was' if len(dropped) == 1 else 'were'} "
            f"dropped and {'stays' if len(dropped) == 1 else 'stay'} so: {some(dropped, 4)}; "
            "--restore=RUN brings back one that had ended, --rerun=RUN trains it again"
        )
    there, done = {run.id for run in directory.all_runs}, directory.done()
    trunks = _trunks(done)
    shorter = {_without_budget(run.config): run.config for run in done}
    anew = [
        (run, shorter[key])
        for run in runs
        if run.id not in there
        and design.trunk_key(run.config) not in trunks
        and (key := _without_budget(run.config)) in shorter
    ]
    if anew:
        run, before = anew[0]
        notes.append(
            f"{counted(len(anew), 'run')} of the grid, of another budget than those that are done, "
            f"{'begins' if len(anew) == 1 else 'begin'} anew, as {grids.describe(run.swept)}: "
            f"{_why_anew(before, run.config)}"
        )
    return notes


def begins_at(directory: SweepDirectory, runs: list[Run]) -> dict[str, int]:
    """Returns at which step new runs go on from those that are done, by the new runs' ids.

    Runs that begin at their beginning are left out.
    """
    done = [run.config for run in directory.done() if run.config.train.keep_trunk]
    ends: dict[str, int] = {}
    for config in done:
        if key := design.trunk_key(config):
            ends[key] = max(ends.get(key, 0), trunk_steps(config))
    keys = {run.id: design.trunk_key(run.config) for run in runs}
    return {r.id: min(ends[k], trunk_steps(r.config)) for r in runs if (k := keys[r.id]) in ends}


def _trunks(done: Sequence[Run]) -> set[str]:
    """Returns the trunks of runs that are done, from which others can go on."""
    kept = [run.config for run in done if run.config.train.keep_trunk]
    return {design.trunk_key(config) for config in kept} - {None}


def _without_budget(config: Config) -> str:
    """Returns what a run is but for its budget, and for what follows from that."""
    values = configs.identity(config)
    del values["train"]["tokens"], values["optimizer"]["warmup_fraction"]
    for section, field in (("sae", "sparsity_warmup_fraction"), ("optimizer", "learning_rate")):
        if section == "sae" or config.sae.target_l0 is not None:  # which the rate then follows
            values[section].pop(field, None)
    return json.dumps(values, sort_keys=True)


def _why_anew(before: Config, config: Config) -> str:
    """Says why a run does not go on from one of another budget, and what would make it do so."""
    if not has_trunk(config):
        what = f"its schedule, {config.optimizer.schedule},"
        if config.sae.anneals:
            what = "what changes along its SAE's training (k_start, p_end or target_l0)"
        return f"{what} depends on the run's length from the first step on"
    if not before.train.keep_trunk:
        return (
            "what is done kept no checkpoint where its learning rate began to fall "
            "(train.keep_trunk)"
        )
    steps = count_steps(config)
    old, new = (ScheduleSteps.from_config(c, count_steps(c)) for c in (before, config))
    fields = {}
    if old.warmup != new.warmup:
        fields["optimizer.warmup_fraction"] = old.warmup / steps
    if old.sparsity_warmup != new.sparsity_warmup:
        fields["sae.sparsity_warmup_fraction"] = old.sparsity_warmup / steps
    if not fields:
        return "its running means are over a part of the run, or over more steps"
    words = " and ".join(f"{field} {value:.8g}" for field, value in fields.items())
    return (
        f"a warm-up is a part of the run, of {max(new.warmup, new.sparsity_warmup)} steps here and "
        f"{max(old.warmup, old.sparsity_warmup)} there; with {words} it goes on (grid.budgets sets "
        "these for budgets that are to share a trunk)"
    )


def change(
    directory: SweepDirectory,
    drop: Sequence[str] = (),
    rerun: Sequence[str] = (),
    restore: Sequence[str] = (),
) -> list[str]:
    """Takes runs out of a sweep, makes others wait to be trained again, and restores dropped ones.

    Dropped ones that are to be trained again come back, too. They are trained from the beginning,
    or go on from the trunk that a done run of another budget shares with them. Directories of what
    is dropped or trained again go to SWEEP/dropped.

    Returns a line about each run: its name, and where what it had is kept.

    Raises UserError for a name that is none, for a run that is named for two of these, for one that
    had not ended when it was dropped and is to be restored, and if no run would be left. Nothing is
    changed then.
    """
    out, again = find(directory, drop, directory.runs), find(directory, rerun, directory.all_runs)
    back = find(directory, restore, [run for run in directory.all_runs if run.dropped])
    asked = [directory.name(run) for run in (*out, *again, *back)]
    if twice := [name for name, number in collections.Counter(asked).items() if number > 1]:
        raise UserError(
            f"two of --drop, --rerun and --restore name {some(twice, 4)}; a run is taken out, "
            "trained again, or brought back as it was"
        )
    kept = {run.id: _kept(directory, run) for run in back}
    left = {run.id for run in (*directory.runs, *again, *back)} - {run.id for run in out}
    if not left:
        raise UserError(f"{directory.path} would have no run left; remove the directory instead")
    new = {run.id: dataclasses.replace(run, dropped=True) for run in out}
    number = _next_round(directory)
    new |= {run.id: dataclasses.replace(run, dropped=False, round=number) for run in again}
    restored = {run.id: dataclasses.replace(run, dropped=False) for run in back}
    changed = [(new | restored).get(run.id, run) for run in directory.all_runs]
    _check_passes_hold(directory, changed, set(new | restored))
    lines = []
    for run in restored.values():  # before sweep.json calls it a run that would wait
        if kept[run.id] != (place := directory.run_path(run)):
            _put_aside(directory, run)  # what a drop that was cut short has left there
            paths.move(kept[run.id], place)
        lines.append(f"restored {directory.name(run)} ({run.id}): {directory.state(run)}")
    directory.rewrite(changed)
    for run in new.values():
        aside, name = _put_aside(directory, run), directory.name(run)
        had = f"what it had is in {aside}" if aside else "it had not begun"
        if run.dropped:
            ended = aside is not None and watching.state(aside) in ("done", "failed")
            how = f"--restore={name} brings it back, " if ended else ""
            how += f"--rerun={name} trains it again"
            lines.append(f"dropped {name} ({run.id}): {had}; {how}")
        else:
            lines.append(f"to be trained again: {name} ({run.id}); {had}")
    return lines


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


def _put_aside(directory: SweepDirectory, run: Run) -> AnyPath | None:
    """Moves a run's directory to SWEEP/dropped, and returns where it is; None if there is none."""
    place, there = directory.run_path(run), _asides(directory, run)
    if not place.is_dir():
        return there[-1] if there else None  # since it was dropped before
    aside = directory.path / "dropped" / (f"{run.id}-{len(there) + 1}" if there else run.id)
    paths.move(place, aside)
    return aside


def _asides(directory: SweepDirectory, run: Run) -> list[AnyPath]:
    """Returns where the directories of a run are that were put aside, the last one at the end."""
    first = directory.path / "dropped" / run.id
    names = (first.with_name(f"{run.id}-{number}") for number in itertools.count(2))
    return list(itertools.takewhile(lambda path: path.exists(), itertools.chain([first], names)))


def _kept(directory: SweepDirectory, run: Run) -> AnyPath:
    """Returns where a dropped run is: also where it was, if dropping or restoring it was cut short.

    Raises UserError if it had not ended.
    """
    places = [*_asides(directory, run)[-1:], directory.run_path(run)]
    ended = [place for place in places if watching.state(place) in ("done", "failed")]
    if not ended:
        name = directory.name(run)
        raise UserError(
            f"{name} had not ended when it was dropped, and can only be trained again: "
            f"--rerun={name}"
        )
    return ended[-1]
