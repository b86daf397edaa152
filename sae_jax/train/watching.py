"""Looks at runs that other programs train: what state each is in, and what it has logged.

In an object store a look is one request for the state of a run, and one for its metrics, of which
only what is new is read. A run whose metrics have grown needs no look at its state. Runs are looked
at side by side.
"""

import concurrent.futures
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import msgspec

from sae_jax.errors import UserError
from sae_jax.json_files import checked, parse_json, read_json
from sae_jax.paths import AnyPath, ObjectPath
from sae_jax.train.metrics import parsed

STATES = ("waiting", "started", "done", "failed")

_FILES = {"result.json": "done", "failed.json": "failed", "config.json": "started"}
_TAIL = 8192  # bytes at the end of metrics.jsonl, more than its last line has
SPEEDS = 5  # of so many of its lines the median is taken
_OVERLAP = 256  # bytes that are read again, to see that the file has only grown
_AT_ONCE = 32
_STALE_SECONDS, _STALE_LINES = 300.0, 20.0  # silence that a run which is going on does not keep


@dataclasses.dataclass(frozen=True)
class _Train:
    tokens: Annotated[int, msgspec.Meta(ge=1)]
    log_every: int


@dataclasses.dataclass(frozen=True)
class _Data:
    batch_size: Annotated[int, msgspec.Meta(ge=1)]


@dataclasses.dataclass(frozen=True)
class _Config:
    """What is needed of config.json, whatever architecture it is of."""

    train: _Train
    data: _Data

    @property
    def steps(self) -> int:
        return self.train.tokens // self.data.batch_size


@dataclasses.dataclass(frozen=True)
class Line:
    """What the status needs of a line of metrics.jsonl.

    Attributes:
      step: the step that was logged; 0 before there is a line.
      loss: its loss; None where it is not finite.
      tokens_per_second: the speed, the median of the last lines', since one behind a checkpoint is
        slow; None where it is not known.
    """

    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """Where a run stands.

    Attributes:
      state: one of `STATES`.
      step: the last step that it has logged.
      steps: its number of steps.
      loss: the last loss that it has logged, None where there is none.
      silent: the seconds since it was last written to; None where the place cannot tell.
      stale: whether it is started and has been silent for longer than a run is that goes on.
      seconds_left: the time until it ends; None where it does not go on, or has not for long enough
        to tell.
    """

    state: str
    step: int
    steps: int
    loss: float | None
    silent: float | None
    stale: bool
    seconds_left: float | None


def at_once(function: Callable, items: Iterable) -> list:
    """Returns `function` of each item, in order, with up to 32 calls side by side."""
    items = list(items)
    if len(items) < 2:
        return [function(item) for item in items]
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(function, items))


def state(run: AnyPath) -> str:
    """Returns one of `STATES` for the run in a directory; in an object store in one request."""
    if isinstance(run, ObjectPath):
        names = set(run.files(after="checkpoints"))
        return next((state for name, state in _FILES.items() if name in names), "waiting")
    return next((state for name, state in _FILES.items() if (run / name).is_file()), "waiting")


def status(run: AnyPath) -> RunStatus:
    """Returns where the run in a directory stands. Raises UserError if there is no run, or its
    config or its metrics cannot be read."""
    config = _read_config(run)
    now, file = state(run), run / "metrics.jsonl"
    line = last_line(file)
    quiet = silent(run)
    left, stale = None, False
    if now == "started" and line.tokens_per_second:
        step_seconds = config.data.batch_size / line.tokens_per_second
        left = (config.steps - line.step) * step_seconds
        most = max(_STALE_SECONDS, _STALE_LINES * config.train.log_every * step_seconds)
        stale = quiet is not None and quiet > most
    elif now == "started":
        stale = quiet is not None and quiet > _STALE_SECONDS
    return RunStatus(now, line.step, config.steps, line.loss, quiet, stale, None if stale else left)


def read_steps(run: AnyPath) -> int:
    """Returns the number of steps of a run. Raises UserError if its config cannot be read."""
    return _read_config(run).steps


