"""Tells where a sweep stands, from the files that its workers leave, as one view for a terminal."""

import collections
import dataclasses

from sae_jax.progress_bar import duration
from sae_jax.sweep import design
from sae_jax.sweep import grid as grids
from sae_jax.sweep.directory import Run, SweepDirectory, counted
from sae_jax.sweep.leases import Holder, Leases
from sae_jax.train import results, watching
from sae_jax.train.watching import STATES, Line


@dataclasses.dataclass(frozen=True)
class PassStatus:
    """Where a pass stands.

    Attributes:
      name: the pass's name.
      holder: the worker that trains it; None where nobody does.
      step: the step that its runs have reached, as they logged it.
      steps: the number of steps of its longest run.
      states: the number of runs in each of `watching.STATES`.
      failed: the runs that have failed.
      losses: the last loss of each run that has logged one.
      seconds_left: the time until it ends; None where nobody trains it, or has not for long enough
        to tell.
      flops_left: the FLOPs until it ends.
    """

    name: str
    holder: Holder | None
    step: int
    steps: int
    states: collections.Counter
    failed: tuple[Run, ...]
    losses: tuple[float, ...]
    seconds_left: float | None
    flops_left: float

    @property
    def is_trained(self) -> bool:
        """Whether a worker is at it, as far as that can be told."""
        return self.holder is not None and not self.holder.silent


def passes(directory: SweepDirectory, leases: Leases, states: dict[str, str]) -> list[PassStatus]:
    """Returns the status of each pass of a sweep, whose runs are in these `directory.states()`.

    In an object store it takes a request or two for each run that has begun, side by side.
    """
    by_config = {results.run_id(run.config): run for run in directory.runs}
    begun = [run for run in directory.runs if states[run.id] != "waiting"]
    lines = watching.at_once(
        lambda run: watching.last_line(directory.run_path(run) / "metrics.jsonl"), begun
    )
    last = dict.fromkeys(states, Line()) | dict(zip([run.id for run in begun], lines, strict=True))
    todo = directory.work()
    runs = {work.name: [by_config[results.run_id(config)] for config in work.runs] for work in todo}
    ended = {
        name: all(states[run.id] in ("done", "failed") for run in of_pass)
        for name, of_pass in runs.items()
    }
    holders = leases.holders(name for name in runs if not ended[name])
    return [_status(work, runs[work.name], states, last, holders.get(work.name)) for work in todo]


def seconds_left(all_passes: list[PassStatus]) -> float | None:
    """Returns the time until a sweep ends, if its workers go on at their speed.

    It is None where nobody trains it, or has not for long enough to tell.
    """
    going = [status for status in all_passes if status.seconds_left]
    flops_per_second = sum(status.flops_left / status.seconds_left for status in going)
    if not flops_per_second:
        return None
    # Passes that nobody has taken yet wait for a worker; no pass is cut in two.
    shared = sum(status.flops_left for status in all_passes) / flops_per_second
    return max(shared, *(status.seconds_left for status in going))


def view(directory: SweepDirectory, leases: Leases) -> str:
    """Returns the whole sweep in a few lines of text."""
    states = directory.states()
    all_passes = passes(directory, leases, states)
    total = sum((status.states for status in all_passes), collections.Counter())
    counts = ", ".join(f"{total[state]} {state}" for state in STATES if total[state])
    lines = [
        f"{directory.path}: {counted(len(directory.runs), 'run')} in "
        f"{counted(len(all_passes), 'pass')}: {counts}"
    ]
    if total["started"]:
        trained = sum(status.states["started"] for status in all_passes if status.is_trained)
        stale = total["started"] - trained
        lines[0] += f"; of those started {trained} in training"
        if stale:
            lines[0] += (
                f", {stale} stale: a worker that is there takes over, or start the sweep again"
            )
    if (left := seconds_left(all_passes)) is not None:
        lines[0] += f"; {duration(left)} left"
    heads = f"{'pass':22}{'step':>19}  {'/'.join(STATES):27}{'range of last losses':>23}"
    lines += ["", f"{heads}{'left':>10}  worker"]
    lines += [_line(status) for status in all_passes]
    if failed := [run for status in all_passes for run in status.failed]:
        alike = grids.shared([run.swept for run in directory.runs])
        lines += ["", "failed (the loss became NaN or infinite):"]
        lines += [
            f"  runs/{run.id}  {grids.describe(grids.without(run.swept, alike))}" for run in failed
        ]
    return "\n".join([*lines, *_missed_targets(directory, states)])


def _missed_targets(directory: SweepDirectory, states: dict[str, str]) -> list[str]:
    """Returns lines about the runs that missed their target L0; none where no run did."""
    missed = directory.missed_targets(states)
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
    losses = " to ".join(f"{loss:.5g}" for loss in ends)
    left = "" if status.seconds_left is None else duration(status.seconds_left)
    who = "nobody"
    if status.states["done"] + status.states["failed"] == status.states.total():
        who = "all runs have ended"
    elif status.holder:
        who = f"{status.holder.owner}, {status.holder.heard_of}"
        who += ": dead, free to be taken over" if status.holder.silent else ""
    step = f"{status.step:,}/{status.steps:,}"
    return f"{status.name:22}{step:>19}  {states:27}{losses:>23}{left:>10}  {who}"


def _status(
    work: design.Pass,
    runs: list[Run],
    states: dict[str, str],
    last: dict[str, Line],
    holder: Holder | None,
) -> PassStatus:
    """Returns the status of a pass with these runs, of which `states` and `last` tell by id."""
    ended = all(states[run.id] in ("done", "failed") for run in runs)
    # The runs of a pass go through the data together: those under way tell where it is.
    going = [run for run in runs if states[run.id] == "started"] or runs
    step = work.steps if ended else max((last[run.id].step for run in going), default=0)
    rates = [
        last[run.id].tokens_per_second / run.config.data.batch_size
        for run in going
        if last[run.id].tokens_per_second
    ]
    is_trained = not ended and holder is not None and not holder.silent
    return PassStatus(
        name=work.name,
        holder=holder,
        step=step,
        steps=work.steps,
        states=collections.Counter(states[run.id] for run in runs),
        failed=tuple(run for run in runs if states[run.id] == "failed"),
        losses=tuple(last[run.id].loss for run in runs if last[run.id].loss is not None),
        seconds_left=(work.steps - step) / min(rates) if is_trained and rates else None,
        flops_left=work.flops * (1 - step / work.steps),
    )
