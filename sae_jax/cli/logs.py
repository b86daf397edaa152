"""Defines the flag --log of the commands that train."""

from absl import flags

flags.disclaim_key_flags()  # it is the command's that defines it, in its --help


def define(values: flags.FlagValues) -> None:
    """Defines the flag --log."""
    flags.DEFINE_string(
        "log",
        "",
        "Where the lines of metrics.jsonl go besides, separated by commas: wandb:PROJECT or "
        "wandb:ENTITY/PROJECT (Weights & Biases, under the run's id; WANDB_MODE=offline keeps it "
        'in RUN/wandb), tensorboard (event files in RUN/tensorboard). pip install "sae-jax[log]"',
        flag_values=values,
    )
