"""Trains the runs of a sweep: `sae-jax sweep`."""

import sys

from absl import flags

from sae_jax.cli import counts, distributed, logs
from sae_jax.errors import UserError

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
the same data become a pass, which reads the data once. Look at it first, then train it:

  sae-jax sweep --config=FILE.py --dry_run     runs, packs, FLOPs, bytes read, memory
  sae-jax sweep --config=FILE.py --workdir=S   train; the same command resumes it
  sae-jax status S                             where it stands, its time left, its curves

More workers: cut the work into --passes=N, and give the second command N times, on any hosts that
see S. Each claims a pass by a lease; who dies is followed, from the last checkpoint, once its lease
has run out. Runs are in S/runs, named by their configs, and never trained twice; S/results.csv has
a row for each. With --log=wandb:PROJECT each is a run of its own in Weights & Biases, in a group
named after S; with --log=tensorboard see all with tensorboard --logdir=S/runs.

Exit codes: 0 all runs have ended, including those whose loss became NaN, which are named; 2 a
mistake in the input; 75 to be started again (SIGTERM; a dead process, a step that hangs).
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
        "dry_run", False, "List what would be trained and what it costs.", flag_values=values
    )
    flags.DEFINE_bool(
        "status", False, "As sae-jax status SWEEP, and writes results.csv anew.", flag_values=values
    )
    flags.DEFINE_integer(
        "passes",
        None,
        "Parts that workers claim, 1 by default, for each data config. More passes, more workers; "
        "each pass reads the data once.",
        lower_bound=1,
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
    from sae_jax.sweep.directory import SweepDirectory, load
    from sae_jax.train import loggers, preemption
    from sae_jax.train.directory import is_writer

    path = paths.path(args.workdir) if args.workdir else None
    if path is None and not args.dry_run:
        raise UserError("--workdir=SWEEP is needed: the directory of the sweep")
    if args.status:
        directory = SweepDirectory(path)
        print(status.view(directory, leases.Leases(path / "leases", args.lease_seconds)))
        print(f"\n{directory.write_results()}")
        return 0
    if not args.config:
        raise UserError("--config=FILE.py is needed: it has get_config() and get_sweep()")
    runs = load(args.config, overrides)
    if args.dry_run:
        print(dry_run.describe(runs, args.passes or 1))
        return 0
    log_to = loggers.parse_log(args.log, path, is_sweep=True)
    directory = SweepDirectory.start(path, runs, args.passes)

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
