"""Follows the curves of many runs as they are trained, for the page that shows them.

A look reads what is new of each run that has not ended, side by side. Where a run's metrics stood
still at the last look, its state is asked for, too; what has ended is never asked for again.
"""

import dataclasses
import secrets
import threading
import time

from sae_jax.errors import UserError
from sae_jax.paths import AnyPath, ObjectPath
from sae_jax.train import watching
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
    """

    name: str
    path: AnyPath
    steps: int
    swept: str = ""


class Watch:
    """What is known of the runs so far."""

    def __init__(self, runs: list[Watched]):
        """Prepares to follow the runs; nothing is read yet."""
        remote = any(isinstance(run.path, ObjectPath) for run in runs)
        self._interval = _SECONDS[remote]
        least, most = _POINTS_OF_RUN
        points = min(max(_POINTS // max(1, len(runs)), least), most)
        self._columns: dict[str, int] = {}
        self._curves = [_Curve(run, points, self._columns) for run in runs]
        self._lock = threading.Lock()
        self._revision = 0
        self._next_look = 0.0
        self._problem = ""
        self._server = secrets.token_hex(8)

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
                "runs": [curve.since(revision) for curve in self._curves],
            }

    def _look(self) -> None:
        self._revision += 1
        going = [curve for curve in self._curves if not curve.ended]
        problems = at_once(_Curve.look, going)
        self._problem = next(filter(None, problems), "")
        for curve in going:
            curve.add_news(self._revision)


class _Curve:
    """The lines of one run, every so-manieth where there are many."""

    def __init__(self, run: Watched, points: int, columns: dict[str, int]):
        self._run, self._most, self._columns = run, points, columns
        self._metrics = GrowingMetrics(run.path / "metrics.jsonl")
        self._news: tuple[list[dict], bool] | None = None  # None: it could not be read
        self._stood_still = True
        self.ended = False
        self._state = "waiting"
        self._changed = time.monotonic()
        self._forget(0)

    def _forget(self, revision: int) -> None:
        self._stride, self._seen, self._reset = 1, 0, revision
        self._lines: list[tuple[int, list]] = []  # with the revision of each
        self._last: dict = {}
        self._last_values: list = []

    def look(self) -> str:
        """Reads what is new, for `add_news`, and returns why it cannot be read, "" if it can.

        A run that is away for a moment keeps none of the others waiting.
        """
        self._news = None
        try:
            if self._stood_still:
                self._state = watching.state(self._run.path)
                if (silent := watching.silent(self._run.path)) is not None:
                    self._changed = time.monotonic() - silent
            self._news = self._metrics.read_new()
        except (UserError, OSError) as error:
            return str(error)
        return ""

    def add_news(self, revision: int) -> None:
        """Adds what the last look has read, as new in this revision."""
        if self._news is None:
            return
        lines, restarted = self._news
        # A run whose state was asked for before its metrics were read has no more to come.
        self.ended = self._state in ("done", "failed")
        self._stood_still = not lines
        if lines:
            self._changed = time.monotonic()
            self._state = "started" if not self.ended else self._state
        if restarted:
            self._forget(revision)
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

    def since(self, revision: int) -> dict:
        reset = revision < self._reset or revision == 0
        fresh = [values for at, values in self._lines if reset or at > revision]
        return {
            "name": self._run.name,
            "swept": self._run.swept,
            "state": self._state,
            "step": _number(self._last.get("step")) or 0,
            "steps": self._run.steps,
            "quiet": round(time.monotonic() - self._changed),
            "left": self._seconds_left(),
            "reset": reset,
            "last": self._last_values,
            "lines": fresh,
        }

    def _seconds_left(self) -> float | None:
        names = ("step", "tokens", "tokens_per_second")
        step, tokens, rate = (_number(self._last.get(name)) or 0 for name in names)
        if self._state != "started" or not min(step, tokens, rate) > 0:
            return None
        return _number(max(0, self._run.steps - step) * tokens / step / rate)


def _number(value) -> int | float | None:
    """Returns a number that can be drawn; None for any other value, as for NaN and infinity."""
    return value if type(value) in (int, float) and -_MOST < value < _MOST else None


def _short(value: float | None) -> float | None:
    """Returns a number with six digits, which a curve needs no more of."""
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")
