"""What SIGTERM does: every process learns of it at the same step, saves, and exits."""

import contextlib
import faulthandler
import signal
import socket
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


class StoppedWaiting(Exception):  # noqa: N818
    """The program was told to stop while it waited for something other than a device."""


class Sigterm:
    """Notices SIGTERM, also while the main thread is stuck and runs no handler of Python's.

    It changes nothing of what the signal does.
    """

    def __init__(self):
        """Begins to listen. The main thread calls it, after `jax.distributed` is initialised."""
        self._read, self._written = socket.socketpair()
        for end in (self._read, self._written):
            end.setblocking(False)
        self._numbers = threading.current_thread() is threading.main_thread()
        if not self._numbers:
            return
        signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        if jax.distributed.is_initialized():
            # JAX's own handler is not one of Python's. This one is called first, and writes a trace
            # to where it is thrown away.
            faulthandler.register(signal.SIGTERM, self._written.fileno(), False, chain=True)

    def close(self) -> None:
        """Stops listening."""
        if self._numbers:
            signal.set_wakeup_fd(-1)
            faulthandler.unregister(signal.SIGTERM)
        self._read.close()
        self._written.close()

    def came(self) -> bool:
        """Whether SIGTERM has come since the last call."""
        heard = b""
        with contextlib.suppress(BlockingIOError):
            while part := self._read.recv(4096):
                heard += part
        # A byte with the number of the signal, or the trace.
        return bytes([signal.SIGTERM]) in heard or b"Thread" in heard or b"thread" in heard


class Preemption:
    """Knows, within `with`, whether the program was told to stop.

    A single process listens to SIGTERM itself. Under `jax.distributed` the signal may reach one
    process only, and JAX's preemption service makes all agree on one step.
    """

    def __init__(self):
        self._told_to_stop = self._interruptible = False
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

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Makes SIGTERM raise StoppedWaiting within it, for waits that may last.

        Where there are several processes it does not, since all must stop at one step.
        """
        self._interruptible = True
        try:
            if self._told_to_stop:
                raise StoppedWaiting
            yield
        finally:
            self._interruptible = False

    def _hear(self, *_) -> None:
        self._told_to_stop = True
        if self._interruptible:
            raise StoppedWaiting


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
