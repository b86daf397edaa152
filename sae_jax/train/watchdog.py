"""A watch over the processes of one program: whoever dies, hangs or fails ends all of them, soon,
with one line on stderr that names it.

    what happened                          what the others do
    a process is killed or its host dies   name it after 5 s where a collective has raised an error
                                           meanwhile (as on CPUs), else after --heartbeat_seconds
    process 0 is killed                    name it within 5 s, after the trace that JAX prints
    a process is stopped, or cut off       name it after --heartbeat_seconds
    a step hangs                           name, after --watchdog_seconds, who has not begun it
    a process ends with an error           tell its error, and end with its exit code
    a process is told to stop (SIGTERM)    nothing here: all save at one step (`train.preemption`)

The exit code is 75 but for the last two lines: the same command goes on from the last checkpoint,
and what was done since is lost. A process that finds its own error tells that one. No clock but a
process's own monotonic one is read, so clocks may differ, and time during which this very process
was stopped does not count. A step is timed from the end of the one before; compiling, saving and
evaluating are not timed; writing a checkpoint fails by itself after 20 minutes (30 to an object
store).

How: a thread of each process writes its record (host, pid, a beat, its steps) to the key-value
store of jax.distributed once a second. Process 0 reads all records and judges; the others read its
verdict, so that all tell the same. They judge process 0, with which the store dies, themselves.
JAX's own heartbeat stays as a backstop. Where there is one process there is no store, and only its
steps are watched. Nothing waits for a device.
"""

import atexit
import ctypes
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import threading
import time

from jax._src import distributed  # the key-value store has no public name

from sae_jax.errors import UserError
from sae_jax.train.peer_health import (
    INTERVAL,
    SUSPICIOUS_SECONDS,
    Judge,
    Record,
    Verdict,
    again,
    name,
    silence,
)
from sae_jax.train.preemption import EXIT_CODE, PreemptedError
from sae_jax.train.progress import Progress

_FAREWELL_SECONDS = 5.0  # for the others to hear a verdict before the store goes with process 0
_KEY = "sae_jax/watchdog"


