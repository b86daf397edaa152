"""Where a sweep stands, from the files that its workers leave: one view for a terminal."""

import collections
import dataclasses
import datetime
import json
import os

from sae_jax.paths import AnyPath, ObjectPath
from sae_jax.sweep import design
from sae_jax.sweep import grid as grids
from sae_jax.sweep.directory import STATES, Run, SweepDirectory, counted
from sae_jax.sweep.leases import Holder, Leases
from sae_jax.train import results

_TAIL = 8192  # bytes of metrics.jsonl that surely hold its last line


@dataclasses.dataclass(frozen=True)
class PassStatus:
    name: str
    holder: Holder | None  # None: nobody trains it
    step: int  # that its runs have reached, as they logged
    steps: int  # of its longest run
    states: collections.Counter  # runs in each of STATES
    losses: tuple[float, ...]  # last of each run that has logged one
    seconds_left: float | None  # None where nobody trains it, or not for long


def passes(directory: SweepDirectory, leases: Leases) -> list[PassStatus]:
    by_id = {run.id: run for run in directory.runs}
    todo = design.make_passes([run.config for run in directory.runs], directory.passes)
    return [
        _status(work, [by_id[results.run_id(config)] for config in work.runs], directory, leases)
        for work in todo
    ]


def view(directory: SweepDirectory, leases: Leases) -> str:
    """The whole sweep in a few lines."""
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
    return "\n".join(lines)


def _line(status: PassStatus) -> str:
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
    state = {run.id: directory.state(run) for run in runs}
    last = {run.id: last_line(directory.run_path(run) / "metrics.jsonl") for run in runs}
    ended = all(state[run.id] in ("done", "failed") for run in runs)
    # The runs of a pass go through the data together: those under way tell where it is.
    going = [run for run in runs if state[run.id] == "started"] or runs
    step = max((last[run.id].get("step", 0) for run in going), default=0)
    holder = None if ended else leases.holder(work.name)
    rates = [
        last[run.id]["tokens_per_second"] / run.config.data.batch_size
        for run in going
        if last[run.id].get("tokens_per_second")
    ]
    left = (work.steps - step) / min(rates) if holder and holder.alive and rates else None
    return PassStatus(
        name=work.name,
        holder=holder,
        step=work.steps if ended else step,
        steps=work.steps,
        states=collections.Counter(state.values()),
        losses=tuple(line["loss"] for line in last.values() if line.get("loss") is not None),
        seconds_left=left,
    )


def last_line(file: AnyPath) -> dict:
    """The last whole line of a run's metrics.jsonl; {} before there is one."""
    try:
        if isinstance(file, ObjectPath):
            return _last_of(file.read_bytes())
        with file.open("rb") as lines:
            lines.seek(max(0, os.fstat(lines.fileno()).st_size - _TAIL))
            return _last_of(lines.read())
    except FileNotFoundError:
        return {}


def _last_of(lines: bytes) -> dict:
    whole = lines.rpartition(b"\n")[0]
    return json.loads(whole.rpartition(b"\n")[2]) if whole else {}
