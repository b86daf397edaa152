"""Time for last words when C++ code aborts this process.

JAX aborts a process (SIGABRT) within milliseconds of the death of process 0, without a way to turn
that off and before anybody could say which process it was."""

import faulthandler
import signal
import socket
import struct
import sys
import threading
import time


class HeldAbort:
    """Delays an abort of this process by `seconds`. `begun` is set when one begins.

    The handler of SIGABRT is that of `faulthandler`, which writes the traces of all threads in
    the thread that aborts. It writes to a socket here that holds a few words. The rest of the
    traces is read, and shown on stderr, after `seconds`: until then the aborting thread waits for
    room, and all other threads go on. Where a thread aborts that lets no other Python thread run,
    each of its writes gives up after 20 ms, so that the process still ends, without traces."""

    def __init__(self, seconds: float):
        self.begun = threading.Event()
        self._seconds = seconds
        self._read, self._written = socket.socketpair()
        self._written.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is
        timeout = struct.pack("ll", 0, 20_000)  # a C timeval, of microseconds
        self._written.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        faulthandler.enable(self._written.fileno())
        for number in (signal.SIGSEGV, signal.SIGFPE, signal.SIGBUS, signal.SIGILL):
            signal.signal(number, signal.SIG_DFL)  # ends the process at once, as ever
        threading.Thread(target=self._show, name="held-abort", daemon=True).start()

    def _show(self) -> None:
        words = self._read.recv(1)
        self.begun.set()
        time.sleep(self._seconds)
        while words:
            sys.stderr.write(words.decode(errors="replace"))
            sys.stderr.flush()
            words = self._read.recv(4096)
