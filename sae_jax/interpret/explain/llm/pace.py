"""Keeps requests within what a server allows in a minute, and quiet while it asks for that."""

import threading
import time
from collections.abc import Callable


class Pace:
    """When requests may go, so that no more than so many tokens go in a minute.

    A request waits until those before it have had their share of the minute.
    """

    def __init__(self, tokens_per_minute: int | None):
        """Takes how many tokens may go in a minute; None for no limit."""
        self._seconds = 60.0 / tokens_per_minute if tokens_per_minute else 0.0  # of a token
        self._free = self._not_before = 0.0
        self._lock = threading.Lock()

    def wait(self, tokens: int, sleep: Callable[[float], None]) -> None:
        """Calls `sleep` with seconds until a request of so many tokens may go."""
        with self._lock:
            begin = max(time.monotonic(), self._free)
            self._free = begin + tokens * self._seconds
        while (left := max(begin, self._not_before) - time.monotonic()) > 0:
            sleep(left)

    def correct(self, tokens: int) -> None:
        """Notes that a request took so many tokens more than was thought, or fewer."""
        with self._lock:
            self._free += tokens * self._seconds

    def pause(self, seconds: float) -> None:
        """Keeps all requests for a while, since the server asks for it."""
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + seconds)
