"""Tells where a sweep stands, from the files that its workers leave, as one view for a terminal."""

import collections
import dataclasses
import datetime
import os

from sae_jax.errors import UserError
from sae_jax.json_files import checked, parse_json
from sae_jax.paths import AnyPath, ObjectPath
from sae_jax.sweep import design
from sae_jax.sweep import grid as grids
from sae_jax.sweep.directory import STATES, Run, SweepDirectory, counted
from sae_jax.sweep.leases import Holder, Leases
from sae_jax.train import results

_TAIL = 8192  # bytes at the end of metrics.jsonl, more than its last line has


@dataclasses.dataclass(frozen=True)
class Line:
    """What the status needs of a line of metrics.jsonl.

    Attributes:
      step: the step that was logged; 0 before there is a line.
      loss: its loss; None where it is not finite.
      tokens_per_second: the speed; None where it is not known.
    """

    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None


@dataclasses.dataclass(frozen=True)
class PassStatus:
    """Where a pass stands.

    Attributes:
      name: the pass's name.
      holder: the worker that trains it; None where nobody does.
      step: the step that its runs have reached, as they logged it.
      steps: the number of steps of its longest run.
      states: the number of runs in each of STATES.
      losses: the last loss of each run that has logged one.
      seconds_left: the time until it ends; None where nobody trains it, or has not for long enough
        to tell.
    """

    name: str
    holder: Holder | None
    step: int
    steps: int
    states: collections.Counter
    losses: tuple[float, ...]
    seconds_left: float | None


def passes(directory: SweepDirectory, leases: Leases) -> list[PassStatus]:
    """Returns the status of each pass of a sweep."""
    by_id = {results.run_id(run.config): run for run in directory.runs}
    return [
        _status(work, [by_id[results.run_id(config)] for config in work.runs], directory, leases)
        for work in directory.work()
    ]


def view(directory: SweepDirectory, leases: Leases) -> str:
    """Returns the whole sweep in a few lines of text."""
    all_passes = passes(directory, leases)
    total = sum((status.states for status in all_passes), collections.Counter())
    counts = ", ".join(f"{total[state]} {state}" for state in STATES if total[state])
    lines = [
        f"{directory.path}: {counted(len(directory.runs), 'run')} in "
        f"{counted(len(all_passes), 'pass')}: {counts}",
        "",
        f"{'pass':22}{'step':>19}  {'/'.join(STATES):27}{'last loss':>21}{'left':>10}  worker",
    ]
    lines += [_line(status) for status in all_passes]
    failed = [run for run in directory.runs if directory.state(run) == "failed"]
    if failed:
        alike = grids.shared([run.swept for run in directory.runs])
        lines += ["", "failed (the loss became NaN or infinite):"]
        lines += [
            f"  runs/{run.id}  {grids.describe(grids.without(run.swept, alike))}" for run in failed
        ]
    return "\n".join([*lines, *_missed_targets(directory)])


def _missed_targets(directory: SweepDirectory) -> list[str]:
    """Returns lines about the runs that missed their target L0; none where no run did."""
    missed = directory.missed_targets()
    if not missed:
        return []
    alike = grids.shared([run.swept for run in directory.runs])
    lines = [
        f"  runs/{run.id}  {grids.describe(grids.without(run.swept, alike))}: {sentence}"
        for run, sentence in missed
    ]
    return ["", f"{counted(len(missed), 'run')} missed the target L0:", *lines]


def _line(status: PassStatus) -> str:
    """Returns the line of a pass."""
    states = "/".join(str(status.states[state]) for state in STATES)
    ends = sorted({min(status.losses), max(status.losses)}) if status.losses else []
    losses = " - ".join(f"{loss:.5g}" for loss in ends)
    left = ""
    if status.seconds_left is not None:
        left = str(datetime.timedelta(seconds=round(status.seconds_left)))
    who = "nobody"
    if status.states["done"] + status.states["failed"] == status.states.total():
        who = "all runs have ended"
    elif status.holder:
        who = f"{status.holder.owner}, {status.holder.heard_of}"
        who += "" if status.holder.alive else ": dead, free to be taken over"
    step = f"{status.step:,}/{status.steps:,}"
    return f"{status.name:22}{step:>19}  {states:27}{losses:>21}{left:>10}  {who}"


def _status(
    work: design.Pass, runs: list[Run], directory: SweepDirectory, leases: Leases
) -> PassStatus:
    """Returns the status of a pass with these runs."""
    state = {run.id: directory.state(run) for run in runs}
    last = {run.id: last_line(directory.run_path(run) / "metrics.jsonl") for run in runs}
    ended = all(state[run.id] in ("done", "failed") for run in runs)
    # The runs of a pass go through the data together: those under way tell where it is.
    going = [run for run in runs if state[run.id] == "started"] or runs
    step = max((last[run.id].step for run in going), default=0)
    holder = None if ended else leases.holder(work.name)
    rates = [
        last[run.id].tokens_per_second / run.config.data.batch_size
        for run in going
        if last[run.id].tokens_per_second
    ]
    left = (work.steps - step) / min(rates) if holder and holder.alive and rates else None
    return PassStatus(
        name=work.name,
        holder=holder,
        step=work.steps if ended else step,
        steps=work.steps,
        states=collections.Counter(state.values()),
        losses=tuple(line.loss for line in last.values() if line.loss is not None),
        seconds_left=left,
    )


def last_line(file: AnyPath) -> Line:
    """Returns the last whole line of a run's metrics.jsonl, or the default before there is one.

    Raises UserError if it is no line of metrics, or cannot be read.
    """
    try:
        if isinstance(file, ObjectPath):
            tail = file.read_bytes()
        else:
            with file.open("rb") as lines:
                lines.seek(max(0, os.fstat(lines.fileno()).st_size - _TAIL))
                tail = lines.read()
    except FileNotFoundError:
        return Line()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    whole = tail.rpartition(b"\n")[0]
    if not whole:
        return Line()
    where = f"the last line of {file}"
    return checked(parse_json(whole.rpartition(b"\n")[2], where), Line, where)