def _read_config(run: AnyPath) -> _Config:
    return checked(read_json(run / "config.json"), _Config, run / "config.json")


def silent(run: AnyPath) -> float | None:
    """Returns the seconds since a run of this machine was written to; None where there is nothing
    yet, and in an object store, which does not tell."""
    if isinstance(run, ObjectPath):
        return None
    files = [run / "metrics.jsonl", run / "config.json"]
    times = [file.stat().st_mtime for file in files if file.exists()]
    return max(0.0, time.time() - max(times)) if times else None


def failure(run: AnyPath) -> str:
    """Returns why a run that failed was given up, in words."""
    reason = read_json(run / "failed.json", default={}).get("reason")
    return reason if isinstance(reason, str) else "failed.json does not say why"


def last_line(file: AnyPath) -> Line:
    """Returns the last whole line of a run's metrics.jsonl, or the default before there is one.

    Raises UserError if it is no line of metrics, or cannot be read.
    """
    whole = _tail(file).rpartition(b"\n")[0]
    if not whole:
        return Line()
    where = f"the last line of {file}"
    lines = whole.rsplit(b"\n", SPEEDS)[-SPEEDS:]
    last = checked(parse_json(lines[-1], where), Line, where)
    before = [(parsed(line) or {}).get("tokens_per_second") for line in lines[:-1]]
    rate = usual_speed([*before, last.tokens_per_second])
    return dataclasses.replace(last, tokens_per_second=rate)


def usual_speed(rates: Sequence) -> float | None:
    """Returns the median of the last tokens a second of a run, None where none is a speed.

    A line behind a checkpoint is slow.
    """
    rates = [rate for rate in rates[-SPEEDS:] if type(rate) in (int, float) and 0 < rate < math.inf]
    return statistics.median(rates) if rates else None


def _tail(file: AnyPath) -> bytes:
    """Returns the last bytes of a file, all of a short one, none where there is no file."""
    if isinstance(file, ObjectPath):
        tail, _ = file.read_part(slice(-_TAIL, None))
        return file.read_part(slice(0, None))[0] or b"" if tail is None else tail
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - _TAIL))
            return opened.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


class GrowingMetrics:
    """A run's metrics.jsonl, of which each look reads what is new.

    A run that goes on from a checkpoint writes the lines after it anew. That is seen by the last
    bytes that were read, which are read again with what follows them.
    """

    def __init__(self, file: AnyPath):
        """Prepares to read `file`, which need not exist yet."""
        self._file = file
        self._end = 0  # of the last whole line
        self._overlap = b""  # the bytes before it
        self._generation: bytes | None = None  # of an object

    def read_new(self) -> tuple[list[dict], bool]:
        """Returns the lines that were not returned before, and whether all lines before are void.

        Lines that are no JSON object with a step are left out. Raises UserError if the file cannot
        be read.
        """
        first = self._end - len(self._overlap)
        data = self._read(first)
        if data is None:
            return [], False
        restarted = not data.startswith(self._overlap)
        if restarted:
            first, self._generation, self._overlap = 0, None, b""
            data = self._read(0) or b""
        whole = data[: data.rfind(b"\n") + 1]
        fresh = whole[len(self._overlap) :]
        self._end = first + len(whole)
        self._overlap = whole[-_OVERLAP:]
        lines = [line for line in map(parsed, fresh.splitlines()) if line]
        return lines, restarted

    def _read(self, first: int) -> bytes | None:
        """Returns the file from byte `first` on: b"" where it has become shorter, None where it is
        not there yet, or is as it was."""
        if isinstance(self._file, ObjectPath):
            data, generation = self._file.read_part(slice(first, None), self._generation)
            if data is None and generation is not None:
                return None
            self._generation = generation
        else:
            try:
                with self._file.open("rb") as opened:
                    opened.seek(first)
                    data = opened.read()
            except FileNotFoundError:
                data = None
            except OSError as error:
                raise UserError(f"cannot read {self._file}: {error.strerror}") from None
        if data is None and not self._end:
            return None
        return data or b""
