"""Trains one SAE: `sae-jax train`."""

import sys

from absl import flags

from sae_jax import config as configs
from sae_jax.cli import distributed, logs
from sae_jax.errors import UserError

SUMMARY = """Train a sparse autoencoder on an activation store; the same command resumes it.

  sae-jax train --workdir=runs/a --config=openai_topk \\
      --config.data.store=stores/gpt2 --config.sae.d_sae=16384 --config.train.tokens=100e6

  sae-jax train --workdir=runs/b --config.train.init=their_sae --config.sae.d_sae=24576 \\
      --config.data.store=stores/gpt2          (goes on with an SAE that is there)

  sae-jax train ... --log=wandb:my_project,tensorboard     (see --log below)

Without --config it starts from the defaults. RUN gets config.json, metrics.jsonl, checkpoints/
and, at the end, result.json. Stopped by SIGTERM or Ctrl-C, or killed, it goes on from its last
checkpoint. Exit codes: 0 done, 2 a mistake in the input, 3 non-finite loss, 75 to be started again:
stopped by SIGTERM after saving, or another process of the run has died, or a step hung.
"""


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax train`."""
    flags.DEFINE_string("workdir", None, "The run's directory, made if absent.", flag_values=values)
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
    logs.define(values)
    distributed.define(values)


def run(args: flags.FlagValues, overrides: dict[str, str]) -> int:
    """Trains the run, or shows its config, and returns the exit code."""
    if not args.workdir and not args.show:
        raise UserError("--workdir=RUN is needed: the directory to train in")
    config = configs.load_file(args.config) if args.config else configs.Config()
    config = configs.override(config, overrides)
    if args.show:
        return _show(config)
    if not config.data.store:
        raise UserError(
            "no activations given; add --config.data.store=STORE (make one with: sae-jax harvest)"
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
