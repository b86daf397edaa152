"""The file metrics.jsonl, which has a line for each logged step.

A killed run goes on with it from its last checkpoint.
"""

import concurrent.futures
import contextlib
import math
import time

from sae_jax import background, paths
from sae_jax.errors import UserError
from sae_jax.json_files import parse_json
from sae_jax.paths import AnyPath, ObjectPath

_SECONDS = 30  # until people who watch a run in an object store see new lines
_CLOSE_SECONDS = 30  # after which lines since the last checkpoint, trained again, are given up


def lines_until(file: AnyPath, step: int) -> str:
    """Returns the text of `file` up to `step`, without a last line that was cut by a kill."""
    kept = []
    for line in _text(file).splitlines(keepends=True):
        if (values := parsed(line)) and values["step"] <= step:
            kept.append(line)
    return "".join(kept)


def read_lines(file: AnyPath, step: float = math.inf) -> list[dict]:
    """Returns the lines of `file` up to `step`, oldest first, without those that were cut."""
    lines = map(parsed, _text(file).splitlines())
    return [values for values in lines if values and values["step"] <= step]


def _text(file: AnyPath) -> str:
    return file.read_bytes().decode(errors="replace")  # a line that is no text is left out


def parsed(line: str | bytes) -> dict | None:
    """Returns what a line holds, or None for one that was cut or is no line of metrics."""
    try:
        values = parse_json(line, "a line")
    except UserError:
        return None
    is_metrics = isinstance(values, dict) and isinstance(values.get("step"), int)
    return values if is_metrics else None


def open_after(file: AnyPath, step: int) -> "_LocalMetrics | _ObjectMetrics":
    """Opens `file` to add lines to it, without those of steps after `step`."""
    if isinstance(file, ObjectPath):
        return _ObjectMetrics(file, step)
    if file.exists():
        paths.write(file, lines_until(file, step))
    return _LocalMetrics(file)


class _LocalMetrics:
    """Adds lines to a file on this machine."""

    def __init__(self, file):
        self._path = file
        self._file = file.open("a")

    def add(self, line: str) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"could not write {self._path}: {error.strerror}; the last checkpoint is "
                "intact; make room and start the run again"
            ) from error

    def flush(self) -> None:
        """Does nothing, because every line is written when it is added."""

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a line that `add` could not write either
            self._file.close()


class _ObjectMetrics:
    """Adds lines to a file in an object store.

    Object stores cannot append, so the whole file is written again: at every `flush`, and every 30
    seconds in the background while the steps go on. Raises UserError if another process writes it
    too.
    """

    def __init__(self, file: ObjectPath, step: int):
        self._path = file
        self._lines, self._generation = [], None
        with contextlib.suppress(FileNotFoundError):
            self._generation = file.read()[1]
            self._lines = [lines_until(file, step)]
        self._writing: concurrent.futures.Future | None = None
        self._written = 0  # lines
        self._has_written = False
        self._due = time.monotonic() + _SECONDS

    def add(self, line: str) -> None:
        self._lines.append(line)
        if time.monotonic() > self._due and (self._writing is None or self._writing.done()):
            self._start_writing()

    def flush(self, seconds: float | None = None) -> None:
        """Returns when all lines are in the store. Raises TimeoutError where it is given `seconds`
        for each request and they do not do."""
        self._await_writing(seconds)
        if self._written < len(self._lines):
            self._start_writing()
            self._await_writing(seconds)

    def close(self) -> None:
        with contextlib.suppress(UserError, TimeoutError):
            self.flush(_CLOSE_SECONDS)

    def _start_writing(self) -> None:
        self._await_writing()
        self._written, self._due = len(self._lines), time.monotonic() + _SECONDS
        self._writing = background.start(self._write, "".join(self._lines).encode())

    def _await_writing(self, seconds: float | None = None) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result(seconds)

    def _write(self, data: bytes) -> None:
        generation = self._path.write_if(self._generation, data)
        if generation is None and not self._has_written:
            # A write that whoever had the run before has given up may have come in late.
            with contextlib.suppress(FileNotFoundError):
                generation = self._path.write_if(self._path.read()[1], data)
        self._has_written = True
        if generation is None:
            raise UserError(
                f"another process writes {self._path}; let one of them end, and start again"
            )
        self._generation = generation