class Watchdog:
    """The watch of this process. `store` is the client of the key-value store, None where there
    is one process; `address` is where process 0 serves it.

    Ends the process by os._exit: its main thread may be stuck in a collective for ever."""

    def __init__(
        self,
        progress: Progress,
        heartbeat: float,
        step: float,
        store=None,
        me: int = 0,
        count: int = 1,
        address="",
    ):
        self._progress = progress
        self._store, self._me, self._count, self._address = store, me, count, address
        self._heartbeat = heartbeat
        self._judge = Judge(count, heartbeat, step)
        self._own = Record(socket.gethostname(), os.getpid())
        self._last_words: dict = {}  # fields of the record that the main thread does not tell
        self._records: dict[int, Record] = {}
        self._verdict: Verdict | None = None
        self._clock = _Clock()
        self._heard = 0.0  # when the store last answered
        self._unreachable = False
        self._sure = self._printed = False  # of this process's own error
        self._error_since: float | None = None
        self._declared = threading.Event()
        self._wake, self._told, self._off = (threading.Event() for _ in range(3))
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if store is not None:
            talk = threading.Thread(target=self._talk, name="watchdog-beat", daemon=True)
            self._threads.append(talk)
            _delay_abort()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Waits until all processes have done their work, then lets them go."""
        self._progress.rest()
        self._progress.error = None  # one that all have, and that ended the work in good order
        self._tell(ended=True)
        if self._store is not None:
            self._store.wait_at_barrier(f"{_KEY}/ended", timeout_in_ms=2**31 - 1)
        self.stop()

    def stop(self) -> None:
        self._off.set()
        self._wake.set()
        for thread in self._threads:
            thread.join()

    def fail(self, error: BaseException) -> None:
        """Tells the others of an error that ends this process, to be printed when this returns.
        If another's death may be behind it this waits for the verdict, which ends the process."""
        self._progress.error = error
        told = isinstance(error, (PreemptedError, KeyboardInterrupt))
        self._sure = told or (isinstance(error, UserError) and error.__cause__ is None)
        self._wake.set()
        self._declared.wait(4 * _FAREWELL_SECONDS)
        self._printed = True
        atexit.register(self._leave, exit_code(error))

    def _leave(self, code: int) -> None:
        """Instead of JAX's orderly end, which would wait for those that are stuck."""
        if self._me == 0 and self._verdict is not None:
            self._await_others()
        _exit(code)

    # ------------------------------------------------------------------ the thread that judges

    def _watch(self) -> None:
        while not self._off.wait(INTERVAL / 4):
            now = self._clock.tick()
            if self._declared.is_set():
                self._hurry(now)
            elif self._store is None:
                self._obey(self._judge({0: self._record()}, now))
            elif self._progress.error is not None and self._is_own_error(now):
                self._declare(self._progress.error)
            elif self._me == 0:
                self._obey(self._judge(self._records, now) if self._records else None)
            else:
                self._obey(self._verdict or self._process_0_gone(now))

    def _is_own_error(self, now: float) -> bool:
        """Whether nobody's death is behind it: that would be known by now."""
        if self._error_since is None:
            self._error_since = now
        return self._sure or now - self._error_since > SUSPICIOUS_SECONDS + 4 * INTERVAL

    def _declare(self, error: BaseException) -> None:
        self._error_since = self._clock.now
        code, text = exit_code(error), str(error) or type(error).__name__
        if self._me == 0:
            self._verdict = Verdict(code, f"{name(0, self._own)} ended: {text}")
        self._tell(code=code, text=text)
        self._declared.set()

    def _hurry(self, now: float) -> None:
        """The main thread may be stuck in closing what its error left open."""
        if now - self._error_since > 2 * _FAREWELL_SECONDS:
            if not self._printed:
                _say(self._own.text)
            _exit(self._own.code)

    def _process_0_gone(self, now: float) -> Verdict | None:
        """The store is served by process 0."""
        silent = now - self._heard
        records = self._records | {self._me: self._own}
        if silent > self._heartbeat:
            return Verdict(EXIT_CODE, silence({0: silent}, records))
        late = silent > 2 * INTERVAL  # JAX locks the store when it gives up
        if (late or self._unreachable) and not _answers(self._address):
            text = f"{name(0, records.get(0))} has died; {again(records)}"
            return Verdict(EXIT_CODE, text)
        return None

    def _obey(self, verdict: Verdict | None) -> None:
        if verdict is None:
            return
        _say(verdict.text)
        self._verdict = verdict
        self._tell(ended=True)
        if self._me == 0:
            self._await_others()
        _exit(verdict.code)

    def _await_others(self) -> None:
        """Until they have heard of it, or are past hearing."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while time.monotonic() < deadline and self._store is not None:
            others = set(range(1, self._count)) - set(self._verdict.silent)
            records = map(self._records.get, others)
            if all(record and (record.ended or record.code) for record in records):
                return
            self._wake.set()
            time.sleep(INTERVAL / 4)

    # ------------------------------------------------- the thread that talks, which may be stuck

    def _talk(self) -> None:
        while not self._off.is_set():
            self._wake.clear()
            own = self._record()
            try:
                self._exchange(own)
                self._heard, self._unreachable = self._clock.now, False
                if own.ended or own.code:
                    self._told.set()
            except RuntimeError:  # JaxRuntimeError: what it means the other thread finds out
                self._unreachable = True
            self._wake.wait(INTERVAL)

    def _exchange(self, own: Record) -> None:
        key = f"{_KEY}/records/{self._me}"
        self._store.key_value_set(key, json.dumps(dataclasses.asdict(own)), allow_overwrite=True)
        if self._me == 0:
            self._records = self._read("records", Record)
            if self._verdict is not None:
                text = json.dumps(dataclasses.asdict(self._verdict))
                self._store.key_value_set(f"{_KEY}/verdict/0", text, allow_overwrite=True)
            return
        if 0 not in self._records:  # who it is, for when it cannot be asked any more
            self._records = self._read("records", Record)
        self._verdict = self._read("verdict", Verdict).get(0)

    def _read(self, what: str, kind: type) -> dict:
        pairs = self._store.key_value_dir_get(f"{_KEY}/{what}/")
        return {int(key.rpartition("/")[2]): kind(**json.loads(value)) for key, value in pairs}

    def _record(self) -> Record:
        self._own = dataclasses.replace(
            self._own,
            beat=self._own.beat + 1,
            begun=self._progress.begun,
            done=self._progress.done,
            saved=self._progress.saved,
            resting=self._progress.resting,
            trouble=self._progress.error is not None,
            **self._last_words,
        )
        return self._own

    def _tell(self, **last_words) -> None:
        """Changes the record and waits, for a moment, until the store has it."""
        self._last_words |= last_words
        if self._store is not None:
            self._told.clear()
            self._wake.set()
            self._told.wait(INTERVAL)


def of_this_program(progress: Progress, heartbeat: float, step: float) -> Watchdog:
    """The watch of this process among those that jax.distributed has joined."""
    program = distributed.global_state
    store, address = program.client, program.coordinator_address
    return Watchdog(
        progress, heartbeat, step, store, program.process_id, program.num_processes, address
    )


class _Clock:
    """Seconds that this process has been awake: no tick is longer than two intervals, so that a
    process that was stopped does not take the others for dead when it goes on."""

    def __init__(self):
        self.now = 0.0
        self._last = time.monotonic()

    def tick(self) -> float:
        now = time.monotonic()
        self.now += min(now - self._last, 2 * INTERVAL)
        self._last = now
        return self.now


def _answers(address: str) -> bool:
    """Whether something listens there. A host that is silent may be alive: True."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=INTERVAL).close()
    except ConnectionError:
        return False
    except OSError:
        return True
    return True


def _delay_abort() -> None:
    """When process 0 dies JAX aborts the others within milliseconds, and says "another task died".
    With C's `sleep` as the handler of SIGABRT, the thread that aborts first sleeps for as many
    seconds as the signal has for a number, 6: time for this watch to say which one it was."""
    c = ctypes.CDLL(None)
    c.signal.argtypes, c.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    c.signal(signal.SIGABRT, ctypes.cast(c.sleep, ctypes.c_void_p))


def exit_code(error: BaseException) -> int:
    """What `sae-jax` ends with after an error."""
    if isinstance(error, PreemptedError):
        return EXIT_CODE
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, (UserError, OSError)) else 1


def _say(text: str) -> None:
    line = f"sae-jax: {' '.join(text.split())}\n"
    sys.stderr.write("\n" + line if sys.stderr.isatty() else line)


def _exit(code: int) -> None:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
