"""Joins the processes of one program, for the commands that several processes can run."""

import collections
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags

from sae_jax.cli import counts
from sae_jax.errors import UserError

if TYPE_CHECKING:
    from sae_jax.train.progress import Progress

_SETTLING_SECONDS = 30  # JAX's own heartbeat, a backstop, must never be faster than the watchdog

flags.disclaim_key_flags()  # they are the command's that defines them, in its --help


def define(values: flags.FlagValues) -> None:
    """Defines the flags of commands that several processes can run as one program."""
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
    counts.define_float(
        "start_seconds",
        300.0,
        "How long processes wait for each other at the start, before they say who is missing.",
        values,
        lower_bound=1.0,
        upper_bound=86_400.0,
    )
    counts.define_float(
        "heartbeat_seconds",
        60.0,
        "A process that is silent for so long is dead: the others say so and end, to be started "
        "again.",
        values,
        lower_bound=2.0,
        upper_bound=86_400.0,
    )
    counts.define_float(
        "watchdog_seconds",
        600.0,
        "A step that takes longer is stuck: all processes say so and end, to be started again. 0: "
        "wait for ever.",
        values,
        lower_bound=0.0,
        upper_bound=1e9,
    )
    flags.DEFINE_integer(
        "watchdog_port",
        0,
        "A TCP port of process 0's host to which the others can connect, to tell how they are; 0: "
        "any that is free.",
        lower_bound=0,
        upper_bound=65535,
        flag_values=values,
    )


@contextlib.contextmanager
def joined(args: flags.FlagValues, stops_at_a_step: bool = True) -> Iterator["Progress"]:
    """Joins this process to the program's others, if the flags say that there are several.

    The process is watched (`train.watchdog`) until the context is left. The context gives the
    Progress that is watched, for the code that takes steps. An error in one process ends them all,
    and an orderly end waits for all.

    Raises UserError if the processes do not find each other.

    Args:
      args: the flags that `define` defined.
      stops_at_a_step: whether the command asks JAX at every step whether to stop. If it does not,
        SIGTERM raises PreemptedError in the process that gets it.
    """
    from sae_jax.train import preemption, watchdog
    from sae_jax.train.last_words import HeldAbort
    from sae_jax.train.progress import Progress

    progress, limits = Progress(), (args.heartbeat_seconds, args.watchdog_seconds)
    several = bool(args.distributed or args.coordinator)
    if several:
        abort = HeldAbort(watchdog.LOST)
        _join(args)
        host = args.coordinator and args.coordinator.rpartition(":")[0].strip("[]")
        watch = watchdog.open_watchdog(progress, *limits, abort, host, args.watchdog_port)
    else:
        watch = watchdog.Watchdog(progress, *limits)
    watch.start()
    try:
        with contextlib.nullcontext() if stops_at_a_step else preemption.sigterm_raises():
            yield progress
    except BaseException as error:
        if several:
            watch.fail(error)
        else:
            watch.stop()
        raise
    watch.end()


def _join(args: flags.FlagValues) -> None:
    import jax

    from sae_jax.train import last_words, meeting, preemption

    told = (args.coordinator, args.num_processes, args.process_id)
    try:
        if None not in told:
            meeting.meet(*told, seconds=args.start_seconds)
        jax.distributed.initialize(
            *told,
            initialization_timeout=int(args.start_seconds),
            heartbeat_timeout_seconds=int(2 * args.heartbeat_seconds) + _SETTLING_SECONDS,
        )
    except meeting.MissingError as error:
        last_words.say(str(error))
        last_words.exit_now(preemption.EXIT_CODE)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of this run do not find each other ({str(error).splitlines()[0]}); "
            "outside of Slurm, TPU and Kubernetes give each one --coordinator=HOST:PORT, "
            "--num_processes and its --process_id"
        ) from error
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        told = ", ".join(f"process {i} has {counts[i]}" for i in sorted(counts))
        raise UserError(
            f"the processes have different numbers of devices ({told}); give each the same, such "
            "as the same --cpu_devices"
        )
    if jax.default_backend() == "cpu":
        # A program that XLA:CPU reads from the cache does its collectives in any order, and gloo
        # mixes them up: seen with four processes on a mesh of 2 x 2, with jaxlib 0.10.2.
        jax.config.update("jax_enable_compilation_cache", False)
