"""Who among a program's processes is dead, stuck or failed, from what each tells of itself. It
reads no clock and ends nobody; `watchdog` does."""

import dataclasses

from sae_jax.train.preemption import EXIT_CODE

INTERVAL = 1.0  # seconds between two beats
SUSPICIOUS_SECONDS = 5.0  # of silence, once a collective has raised an error somewhere


@dataclasses.dataclass(frozen=True)
class Record:
    """What the others know of a process. `code` and `text` are those of its own error."""

    host: str
    pid: int
    beat: int = 0
    begun: int = 0
    done: int = 0
    saved: int | None = None
    resting: bool = True
    trouble: bool = False
    ended: bool = False  # with its work
    code: int = 0
    text: str = ""
    gone: bool = False  # its connection has closed


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why all end, and how. `silent` are the processes that will not hear of it."""

    code: int
    text: str
    silent: tuple[int, ...] = ()


class Judge:
    """Who is dead, stuck or failed, from the records of `count` processes, given again and again.
    heartbeat, step: seconds after which a process is dead, and a step stuck (0: never)."""

    def __init__(self, count: int, heartbeat: float, step: float):
        self._count, self._heartbeat, self._step = count, heartbeat, step
        self._last: dict = {}  # key: (value, when it was first seen)

    def __call__(self, records: dict[int, Record], now: float) -> Verdict | None:
        records = {i: records.get(i) for i in range(self._count)}
        return (
            self._died(records)
            or self._silent(records, now)
            or self._failed(records)
            or self._stuck(records, now)
        )

    def _died(self, records: dict[int, Record | None]) -> Verdict | None:
        died = {
            i: record
            for i, record in records.items()
            if record and record.gone and not (record.ended or record.code)
        }
        if not died:
            return None
        text = f"{_names(died)} {_have(died)} died; {again(records)}"
        return Verdict(EXIT_CODE, text, tuple(died))

    def _silent(self, records: dict[int, Record | None], now: float) -> Verdict | None:
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
            f"{_names({i: records[i] for i in silent})} {_have(silent)} not been heard of for "
            f"{max(silent.values()):.0f} s: dead, stopped or cut off; {again(records)}"
        )
        return Verdict(EXIT_CODE, text, tuple(silent))

    def _failed(self, records: dict[int, Record | None]) -> Verdict | None:
        for i, record in records.items():
            if record and record.code:
                return Verdict(record.code, f"{name(i, record)} ended: {record.text}")
        return None

    def _stuck(self, records: dict[int, Record | None], now: float) -> Verdict | None:
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
        # Who was seen last before the limit hangs too, a moment later.
        stuck = {i: records[i] for i in timed if ages[i] > self._step - 2 * INTERVAL}
        first = min(record.begun for record in stuck.values())
        behind = {i: record for i, record in stuck.items() if record.begun == first}
        if len(behind) < len(stuck):
            step = first + 1
            who = f"; {_names(behind)} {_have(behind)} not begun it, the others have"
        else:
            step = min(record.done for record in stuck.values()) + 1
            who = f" in {_names(stuck)}" if self._count > 1 else ""
        return Verdict(
            EXIT_CODE,
            f"step {step} has not ended for {self._step:.0f} s (--watchdog_seconds){who}; "
            f"{again(records)}",
        )

    def _unchanged(self, key, value, now: float) -> float:
        """Seconds since the value of `key` was another."""
        if key not in self._last or self._last[key][0] != value:
            self._last[key] = (value, now)
        return now - self._last[key][1]


def _names(records: dict[int, Record | None]) -> str:
    """Of at most three processes."""
    shown = [name(i, record) for i, record in list(records.items())[:3]]
    if len(records) > len(shown):
        shown.append(f"{len(records) - len(shown)} more")
    return ", ".join(shown)


def _have(subjects) -> str:
    return "has" if len(subjects) == 1 else "have"


def name(i: int, record: Record | None) -> str:
    where = f"pid {record.pid} on {record.host}" if record else "which had not begun"
    return f"process {i} ({where})"


def again(records: dict[int, Record | None]) -> str:
    saved = [record.saved for record in records.values() if record and record.saved is not None]
    step = f", step {max(saved)} or later" if saved else ""
    return f"start the same command again: it goes on from what was saved last{step}"
