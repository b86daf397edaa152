"""The files of leases, in a directory or an object store: created exclusively, and touched.

LEASES/NAME.GENERATION   the text that it was created with; in an object store also a line
                         that changes with every touch and ends with the owner's time
LEASES/clock             only in a directory: touched to ask the file system for the time
"""

import errno
import os
import pathlib
import re
import time
import uuid
from typing import NamedTuple, Protocol

from sae_jax.paths import ObjectPath
from sae_jax.place_errors import explained

_RELEASED = 0  # modification time of a file that was given back
_GIVEN_BACK = b"given back"  # what an object then holds
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class Claim(Protocol):
    """A file that this process created.

    Attributes:
      name: the file's name.
    """

    name: str

    def beat(self) -> None:
        """Touches the file. A file that was deleted does not come back."""

    def release(self) -> None:
        """Marks the file as given back, for good."""


class Look(NamedTuple):
    """What one look at a file tells.

    Attributes:
      age: the seconds since its last touch; None at a first look into an object store.
      text: what it was created with.
      told: the age by the clocks of the owner and of this host, either of which may be wrong; None
        where the file does not say it, and where `age` is known from the last touch on, which was
        seen.
    """

    age: float | None
    text: str
    told: float | None = None


class LocalFiles:
    """The files of a directory, which may be shared over a network.

    It is made when it is needed.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory = directory

    def names(self) -> list[str]:
        """Returns the names of all files."""
        try:
            return os.listdir(self._directory)
        except FileNotFoundError:
            return []

    def create(self, name: str, text: str) -> Claim | None:
        """Creates a file that holds `text`. Returns None if it exists already."""
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(self._directory / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return None
        os.write(file, text.encode())
        return _LocalClaim(name, file)

    def look(self, name: str, to_show: bool = False) -> Look | None:
        """Returns what a file tells; None where it was given back.

        Args:
          name: the file's name.
          to_show: whether it is for people to read, and no reason to take work over. Then the
            host's clock does where the disk's may not be asked.

        Raises UserError if the file, or the one that tells the disk's clock, cannot be used.
        """
        path = self._directory / name
        with explained(path):
            beat = path.stat().st_mtime
            if beat == _RELEASED:
                return None
        now = self._now(to_show)
        with explained(path):
            return Look(max(0.0, now - beat), path.read_text(errors="replace"))

    def _now(self, to_show: bool) -> float:
        clock = self._directory / "clock"
        with explained(clock):
            try:
                clock.touch()
            except OSError as error:
                if to_show and error.errno in _READ_ONLY:
                    return time.time()
                raise
            return clock.stat().st_mtime


class _LocalClaim:
    def __init__(self, name: str, file: int):
        self.name = name
        self._file = file

    def beat(self) -> None:
        os.utime(self._file)

    def release(self) -> None:
        try:
            os.utime(self._file, (_RELEASED, _RELEASED))
        finally:
            os.close(self._file)


class ObjectFiles:
    """The files of an object store, whose clock cannot be asked.

    A file is as old as the time for which this reader has seen no change in it, by its own
    monotonic clock.
    """

    def __init__(self, directory: ObjectPath):
        self._directory = directory
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._seen_to_change: set[str] = set()

    def names(self) -> list[str]:
        """Returns the names of all files."""
        return self._directory.files()

    def create(self, name: str, text: str) -> Claim | None:
        """Creates a file that holds `text`. Returns None if it exists already."""
        claim = _ObjectClaim(self._directory / name, text)
        return claim if claim.beat() else None

    def look(self, name: str, to_show: bool = False) -> Look | None:
        """Returns what a file tells; None where it was given back."""
        del to_show  # it only reads in any case
        data = (self._directory / name).read_bytes()
        if data == _GIVEN_BACK:
            return None
        now = time.monotonic()
        before, since = self._seen.get(name, (None, now))
        if before != data:
            self._seen[name] = (data, now)
            since = now
            if before is not None:
                self._seen_to_change.add(name)
        text, _, beat = data.decode(errors="replace").partition("\n")
        _, _, clock = beat.partition(" ")
        told = None
        if re.fullmatch("[0-9]{1,15}", clock) and name not in self._seen_to_change:
            told = max(0.0, time.time() - int(clock))
        return Look(None if before is None else now - since, text, told)


class _ObjectClaim:
    def __init__(self, path: ObjectPath, text: str):
        self.name = path.name
        self._path = path
        self._text = text
        self._generation: bytes | None = None

    def beat(self) -> bool:
        return self._write(f"{self._text}\n{uuid.uuid4()} {time.time():.0f}".encode())

    def release(self) -> None:
        self._write(_GIVEN_BACK)

    def _write(self, data: bytes) -> bool:
        """Writes only if the file is still as this process left it; at first, only if there is
        none.
        """
        generation = self._path.write_if(self._generation, data)
        self._generation = generation or self._generation
        return generation is not None
