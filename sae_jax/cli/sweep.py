"""Trains the runs of a sweep: `sae-jax sweep`."""

import dataclasses
import sys
import typing

from absl import flags, logging

from sae_jax.cli import counts, distributed, logs
from sae_jax.errors import UserError

if typing.TYPE_CHECKING:
    from sae_jax.sweep.directory import SweepDirectory

SUMMARY = """Train many SAEs over one reading of the data; any number of workers share the work.

A sweep file has get_config(), as for `sae-jax train`, and get_sweep(), which says what differs:

  from sae_jax.sweep import grid

  def get_sweep():
      return grid.product(
          grid.sweep("sae.d_sae", [1024, 4096]),
          grid.sweep("optimizer.learning_rate", [1e-4, 4e-4]),
          grid.sweep("train.seed", range(2)),
      )

Runs of one shape and budget become a pack, one program that trains them side by side; packs over
the same rows of a store become a pass, which reads the data once. Their sites may differ, as in
grid.sweep("data.site", ["resid_post.3", "resid_post.6"]): a pass reads each site once, and runs the
model of a live store once for all. Look at it first, then train it:

  sae-jax sweep --config=FILE.py --dry_run     runs, packs, FLOPs, bytes read, memory
  sae-jax sweep --config=FILE.py --workdir=S   train
  sae-jax sweep --workdir=S                    resume, or help: what it is is in S
  sae-jax status S                             where it stands, its time left, its curves

More workers: cut the work into --passes=N, and give the third command N times, on any hosts that
see S. Each claims a pass by a lease; who dies is followed, from the last checkpoint, once its lease
has run out. Runs are in S/runs, by ids that their configs determine, and never trained twice;
S/results.csv has a row for each, with a name such as d_sae=1024,seed=1.

A sweep grows. Runs that are done stay as they are, and larger token budgets of them go on from
where their learning rate began to fall:

  sae-jax sweep --workdir=S --config=LARGER.py --extend    add the runs of a larger grid, and train
  sae-jax sweep --workdir=S --config=LARGER.py --extend --dry_run    what that would add
  sae-jax sweep --workdir=S --rerun=failed     train again what failed, or a run: --rerun=RUN
  sae-jax sweep --workdir=S --drop=RUN         take a run out; --restore=RUN: one that had ended

Larger budgets go on where warm-ups have equal steps, as grid.budgets([1e6, 4e6], batch_size=2048,
warmup_tokens=1e5) makes them; a warmup_fraction alone is a part of each. Which begin anew, and why,
is said. In a sweep dead_after_tokens is by default that of its smallest budget.

RUN is a name, its fields in any order, or an id; the beginning of one, or some fields, are enough
where they are those of one run. What is dropped or done again is kept in S/dropped. Runs may also
begin at a checkpoint: train.branch_from in the sweep file's config, which is theirs in all else,
too.

With --log=wandb:PROJECT each is a run of its own in Weights & Biases, in a group
named after S; with --log=tensorboard see all with tensorboard --logdir=S/runs.

Exit codes: 0 all runs have ended, including those whose loss became NaN, which are named; 2 a
mistake in the input; 75 to be started again (SIGTERM; a dead process, a step that hangs); 130
Ctrl-C.
"""


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax sweep`."""
    flags.DEFINE_string(
        "workdir", None, "The sweep's directory, made if absent.", flag_values=values
    )
    flags.DEFINE_string(
        "config",
        None,
        "A recipe, NAME[:ARGUMENT], or FILE.py[:arg] with get_config(arg) and get_sweep(arg).",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "dry_run", False, "List what is left to train and what it costs.", flag_values=values
    )
    flags.DEFINE_bool(
        "status", False, "As sae-jax status SWEEP, and writes results.csv anew.", flag_values=values
    )
    flags.DEFINE_integer(
        "passes",
        None,
        "Parts that workers claim, 1 by default, of all runs over the same rows. More passes, more "
        "workers, less memory for each; each reads the data once.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "extend",
        False,
        "Add the runs of a larger grid, that of --config, to the sweep in --workdir.",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "rerun",
        [],
        "Train a run again, from its beginning, or from the trunk of a run of another budget that "
        "is done; failed: all whose loss became NaN. Repeatable.",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "drop",
        [],
        "Take a run out of the sweep, and end, unless --rerun names others. Repeatable.",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "restore",
        [],
        "Bring a run back that was dropped, as it was, and end, unless --rerun names others. "
        "Repeatable.",
        flag_values=values,
    )
    counts.define_float(
        "lease_seconds",
        60.0,
        "How long this worker may be silent before others take it for dead.",
        values,
        lower_bound=1.0,
        upper_bound=1e9,
    )
    logs.define(values)
    distributed.define(values)


def run(args: flags.FlagValues, overrides: dict[str, str]) -> int:
    """Works on the sweep, or shows what it is, and returns the exit code."""
    from sae_jax import paths
    from sae_jax.sweep import dry_run, leases, status
    from sae_jax.sweep.directory import SweepDirectory
    from sae_jax.train import loggers, preemption
    from sae_jax.train.directory import is_writer

    path = paths.path(args.workdir) if args.workdir else None
    if path is None and (not args.dry_run or args.extend):
        raise UserError("--workdir=SWEEP is needed: the directory of the sweep")
    if args.extend and not args.config:
        raise UserError("--extend needs --config=FILE.py, with the larger grid")
    shows = next((name for name in ("status", "dry_run") if args[name].value), None)
    changes = next((name for name in ("drop", "rerun", "restore") if args[name].present), None)
    if shows and changes:
        raise UserError(f"--{shows} changes nothing: leave --{changes} out")
    if args.status:
        directory = SweepDirectory(path)
        print(status.view(directory, leases.Leases(path / "leases", args.lease_seconds)))
        print(f"\n{directory.write_results()}")
        return 0
    if args.dry_run:
        print(_dry_run(args, overrides, path))
        return 0
    if args.drop or args.rerun or args.restore:
        print("\n".join(_change(args, SweepDirectory(path))), flush=True)
    if (args.drop or args.restore) and not args.rerun:
        print(SweepDirectory(path).write_results())
        return 0
    log_to = loggers.parse_log(args.log, path, is_sweep=True)
    directory = _open(args, overrides, path)
    names = {run.id: directory.name(run) for run in directory.runs}
    log_to = dataclasses.replace(log_to, names=names)
    ended = directory.ended()
    for doubt in (
        *dry_run.doubts([run for run in directory.runs if run.id not in ended]),
        *dry_run.few_passes(directory.runs, directory.passes),
    ):
        logging.warning("%s", doubt)

    from sae_jax.sweep import worker

    with distributed.joined(args) as progress:
        try:
            worker.work(directory, args.lease_seconds, progress, log_to)
        except preemption.PreemptedError:
            print("sae-jax sweep: stopped by SIGTERM; start it again to go on", file=sys.stderr)
            return preemption.EXIT_CODE
        if is_writer():
            print(status.view(directory, leases.Leases(path / "leases", args.lease_seconds)))
            print(f"\n{path / 'results.csv'}")
    return 0


def _open(args: flags.FlagValues, overrides: dict[str, str], path) -> "SweepDirectory":
    """Opens the directory of the sweep, which is made or made larger as the flags say."""
    from sae_jax.sweep import changes
    from sae_jax.sweep.directory import SweepDirectory, load

    if args.config and not args.extend:
        return SweepDirectory.start(path, load(args.config, overrides, path), args.passes)
    directory = SweepDirectory(path)
    directory.check_passes(args.passes)
    if args.extend:
        changes.extend(directory, load(args.config, overrides, path), args.lease_seconds)
    else:
        directory.override(overrides)
    return directory


def _change(args: flags.FlagValues, directory: "SweepDirectory") -> list[str]:
    """Drops runs, restores them, makes them wait to be trained again; returns a line for each."""
    from sae_jax.sweep import changes

    if args.config or args.distributed or args.coordinator:
        raise UserError(
            "--drop, --restore and --rerun are for one process and the sweep as it is in "
            "--workdir; leave out --config and what joins processes, and start the workers then"
        )
    changes.check_nobody_works(directory, args.lease_seconds)
    return changes.change(directory, args.drop, args.rerun, args.restore)


def _dry_run(args: flags.FlagValues, overrides: dict[str, str], path) -> str:
    """Returns what is left to do of the sweep, or what a larger grid adds to it, and its cost."""
    from sae_jax.sweep import dry_run
    from sae_jax.sweep.directory import load

    if args.config and args.extend:
        return _dry_extension(args, overrides, path)
    if args.config and (path is None or not (path / "sweep.json").is_file()):
        return dry_run.describe(load(args.config, overrides, path), args.passes or 1)
    if path is None:
        raise UserError("--config=FILE.py is needed: it has get_config() and get_sweep()")
    directory = _open(args, overrides, path)
    states = directory.states()
    left = {run_id for run_id, state in states.items() if state in ("waiting", "started")}
    ended, begun = len(states) - len(left), sum(state == "started" for state in states.values())
    words = [f"{ended} of {len(states)} runs of {path} have ended"] if ended else []
    if begun:
        words.append(f"{begun} have begun; what they have is not subtracted below")
    if not left:
        return f"{words[0]}; nothing is left to train"
    return "\n".join([*words, dry_run.describe(directory.runs, directory.passes, left)])


def _dry_extension(args: flags.FlagValues, overrides: dict[str, str], path) -> str:
    """Returns what a larger grid adds to the sweep, and its cost."""
    from sae_jax.sweep import changes, dry_run
    from sae_jax.sweep.directory import SweepDirectory, load

    runs = load(args.config, overrides, path)
    directory = SweepDirectory(path)
    there = {run.id for run in directory.all_runs}
    notes = changes.extension_notes(directory, runs)
    extended = [run for run in changes.extended(directory, runs) if not run.dropped]
    new = [run for run in extended if run.id not in there]
    if not new:
        return "\n".join([f"{path} has all runs of {args.config} already", *notes])
    starts = changes.begins_at(directory, new)
    text = dry_run.describe(extended, directory.passes, {run.id for run in new}, starts)
    return "\n".join([text, *([""] if notes else []), *notes])
