"""SIGTERM: every process learns of it at the same step, saves, and exits."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL: start the same command again


class PreemptedError(Exception):
    """The run was told to stop; its state is saved at `step`, 0 where there is none to save."""

    def __init__(self, step: int):
        super().__init__("stopped by SIGTERM" + (f"; saved at step {step}" if step else ""))
        self.step = step


class Preemption:
    """Whether to stop at this step. A single process listens to the signal itself; under
    `jax.distributed` the signal may reach one process only, and its preemption service makes
    all agree on one step."""

    def __init__(self):
        self._told = False
        self._distributed = jax.distributed.is_initialized()

    def __enter__(self) -> "Preemption":
        if not self._distributed and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_) -> None:
        if hasattr(self, "_previous"):
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        if self._distributed:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told

    def _hear(self, *_) -> None:
        self._told = True


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM raises PreemptedError, in this process alone: for work that is not in steps."""
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
