"""Progress of long work: a bar on a terminal and in a notebook, lines in the log elsewhere.

Only process 0 of a program shows anything.
"""

import datetime
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import tqdm
from absl import logging

_SECONDS_BETWEEN_LINES = 10  # of the log, where there is no bar


def progress(
    items: Iterable,
    what: str,
    total: int | None = None,
    unit: str = "it",
    tally: Callable[[], str] | None = None,
) -> Iterable:
    """Returns `items` to iterate over, which shows how many are done once that takes 2 seconds.

    `tally` says more that is shown beside it.
    """
    if total == 0:
        return items
    if _has_bar() or jax.process_index() > 0:
        bar = make_bar(items, desc=what, total=total, unit=unit, delay=2)
        return _with_tally(bar, tally) if tally else bar
    logging.info("%s", what)
    return _with_lines(items, what, total, unit, tally)


def _with_tally(bar: tqdm.tqdm, tally: Callable[[], str]) -> Iterator:
    for item in bar:
        bar.set_postfix_str(tally(), refresh=False)
        yield item


def _with_lines(
    items: Iterable, what: str, total: int | None, unit: str, tally: Callable[[], str] | None
) -> Iterator:
    """Yields `items`, and logs now and then how many are done."""
    clock = _Clock(0)
    next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
    for done, item in enumerate(items):
        clock.tick(done)
        if time.monotonic() > next_line:
            next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            of = f" of {total}" if total else ""
            counted = "" if unit == "it" else f" {unit}s"  # tqdm's name for what has none
            left = clock.left(done, total) if total else ""
            more = f", {tally()}" if tally else ""
            logging.info("%s: %s%s%s done%s%s", what, done, of, counted, left, more)
        yield item


class _Clock:
    """Tells the time left from the speed since the first step, which may have been compiled."""

    def __init__(self, done: int):
        self._begin, self._seconds = done, None

    def tick(self, done: int) -> None:
        """Notes that `done` are done."""
        if done > self._begin and self._seconds is None:
            self._begin, self._seconds = done, time.monotonic()

    def left(self, done: int, total: int) -> str:
        """Returns ", 0:03:20 left", or nothing where it is not known yet."""
        if self._seconds is None or done <= self._begin:
            return ""
        seconds = (total - done) * (time.monotonic() - self._seconds) / (done - self._begin)
        return f", {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Returns a time as text, such as "0:03:20" and "2 days, 4:00:00"."""
    return str(datetime.timedelta(seconds=round(seconds)))


class TrainingBar:
    """How far a training is, in steps of `total`, of which `done` were done before."""

    def __init__(self, name: str, done: int, total: int):
        self._name, self._done, self._total = name, done, total
        self._bar = make_bar(total=total, initial=done, unit="step", desc=name)
        self._next_line = 0.0
        self._clock = _Clock(done)

    def __enter__(self) -> "TrainingBar":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def advance(self, steps: int, line: dict | None = None) -> None:
        """Counts `steps` more. `line` is the last line of metrics, where there is one run."""
        self._done += steps
        self._clock.tick(self._done)
        if line:
            shown = {n: _short(line[n]) for n in ("loss", "fvu", "l0", "dead_fraction")}
            if line["dead_fraction"] is None:  # not known yet
                del shown["dead_fraction"]
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(steps)
        now = time.monotonic()
        if not self._bar.disable or jax.process_index() > 0:
            return
        if now > self._next_line or self._done == self._total:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            text = f"{self._name}: step {self._done}/{self._total}"
            if line:
                text += "".join(f" {name} {value}" for name, value in shown.items())
                text += f" {line['tokens_per_second'] or 0:.0f} tokens/s"
            text += self._clock.left(self._done, self._total)
            logging.info("%s", text)


def _short(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"


def _has_bar() -> bool:
    return jax.process_index() == 0 and (sys.stderr.isatty() or _in_notebook())


def make_bar(items: Iterable | None = None, **options) -> tqdm.tqdm:
    """Returns a bar of tqdm with these options, disabled where nobody would see it."""
    if _in_notebook():
        options |= {"file": _NotebookLine(), "ascii": False, "mininterval": 0.5}
    return tqdm.tqdm(items, disable=not _has_bar(), **options)


class _NotebookLine:
    """What tqdm writes to in a notebook: one output that shows the last line, so that a notebook
    which is saved holds that line and not thousands."""

    def __init__(self):
        self._output = None

    def write(self, text: str) -> None:
        if not (line := text.strip()):
            return
        shown = {"text/plain": line}
        if self._output is None:
            display = sys.modules["IPython"].display.display
            self._output = display(shown, raw=True, display_id=True)
        else:
            self._output.update(shown, raw=True)

    def flush(self) -> None:
        """Outputs are shown at once."""


def _in_notebook() -> bool:
    """Whether this is the kernel of a notebook, such as Jupyter's or Colab's."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ in ("ZMQInteractiveShell", "Shell")
