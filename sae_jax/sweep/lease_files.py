"""The files of leases, in a directory or an object store: created exclusively, touched, looked at.

LEASES/NAME.GENERATION   the text that it was created with; in an object store also a line
                         that changes with every touch
LEASES/clock             of a directory: touched to ask the file system for the time
"""

import os
import pathlib
import time
import uuid
from typing import Protocol

from sae_jax.paths import ObjectPath

_RELEASED = 0  # modification time of a file that was given back
_GIVEN_BACK = b"given back"  # what an object then holds


class Claim(Protocol):
    """A file that this process created."""

    name: str

    def beat(self) -> None:
        """Touches it. It does not come back once it was deleted."""

    def release(self) -> None:
        """Marks it as given back, for good."""


class LocalFiles:
    """Of a directory, made when needed, which may be shared over a network."""

    def __init__(self, directory: pathlib.Path):
        self._directory = directory

    def names(self) -> list[str]:
        try:
            return os.listdir(self._directory)
        except FileNotFoundError:
            return []

    def create(self, name: str, text: str) -> Claim | None:
        """None if the file is there already."""
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(self._directory / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return None
        os.write(file, text.encode())
        return _LocalClaim(name, file)

    def look(self, name: str) -> tuple[float, str] | None:
        """(seconds since its last touch, its text); None where it was given back."""
        path = self._directory / name
        beat = path.stat().st_mtime
        if beat == _RELEASED:
            return None
        clock = self._directory / "clock"
        clock.touch()
        return max(0.0, clock.stat().st_mtime - beat), path.read_text()


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
    """Of an object store, whose clock cannot be asked: a file is as old as this reader, by its own
    monotonic clock, has seen no change in it."""

    def __init__(self, directory: ObjectPath):
        self._directory = directory
        self._seen: dict[str, tuple[bytes, float]] = {}

    def names(self) -> list[str]:
        return self._directory.files()

    def create(self, name: str, text: str) -> Claim | None:
        claim = _ObjectClaim(self._directory / name, text)
        return claim if claim.beat() else None

    def look(self, name: str) -> tuple[float | None, str] | None:
        """As `LocalFiles.look`; of the first look at a file its age is None."""
        data = (self._directory / name).read_bytes()
        if data == _GIVEN_BACK:
            return None
        now = time.monotonic()
        before, since = self._seen.get(name, (None, now))
        if before != data:
            self._seen[name] = (data, now)
            since = now
        return None if before is None else now - since, data.decode().partition("\n")[0]


class _ObjectClaim:
    def __init__(self, path: ObjectPath, text: str):
        self.name = path.name
        self._path = path
        self._text = text
        self._generation: bytes | None = None

    def beat(self) -> bool:
        return self._write(f"{self._text}\n{uuid.uuid4()}".encode())

    def release(self) -> None:
        self._write(_GIVEN_BACK)

    def _write(self, data: bytes) -> bool:
        """Only where it is still as this process left it: at first, where there is none."""
        generation = self._path.write_if(self._generation, data)
        self._generation = generation or self._generation
        return generation is not None
