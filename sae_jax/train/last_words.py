"""Ends a process that cannot end in good order: with one line on stderr, and at once."""

import faulthandler
import logging
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

from sae_jax.train.preemption import EXIT_CODE

_HOLD_SECONDS = 7.0


def say(text: str) -> None:
    """Writes one line on stderr."""
    line = f"sae-jax: {' '.join(text.split())}\n"
    sys.stderr.write("\n" + line if sys.stderr.isatty() else line)


_farewells: list[Callable[[], object]] = []


def before_leaving(farewell: Callable[[], object]) -> None:
    """Sets what `leave` calls first, such as a wait for other processes to hear of an error."""
    _farewells[:] = [farewell]


def leave(code: int) -> None:
    """Ends the process after an error, when what `before_leaving` set has been called.

    It does not wait for threads: those of a checkpoint that cannot be written take minutes.
    """
    for farewell in _farewells:
        farewell()
    exit_now(code)


def exit_now(code: int) -> None:
    """Ends the process without waiting for its threads or for other processes."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class HeldAbort:
    """Holds up an abort (SIGABRT) of this process by JAX, so that it can say last words first.

    JAX aborts a process within milliseconds of the death of process 0. No public setting turns
    that off (as of 0.10.2).

    The handler of SIGABRT is that of `faulthandler`, which writes the traces of all threads in
    the thread that aborts. It writes to a socket here that has room for a few words. The rest of
    the traces is read, and shown on stderr, after 7 seconds: until then the aborting thread waits
    for room, and all other threads go on. Where a thread aborts that lets no other Python thread
    run, each of its writes gives up after 20 ms, so that the process ends, without the traces.

    Attributes:
      begun: an event that is set when an abort begins.
      last_words: if not None, an abort ends the process at once, with this line and exit code 75.
    """

    def __init__(self, last_words: str | None = None):
        """Takes over SIGABRT. The main thread calls it."""
        self.begun = threading.Event()
        self.last_words = last_words
        self._read, self._written = socket.socketpair()
        self._written.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is
        self._let_writes_wait(microseconds=20_000)
        faulthandler.enable(self._written.fileno())
        for number in (signal.SIGSEGV, signal.SIGFPE, signal.SIGBUS, signal.SIGILL):
            signal.signal(number, signal.SIG_DFL)  # they end the process at once
        threading.Thread(target=self._hold, name="held-abort", daemon=True).start()

    def _let_writes_wait(self, microseconds: int) -> None:
        """Sets how long a write waits for room; 0 microseconds stand for ever."""
        timeval = struct.pack("ll", 0, microseconds)
        self._written.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def _hold(self) -> None:
        traces = self._read.recv(1)
        self._let_writes_wait(0)
        self.begun.set()
        if self.last_words is not None:
            say(self.last_words)
            exit_now(EXIT_CODE)
        time.sleep(_HOLD_SECONDS)
        while traces:
            sys.stderr.write(traces.decode(errors="replace"))
            sys.stderr.flush()
            traces = self._read.recv(4096)
