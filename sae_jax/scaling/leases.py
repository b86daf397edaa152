"""Leases: which worker does which piece of work, agreed on by nothing but a shared directory.

    LEASES/NAME.GENERATION   one claim of NAME; the content says whose
    LEASES/clock             touched to ask the file system for the time

To claim NAME is to create the file of its next generation exclusively, which one worker alone
can. The owner touches its file, the heartbeat; whoever finds the newest generation untouched for
the lease's length may create the next one, and so takes the work over. No file is ever renamed or
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
    """The leases in `directory`, each good for `seconds` without a heartbeat."""

    def __init__(self, directory: pathlib.Path, seconds: float = 60):
        self._directory = directory
        self._seconds = seconds

    def claim(self, name: str) -> "Lease | None":
        """The lease of `name`, its heart already beating, or None if another worker has it."""
        self._directory.mkdir(parents=True, exist_ok=True)
        generation = self._newest(name)
        if generation and self._heard(self._path(name, generation))[1] <= self._seconds:
            return None
        path = self._path(name, generation + 1)
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:  # another worker was faster
            return None
        os.write(file, f"{socket.gethostname()} process {os.getpid()}".encode())
        return Lease(file, path, self._path(name, generation + 2), self._seconds / 6)

    def holder(self, name: str) -> Holder | None:
        """None where nobody has claimed `name`, or its last owner gave it back."""
        generation = self._newest(name)
        if not generation:
            return None
        path = self._path(name, generation)
        beat, age = self._heard(path)
        if beat == _RELEASED:
            return None
        return Holder(path.read_text(), age, age <= self._seconds)

    def _path(self, name: str, generation: int) -> pathlib.Path:
        return self._directory / f"{name}.{generation}"

    def _newest(self, name: str) -> int:
        """The newest generation of `name`, from 1; 0 before the first."""
        try:
            parts = [entry.rpartition(".") for entry in os.listdir(self._directory)]
        except FileNotFoundError:
            return 0
        return max((int(number) for before, _, number in parts if before == name), default=0)

    def _heard(self, path: pathlib.Path) -> tuple[float, float]:
        """The file system's times: of the last heartbeat, and how long ago that is in seconds."""
        beat = path.stat().st_mtime
        clock = self._directory / "clock"
        clock.touch()
        return beat, max(0.0, clock.stat().st_mtime - beat)


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
