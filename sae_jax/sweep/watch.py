"""Follows the curves of many runs as they are trained, for the page that shows them.

A look asks which runs there are, and reads what is new of each that has not ended, side by side.
Where a run's metrics stood still at the last look, or have come to its last step, its state is
asked for, too; what has ended is never asked for again, unless it is trained again.
"""

import collections
import dataclasses
import secrets
import threading
import time
from collections.abc import Callable

from sae_jax.errors import UserError
from sae_jax.paths import AnyPath, ObjectPath
from sae_jax.sweep import grid as grids
from sae_jax.sweep.directory import SweepDirectory
from sae_jax.train import watching
from sae_jax.train.schedule_steps import count_steps
from sae_jax.train.watching import GrowingMetrics, at_once

_SECONDS = {False: 2.0, True: 20.0}  # between looks, at local runs and at those in object stores
_MOST = 1e100  # a number beyond it is no metric, and would overflow in what is computed of it
_POINTS, _POINTS_OF_RUN = 100_000, (100, 2000)  # what a browser draws at once; least and most


@dataclasses.dataclass(frozen=True)
class Watched:
    """A run to follow.

    Attributes:
      name: what the page calls it.
      path: its directory.
      steps: its number of steps.
      swept: what tells it from the others, in words.
      time: which time it is trained. When it is another, the curve begins anew.
    """

    name: str
    path: AnyPath
    steps: int
    swept: str = ""
    time: int = 0


class SweepRuns:
    """Finds the runs of a sweep, to which some may have been added."""

    def __init__(self, path: AnyPath):
        """Prepares to read the sweep in a directory. Nothing is read yet."""
        self._path = path
        self._seen: bytes | None = None  # of sweep.json: its content, or generation
        self._runs: list[Watched] = []

    def find(self) -> list[Watched]:
        """Returns the runs as they are now, in one request where they are as before.

        Raises UserError if there is no sweep, or it cannot be read.
        """
        file = self._path / "sweep.json"
        if isinstance(file, ObjectPath):
            _, now = file.read_part(slice(0, None), self._seen)
        else:
            now = file.read_bytes() if file.is_file() else None
        if now is None or now != self._seen:
            directory = SweepDirectory(self._path)
            alike = grids.shared([run.swept for run in directory.runs])
            self._runs = [
                Watched(
                    run.id,
                    directory.run_path(run),
                    count_steps(run.config),
                    grids.describe(grids.without(run.swept, alike)),
                    run.round,
                )
                for run in directory.runs
            ]
            self._seen = now
        return self._runs


