"""Leases: which worker does which piece of work, agreed on by nothing but a shared directory.

    LEASES/NAME.GENERATION   one claim of NAME: whose, and for how many seconds without a heartbeat
    LEASES/clock             touched to ask the file system for the time

To claim NAME is to create the file of its next generation exclusively, which one worker alone
can. The owner touches its file, the heartbeat; whoever finds the newest generation untouched for
longer than it says may create the next one, and so takes the work over. No file is ever renamed or
removed, so that no two workers can mistake each other's files. Every time is the file system's
own: a host whose clock is wrong neither loses its leases nor takes those of others.

An owner that was thought dead (stopped, cut off) and wakes up sees a newer generation: it asks
`Lease.lost` before it writes. Between the answer and the write there is a moment in which the lease
can be lost: writes must be atomic, and the same whoever makes them.
"""

import contextlib
import dataclasses
import os
import pathlib
import socket
import threading

from absl import logging

_RELEASED = 0  # modification time of a lease that was given back


class LeaseLostError(Exception):
    """Another worker has taken the work over: it must not be written any more."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who claimed a piece of work last. age: seconds since the last heartbeat."""

    owner: str
    age: float
    alive: bool


class Leases:
    """The leases in `directory`. seconds: how long those claimed here may be silent."""

    def __init__(self, directory: pathlib.Path, seconds: float = 60):
        self._directory = directory
        self._seconds = seconds

    def claim(self, name: str) -> "Lease | None":
        """The lease of `name`, its heart already beating, or None if another worker has it."""
        self._directory.mkdir(parents=True, exist_ok=True)
        generation = self._newest(name)
        if generation and (holder := self._holder(name, generation)) and holder.alive:
            return None
        path = self._path(name, generation + 1)
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:  # another worker was faster
            return None
        owner = f"{socket.gethostname()} process {os.getpid()}"
        os.write(file, f"{self._seconds} {owner}".encode())
        return Lease(file, path, self._path(name, generation + 2), self._seconds / 6)

    def holder(self, name: str) -> Holder | None:
        """None where nobody has claimed `name`, or its last owner gave it back."""
        generation = self._newest(name)
        return self._holder(name, generation) if generation else None

    def _holder(self, name: str, generation: int) -> Holder | None:
        path = self._path(name, generation)
        beat = path.stat().st_mtime
        if beat == _RELEASED:
            return None
        clock = self._directory / "clock"
        clock.touch()
        age = max(0.0, clock.stat().st_mtime - beat)
        seconds, _, owner = path.read_text().partition(" ")
        # Empty in the moment in which it is made, and where its maker died in that moment.
        return Holder(owner or "?", age, age <= float(seconds or self._seconds))

    def _path(self, name: str, generation: int) -> pathlib.Path:
        return self._directory / f"{name}.{generation}"

    def _newest(self, name: str) -> int:
        """The newest generation of `name`, from 1; 0 before the first."""
        try:
            parts = [entry.rpartition(".") for entry in os.listdir(self._directory)]
        except FileNotFoundError:
            return 0
        return max((int(number) for before, _, number in parts if before == name), default=0)


class Lease:
    """A claim, until `release` or the end of the `with`. A thread touches its file meanwhile."""

    def __init__(self, file: int, path: pathlib.Path, next_path: pathlib.Path, interval: float):
        self._file = file
        self._path = path
        self._next_path = next_path
        self._interval = interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sae-jax-lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def lost(self) -> bool:
        """Whether another worker has taken over, or the lease was deleted."""
        return self._next_path.exists() or not self._path.exists()

    def release(self) -> None:
        """Gives the work back: whoever comes next need not wait for the lease to run out."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # deleted; then there is nothing to give back
            os.utime(self._file, (_RELEASED, _RELEASED))
        os.close(self._file)

    def _beat(self) -> None:
        while not self._ended.wait(self._interval):
            try:
                os.utime(self._file)
            except OSError as error:  # a share that is away for a moment; `check` will tell
                logging.warning("no heartbeat of %s: %s", self._path, error)
