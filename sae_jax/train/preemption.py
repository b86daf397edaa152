"""What SIGTERM does: every process learns of it at the same step, saves, and exits."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL: start the same command again


class PreemptedError(Exception):
    """The run was told to stop. Its state is saved at `step`, which is 0 where nothing is saved."""

    def __init__(self, step: int):
        super().__init__("stopped by SIGTERM" + (f"; saved at step {step}" if step else ""))
        self.step = step


class Preemption:
    """Knows, within `with`, whether the program was told to stop.

    A single process listens to SIGTERM itself. Under `jax.distributed` the signal may reach one
    process only, and JAX's preemption service makes all agree on one step.
    """

    def __init__(self):
        self._told_to_stop = False
        self._distributed = jax.distributed.is_initialized()

    def __enter__(self) -> "Preemption":
        if not self._distributed and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_) -> None:
        if hasattr(self, "_previous"):
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`. All processes call it at every step."""
        if self._distributed:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told_to_stop

    def _hear(self, *_) -> None:
        self._told_to_stop = True


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Makes SIGTERM raise PreemptedError in this process alone, for work that is not in steps."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise PreemptedError(0)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
