"""Finds out which of a program's processes are dead, stuck or failed, from their records.

It reads no clock and ends no process. `watchdog` does both.
"""

import dataclasses

from sae_jax.train.preemption import EXIT_CODE

INTERVAL = 1.0  # seconds between two beats
SUSPICIOUS_SECONDS = 5.0  # of silence, once a collective has raised an error somewhere


@dataclasses.dataclass(frozen=True)
class Record:
    """What a process tells the others of itself.

    Attributes:
      host: the name of its host.
      pid: its number on that host.
      beat: how many records it has sent.
      begun, done, saved, resting: see `train.progress.Progress`.
      trouble: whether an error has been raised in it.
      ended: whether it has done all its work.
      code: the exit code of its own error, 0 where there is none.
      text: the text of its own error.
      gone: whether its connection has closed.
    """

    host: str
    pid: int
    beat: int = 0
    begun: int = 0
    done: int = 0
    saved: int | None = None
    resting: bool = True
    trouble: bool = False
    ended: bool = False
    code: int = 0
    text: str = ""
    gone: bool = False


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Says why all processes must end.

    Attributes:
      code: the exit code to end with.
      text: the line to end with.
      silent: the processes that will not hear of it.
    """

    code: int
    text: str
    silent: tuple[int, ...] = ()


class Judge:
    """Decides, from the records that it is given again and again, whether a process has failed.

    A process may have died, be silent, have ended with an error, or hang in a step.
    """

    def __init__(self, count: int, heartbeat: float, step: float):
        """Begins to watch `count` processes.

        Args:
          count: how many processes there are.
          heartbeat: the seconds of silence after which a process is taken for dead.
          step: the seconds after which a step is taken for stuck; 0 stands for never.
        """
        self._count, self._heartbeat, self._step = count, heartbeat, step
        self._last: dict = {}  # key: (value, when it was first seen)

    def __call__(self, records: dict[int, Record], now: float) -> Verdict | None:
        """Returns a verdict on the newest records, by process, or None where all is well.

        `now` is the time in seconds, on any clock that does not go back.
        """
        records = {i: records.get(i) for i in range(self._count)}
        return (
            self._verdict_if_died(records)
            or self._verdict_if_silent(records, now)
            or self._verdict_if_failed(records)
            or self._verdict_if_stuck(records, now)
        )

    def _verdict_if_died(self, records: dict[int, Record | None]) -> Verdict | None:
        died = {
            i: record
            for i, record in records.items()
            if record and record.gone and not (record.ended or record.code)
        }
        if not died:
            return None
        text = f"{_names(died)} {_has_or_have(died)} died; {restart_advice(records)}"
        return Verdict(EXIT_CODE, text, tuple(died))

    def _verdict_if_silent(self, records: dict[int, Record | None], now: float) -> Verdict | None:
        suspicious = any(record and record.trouble for record in records.values())
        limit = min(SUSPICIOUS_SECONDS, self._heartbeat) if suspicious else self._heartbeat
        silent = {
            i: age
            for i, record in records.items()
            if (age := self._unchanged(("beat", i), record and record.beat, now)) > limit
            and not (record and record.ended)
        }
        if not silent:
            return None
        text = (
            f"{_names({i: records[i] for i in silent})} {_has_or_have(silent)} not been heard of "
            f"for {max(silent.values()):.0f} s: dead, stopped or cut off; {restart_advice(records)}"
        )
        return Verdict(EXIT_CODE, text, tuple(silent))

    def _verdict_if_failed(self, records: dict[int, Record | None]) -> Verdict | None:
        for i, record in records.items():
            if record and record.code:
                return Verdict(record.code, f"{process_name(i, record)} ended: {record.text}")
        return None

    def _verdict_if_stuck(self, records: dict[int, Record | None], now: float) -> Verdict | None:
        ages = {
            i: self._unchanged(("step", i), (record.begun, record.done, record.resting), now)
            for i, record in records.items()
            if record
        }
        timed = {i for i in ages if not (records[i].resting or records[i].ended)}
        if any(records[i].trouble for i in ages):  # they wait for one that will tell its error
            return None
        if not self._step or not any(ages[i] > self._step for i in timed):
            return None
        # A process whose last step began a little later hangs too.
        stuck = {i: records[i] for i in timed if ages[i] > self._step - 2 * INTERVAL}
        first = min(record.begun for record in stuck.values())
        behind = {i: record for i, record in stuck.items() if record.begun == first}
        if len(behind) < len(stuck):
            step = first + 1
            who = f"; {_names(behind)} {_has_or_have(behind)} not begun it, the others have"
        else:
            step = min(record.done for record in stuck.values()) + 1
            who = f" in {_names(stuck)}" if self._count > 1 else ""
        return Verdict(
            EXIT_CODE,
            f"step {step} has not ended for {self._step:.0f} s (--watchdog_seconds){who}; "
            f"{restart_advice(records)}",
        )

    def _unchanged(self, key, value, now: float) -> float:
        """Returns for how many seconds `key` has had this value."""
        if key not in self._last or self._last[key][0] != value:
            self._last[key] = (value, now)
        return now - self._last[key][1]


def _names(records: dict[int, Record | None]) -> str:
    """Returns a list of processes for a message, of which at most three are named."""
    shown = [process_name(i, record) for i, record in list(records.items())[:3]]
    if len(records) > len(shown):
        shown.append(f"{len(records) - len(shown)} more")
    return ", ".join(shown)


def _has_or_have(subjects) -> str:
    return "has" if len(subjects) == 1 else "have"


def process_name(i: int, record: Record | None) -> str:
    """Returns what messages call process `i`: its number, and its pid and host if known."""
    where = f"pid {record.pid} on {record.host}" if record else "which had not begun"
    return f"process {i} ({where})"


def restart_advice(records: dict[int, Record | None]) -> str:
    """Returns the end of a message: how to go on, and from which saved step."""
    saved = [record.saved for record in records.values() if record and record.saved is not None]
    step = f", step {max(saved)} or later" if saved else ""
    return f"start the same command again: it goes on from what was saved last{step}"
