"""Follows the curves of many runs as they are trained, for the page that shows them.

A look reads what is new of each run that has not ended, side by side. Where a run's metrics stood
still at the last look, its state is asked for, too; what has ended is never asked for again.
"""

import dataclasses
import threading
import time

from sae_jax.errors import UserError
from sae_jax.paths import AnyPath, ObjectPath
from sae_jax.train import watching
from sae_jax.train.watching import GrowingMetrics, at_once

_SECONDS = {False: 2.0, True: 20.0}  # between looks, at local runs and at those in object stores
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

    def since(self, revision: int) -> dict:
        """Returns what is new since a revision, 0 for everything, after a look if one is due.

        Returns:
          revision: the one to ask for next.
          seconds: when to ask next.
          problem: why the last look failed, "" if it did not.
          columns: the names of the metrics.
          runs: for each run its name, swept, state, step, steps, quiet (seconds without anything
            new), left (seconds) and lines, each a list of values in the order of the columns; with
            `reset` true the lines before are void.
        """
        with self._lock:
            if time.monotonic() >= self._next_look:
                self._look()
                self._next_look = time.monotonic() + self._interval
            if not 0 <= revision <= self._revision:  # of a server before this one
                revision = 0
            return {
                "revision": self._revision,
                "seconds": self._interval,
                "problem": self._problem,
                "columns": list(self._columns),
                "runs": [curve.since(revision) for curve in self._curves],
            }

    def _look(self) -> None:
        self._revision += 1
        going = [curve for curve in self._curves if not curve.ended]
        try:
            at_once(_Curve.ask_state, [curve for curve in going if curve.stood_still])
            news = at_once(lambda curve: curve.metrics.read_new(), going)
        except (UserError, OSError) as error:  # away for a moment; the next look will tell
            self._problem = str(error)
            return
        self._problem = ""
        for curve, (lines, restarted) in zip(going, news, strict=True):
            curve.add(lines, restarted, self._revision)


class _Curve:
    """The lines of one run, every so-manieth where there are many."""

    def __init__(self, run: Watched, points: int, columns: dict[str, int]):
        self._run, self._most, self._columns = run, points, columns
        self.metrics = GrowingMetrics(run.path / "metrics.jsonl")
        self.stood_still = True
        self.ended = False
        self._state = "waiting"
        self._changed = time.monotonic()
        self._forget(0)

    def _forget(self, revision: int) -> None:
        self._stride, self._seen, self._reset = 1, 0, revision
        self._lines: list[tuple[int, list]] = []  # with the revision of each
        self._last: dict = {}

    def ask_state(self) -> None:
        self._state = watching.state(self._run.path)
        if (silent := watching.silent(self._run.path)) is not None:
            self._changed = time.monotonic() - silent

    def add(self, lines: list[dict], restarted: bool, revision: int) -> None:
        # A run whose state was asked for before its metrics were read has no more to come.
        self.ended = self._state in ("done", "failed")
        self.stood_still = not lines
        if lines:
            self._changed = time.monotonic()
            self._state = "started" if not self.ended else self._state
        if restarted:
            self._forget(revision)
        for line in lines:
            self._last = line
            if self._seen % self._stride == 0:
                self._lines.append((revision, self._values(line)))
            self._seen += 1
        while len(self._lines) > self._most:
            self._lines = [(revision, values) for _, values in self._lines[::2]]
            self._stride, self._reset = 2 * self._stride, revision

    def _values(self, line: dict) -> list:
        numbers = {n: v for n, v in line.items() if type(v) in (int, float) or v is None}
        for name in numbers:
            self._columns.setdefault(name, len(self._columns))
        return [_short(numbers.get(name)) for name in self._columns]

    def since(self, revision: int) -> dict:
        reset = revision < self._reset or revision == 0
        step = self._last.get("step", 0)
        fresh = [values for at, values in self._lines if reset or at > revision]
        return {
            "name": self._run.name,
            "swept": self._run.swept,
            "state": self._state,
            "step": step,
            "steps": self._run.steps,
            "quiet": round(time.monotonic() - self._changed),
            "left": self._seconds_left(),
            "reset": reset,
            "lines": fresh,
        }

    def _seconds_left(self) -> float | None:
        step, tokens = self._last.get("step"), self._last.get("tokens")
        rate = self._last.get("tokens_per_second")
        numbers = all(type(value) in (int, float) and value > 0 for value in (step, tokens, rate))
        if self._state != "started" or not numbers:
            return None
        return max(0, self._run.steps - step) * tokens / step / rate


def _short(value: float | None) -> float | None:
    """Returns a number with six digits, which a curve needs no more of."""
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")