class Watch:
    """What is known of the runs so far."""

    def __init__(self, find: Callable[[], list[Watched]]):
        """Prepares to follow the runs that `find` returns, now and at each look.

        Runs that it returns no more are shown as dropped. Raises UserError as it does now; later
        what keeps it from telling is shown, and the runs stay as they were.
        """
        self._find = find
        self._columns: dict[str, int] = {}
        self._curves: dict[AnyPath, _Curve] = {}  # in the order in which they came
        self._lock = threading.Lock()
        self._revision = 0
        self._next_look = 0.0
        self._problem = ""
        self._server = secrets.token_hex(8)
        self._follow(find())

    def _follow(self, runs: list[Watched]) -> None:
        """Follows new runs as well, and those anew that are trained again."""
        remote = any(isinstance(run.path, ObjectPath) for run in runs)
        self._interval = _SECONDS[remote]
        least, most = _POINTS_OF_RUN
        points = min(max(_POINTS // max(1, len(runs)), least), most)
        for run in runs:
            before = self._curves.get(run.path)
            if before is None or before.run.time != run.time:
                # The revision makes the page forget what it drew of the time before.
                again = before is not None
                self._curves[run.path] = _Curve(run, points, self._columns, self._revision, again)
            else:
                before.run = run
        left = {run.path for run in runs}
        for path, curve in self._curves.items():
            curve.dropped = path not in left

    def since(self, revision: int, server: str | None = None) -> dict:
        """Returns what is new since a revision, 0 for everything, after a look if one is due.

        Args:
          revision: what the last answer said, as the next is; that of another server is no
            revision of this one, and then everything is returned.
          server: None for this one.

        Returns:
          server: a name of this one, to tell it from another at the same port.
          revision: the one to ask for next.
          seconds: when to ask next.
          problem: why the last look failed, "" if it did not.
          columns: the names of the metrics.
          runs: for each run its name, swept, state, step, steps, quiet (seconds without anything
            new), left (seconds), last, the values of the last line in the order of the columns, and
            lines, a list of such for each to draw; with `reset` true the lines before are void.
        """
        with self._lock:
            if time.monotonic() >= self._next_look:
                self._look()
                self._next_look = time.monotonic() + self._interval
            if server not in (None, self._server) or not 0 <= revision <= self._revision:
                revision = 0
            return {
                "server": self._server,
                "revision": self._revision,
                "seconds": self._interval,
                "problem": self._problem,
                "columns": list(self._columns),
                "runs": [curve.since(revision) for curve in self._curves.values()],
            }

    def _look(self) -> None:
        self._revision += 1
        problems = []
        if self._revision > 1:  # the runs of the first look are those of __init__
            try:
                self._follow(self._find())
            except (UserError, OSError) as error:
                problems.append(str(error))
        going = [c for c in self._curves.values() if not (c.ended or c.dropped)]
        problems += at_once(_Curve.look, going)
        self._problem = next(filter(None, problems), "")
        for curve in going:
            curve.add_news(self._revision)


class _Curve:
    """The lines of one run, every so-manieth where there are many."""

    def __init__(
        self, run: Watched, points: int, columns: dict[str, int], revision: int, again: bool
    ):
        # Until the directory of one that is trained again is put aside, it has what had ended.
        self._may_be_old = again
        self.run, self._most, self._columns = run, points, columns
        self._metrics = GrowingMetrics(run.path / "metrics.jsonl")
        self._news: tuple[list[dict], bool] | None = None  # None: it could not be read
        self._stood_still = True
        self.ended = self.dropped = False
        self._state = "waiting"
        self._changed = time.monotonic()
        self._forget(revision)

    def _forget(self, revision: int) -> None:
        self._stride, self._seen, self._reset = 1, 0, revision
        self._lines: list[tuple[int, list]] = []  # with the revision of each
        self._last: dict = {}
        self._last_values: list = []
        self._rates: collections.deque[float] = collections.deque(maxlen=watching.SPEEDS)

    def look(self) -> str:
        """Reads what is new, for `add_news`, and returns why it cannot be read, "" if it can.

        A run that is away for a moment keeps none of the others waiting.
        """
        self._news = None
        try:
            if self._stood_still or self._step >= self.run.steps:
                self._state = watching.state(self.run.path)
                if (silent := watching.silent(self.run.path)) is not None:
                    self._changed = time.monotonic() - silent
            self._news = self._metrics.read_new()
        except (UserError, OSError) as error:
            return str(error)
        return ""

    def add_news(self, revision: int) -> None:
        """Adds what the last look has read, as new in this revision."""
        if self._news is None:
            return
        (lines, restarted), self._news = self._news, None
        # A run whose state was asked for before its metrics were read has no more to come.
        self.ended = self._state in ("done", "failed")
        self._may_be_old = self._may_be_old and self.ended and not restarted
        self.ended = self.ended and not self._may_be_old
        self._stood_still = not lines
        if lines:
            self._changed = time.monotonic()
            self._state = "started" if not self.ended else self._state
        if restarted:
            self._forget(revision)
        self._rates.extend(_number(values.get("tokens_per_second")) for values in lines)
        if lines:
            self._last, self._last_values = lines[-1], self._values(lines[-1])
        for line in lines:
            if self._seen % self._stride == 0:
                self._lines.append((revision, self._values(line)))
            self._seen += 1
        while len(self._lines) > self._most:
            self._lines = [(revision, values) for _, values in self._lines[::2]]
            self._stride, self._reset = 2 * self._stride, revision

    def _values(self, line: dict) -> list:
        numbers = {n: _number(v) for n, v in line.items() if type(v) in (int, float) or v is None}
        for name in numbers:
            self._columns.setdefault(name, len(self._columns))
        return [_short(numbers.get(name)) for name in self._columns]

    @property
    def _step(self) -> int | float:
        return _number(self._last.get("step")) or 0

    def since(self, revision: int) -> dict:
        reset = revision < self._reset or revision == 0
        fresh = [values for at, values in self._lines if reset or at > revision]
        return {
            "name": self.run.name,
            "swept": self.run.swept,
            "state": "dropped" if self.dropped else self._state,
            "step": self._step,
            "steps": self.run.steps,
            "quiet": round(time.monotonic() - self._changed),
            "left": self._seconds_left(),
            "reset": reset,
            "last": self._last_values,
            "lines": fresh,
        }

    def _seconds_left(self) -> float | None:
        tokens, steps_left = _number(self._last.get("tokens")) or 0, self.run.steps - self._step
        rate = watching.usual_speed(list(self._rates))
        if self._state != "started" or self.dropped or rate is None:
            return None
        if min(self._step, tokens, steps_left) <= 0:  # at the last step it is evaluated
            return None
        return _number(steps_left * tokens / self._step / rate)


def _number(value) -> int | float | None:
    """Returns a number that can be drawn; None for any other value, as for NaN and infinity."""
    return value if type(value) in (int, float) and -_MOST < value < _MOST else None


def _short(value: float | None) -> float | None:
    """Returns a number with six digits, which a curve needs no more of."""
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")
