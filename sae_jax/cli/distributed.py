"""Flags and start of the processes of one JAX program, for the commands that can be several."""

from absl import flags

from sae_jax.config import UserError

_HEARTBEAT_SECONDS = 30  # until the others end too when one process of a program has died

flags.disclaim_key_flags()  # they are the command's that defines them, in its --help


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_bool(
        "distributed",
        False,
        "Join the other processes of this program (jax.distributed; on Slurm, TPU and Kubernetes "
        "nothing else is needed).",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where no scheduler tells.", flag_values=values
    )
    flags.DEFINE_integer("process_id", None, "This process, from 0.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "How many there are.", flag_values=values)


def join(args: flags.FlagValues) -> None:
    """Joins the other processes if the flags say that there are some."""
    import jax

    if not (args.distributed or args.coordinator):
        return
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of this run do not find each other ({str(error).splitlines()[0]}); "
            "outside of Slurm, TPU and Kubernetes give each one --coordinator=HOST:PORT, "
            "--num_processes and its --process_id"
        ) from error
