"""Trains one SAE: `sae-jax train`."""

import sys

from absl import flags

from sae_jax import config as configs
from sae_jax.cli import counts, distributed, logs
from sae_jax.errors import UserError

SUMMARY = """Train a sparse autoencoder on an activation store; --workdir alone resumes it.

  sae-jax train --workdir=runs/a --config=openai_topk \\
      --config.data.store=stores/gpt2 --config.sae.d_sae=16384 --config.train.tokens=100e6

  sae-jax train --workdir=runs/b --config.train.init=their_sae --config.sae.d_sae=24576 \\
      --config.data.store=stores/gpt2          (goes on with an SAE that is there)

  sae-jax train ... --log=wandb:my_project,tensorboard     (see --log below)

Without --config it starts from the defaults. RUN gets config.json, metrics.jsonl, checkpoints/
and, at the end, result.json. Stopped by SIGTERM or Ctrl-C, or killed, it goes on from its last
checkpoint:

  sae-jax train --workdir=runs/a       (its config.json says the rest; the mesh may change)

A run that is there can be made longer, or be left for one with other settings. It stays as it is:

  sae-jax train --workdir=runs/longer --branch_from=runs/a --extend_tokens=200e6
      the run of 200M tokens: it goes on from where the learning rate of runs/a began to fall, a
      checkpoint that runs keep (train.keep_trunk). It keeps the steps of the warm-ups, so that
      their fractions are smaller, and sae.dead_after_tokens, and is, bit for bit, what a run with
      these had been from the beginning. A run with target_l0, k_start or p_end, which change
      along it, or with the schedule cosine, cannot be extended, only branched
  sae-jax train --workdir=runs/c --branch_from=runs/a/checkpoints/4000 \\
      --config.optimizer.learning_rate=1e-4
      goes on from a checkpoint with Adam's state and its place in the data, and with other settings

Exit codes: 0 done, 2 a mistake in the input, 3 non-finite loss, 75 to be started again:
stopped by SIGTERM after saving, or another process of the run has died, or a step hung.
"""


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax train`."""
    flags.DEFINE_string(
        "workdir",
        None,
        "The run's directory, made if absent; alone, it resumes the run there.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "config",
        None,
        "A recipe, NAME[:ARGUMENT], or FILE.py[:arg] with get_config(arg).",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "show",
        False,
        "Print the config with all that the data and the architecture decide, and end.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "branch_from",
        None,
        "A checkpoint to go on from, RUN/checkpoints/STEP, or RUN for its latest. The config is "
        "that run's, with the given --config fields changed.",
        flag_values=values,
    )
    counts.define(
        "extend_tokens",
        None,
        "Make the run that --branch_from names longer: so many tokens, from its beginning.",
        values,
    )
    logs.define(values)
    distributed.define(values)


def run(args: flags.FlagValues, overrides: dict[str, str]) -> int:
    """Trains the run, or shows its config, and returns the exit code."""
    if not args.workdir and not args.show:
        raise UserError("--workdir=RUN is needed: the directory to train in")
    config = _config(args, overrides)
    if args.show:
        return _show(config)
    if not config.data.store:
        raise UserError(
            f"{args.workdir} holds no run to resume, and no activations are given; add "
            "--config.data.store=STORE (make one with: sae-jax harvest)"
        )

    import jax  # after the mistakes that need no device

    from sae_jax import interop
    from sae_jax.paths import as_json
    from sae_jax.train import loggers, preemption
    from sae_jax.train.recorder import NonFiniteError
    from sae_jax.train.run import train_run

    log_to = loggers.parse_log(args.log, args.workdir)
    with distributed.joined(args) as progress:
        try:
            result = train_run(
                config, args.workdir, load_sae=interop.load, progress=progress, log_to=log_to
            ).result
        except preemption.PreemptedError as stopped:
            print(f"sae-jax train: {stopped}; start it again to go on", file=sys.stderr)
            return preemption.EXIT_CODE
        except NonFiniteError as error:
            print(f"sae-jax train: error: {error}", file=sys.stderr)
            return 3
        if jax.process_index() == 0:
            print(as_json(result), end="")
    return 0


def _config(args: flags.FlagValues, overrides: dict[str, str]) -> configs.Config:
    """Returns the config that the flags ask for: of a file, of a run that is there, or a branch."""
    if args.extend_tokens and (args.config or not args.branch_from):
        there = args.workdir if args.workdir and not args.branch_from else "RUN"
        raise UserError(
            "--extend_tokens makes a longer run of one that is there, which stays as it is: give "
            f"--branch_from={there}, a new --workdir for the longer one, and no --config"
        )
    if args.branch_from:
        from sae_jax.train import branch

        changes = {} if args.config else overrides
        found = branch.find(args.branch_from, args.extend_tokens, changes, args.workdir)
        if not args.config:
            return found
        begin = {"train.branch_from": found.train.branch_from}
        return configs.override(configs.assign(configs.load_file(args.config), begin), overrides)
    if args.config:
        return configs.override(configs.load_file(args.config), overrides)

    from sae_jax import paths
    from sae_jax.train.directory import run_there

    there = run_there(paths.path(args.workdir)) if args.workdir else None
    return configs.override(there or configs.Config(), overrides)


def _show(config: configs.Config) -> int:
    """Prints the config as JSON: resolved where there is a store, which decides the widths."""
    from sae_jax.paths import as_json

    if config.data.store:
        from sae_jax import lm
        from sae_jax.train import preparation

        config = preparation.resolve(config, lm.open_stream(config.data))
    else:
        print("no --config.data.store=STORE, whose widths decide some fields", file=sys.stderr)
    print(as_json(configs.to_dict(config)), end="")
    return 0
