"""Watches over the processes of one program.

When one dies, hangs or fails, all others end soon, each with one line on stderr that names it.

    what happened                          what the others do
    a process is killed                    name it within 3 s
    process 0 is killed                    name it within 3 s, after the trace that JAX prints
    a process is stopped, or cut off       name it after --heartbeat_seconds, or after 5 s where a
                                           collective has raised an error meanwhile
    a step hangs                           name, after --watchdog_seconds, who has not begun it
    a process ends with an error           tell its error, and end with its exit code
    a process is told to stop (SIGTERM)    all save at one step (`train.preemption`); but where none
                                           has been done yet, or a batch does not come, they end
                                           after 5 s with what was saved last

The exit code is 75 in all cases but that of an error: the same command goes on from the last
checkpoint, and what was done since is lost. A process that finds its own error tells that one.

Only a process's own monotonic clock is read, so clocks may differ. Time during which this very
process was stopped does not count. A step is timed from the end of the step before. Compiling,
saving and evaluating are not timed. Writing a checkpoint fails by itself after 20 minutes (30 to an
object store).

One thread of each process sends its record (host, pid, a beat, its steps) once a second
(`train.peer_link`). Process 0 receives all records, judges them (`train.peer_health`) and sends the
others its verdict, so that all say the same. The others judge process 0. JAX's own heartbeat, which
is slower, is there for what this misses. Where there is one process, only its steps are watched.
Nothing here waits for a device. A store that is away is said in the log while it lasts.
"""

import asyncio
import atexit
import contextlib
import dataclasses
import os
import socket
import threading
import time

from absl import logging

from sae_jax.errors import UserError
from sae_jax.train import last_words
from sae_jax.train.last_words import HeldAbort, exit_now, say
from sae_jax.train.peer_health import (
    INTERVAL,
    SUSPICIOUS_SECONDS,
    Judge,
    Record,
    Verdict,
    process_name,
    restart_advice,
)
from sae_jax.train.peer_link import PeerLink, open_link
from sae_jax.train.preemption import EXIT_CODE, PreemptedError, Sigterm
from sae_jax.train.progress import Progress

LOST = (
    "another process of this program has died, or cannot be reached, before all were connected; "
    "JAX's lines above may say which; start the same command again"
)
_FAREWELL_SECONDS = 5.0  # for the others to hear a verdict and end
_STOP_SECONDS = 5.0  # for the main thread to heed SIGTERM where it may be stuck
_WAITING_SECONDS = 30.0  # between lines of the log that say what the run waits for
_ABORT_SECONDS = 2.0  # for JAX to abort this process after process 0 has died


class Watchdog:
    """Watches over this process and the others, in a thread.

    It ends the process by os._exit where another has died or failed, or a step hangs, because the
    main thread may be stuck in a collective for ever.
    """

    def __init__(
        self,
        progress: Progress,
        heartbeat: float,
        step: float,
        link: PeerLink | None = None,
        abort: HeldAbort | None = None,
    ):
        """Prepares to watch; `start` begins.

        Args:
          progress: what the main thread tells of itself.
          heartbeat: the seconds of silence after which a process is taken for dead.
          step: the seconds after which a step is taken for stuck; 0 stands for never.
          link: the connections to the other processes, None where there is one process.
          abort: what holds up an abort of this process, None where there is one process.
        """
        self._progress, self._link, self._abort = progress, link, abort
        self._me, count = (link.me, link.count) if link else (0, 1)
        self._others = set(range(1, count)) if self._me == 0 else {0}
        # Process 0 judges all. The others judge whether process 0 lives.
        self._judge = Judge(count, heartbeat, step) if self._me == 0 else Judge(1, heartbeat, 0)
        self._own = Record(socket.gethostname(), os.getpid())
        self._verdict: Verdict | None = None
        self._clock = _Clock()
        self._error_since: float | None = None
        self._certain = self._printed = False  # whether this process's error is its own; was shown
        self._ended = self._stopping = False
        self._reported, self._released, self._all_ended = (threading.Event() for _ in range(3))
        self._sigterm: Sigterm | None = None
        self._told_since: float | None = None
        self._said_waiting = 0.0  # when the log has last told what the run waits for
        self._loop, self._awake = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch. The main thread calls it."""
        self._sigterm = Sigterm()
        self._thread.start()

    def end(self) -> None:
        """Waits until all processes have done their work, then ends the watch."""
        self._progress.rest()
        self._progress.error = (
            None  # one that all processes have, and that ended the work in good order
        )
        self._ended = True
        self._wake()
        self._all_ended.wait()
        self.stop()

    def stop(self) -> None:
        """Ends the watch."""
        self._stopping = True
        self._wake()
        self._thread.join()
        self._sigterm.close()

    def fail(self, error: BaseException) -> None:
        """Tells the others of an error that ends this process. The caller prints it afterwards.

        If the death of another process may have caused the error, this waits for the verdict, which
        ends the process.
        """
        self._progress.error = error
        interrupted = isinstance(error, (PreemptedError, KeyboardInterrupt))
        self._certain = interrupted or (isinstance(error, UserError) and error.__cause__ is None)
        self._wake()
        self._reported.wait(4 * _FAREWELL_SECONDS)
        self._printed = True
        # This replaces JAX's orderly end, which would wait for processes that are stuck.
        last_words.before_leaving(lambda: self._released.wait(_FAREWELL_SECONDS))
        atexit.register(last_words.leave, exit_code(error))

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._awake.set)

    # ---------------------------------------------------------------------- the thread of the watch

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._watch())

    async def _watch(self) -> None:
        async with self._link or contextlib.nullcontext():
            sent = -INTERVAL
            while not self._stopping:
                now = self._clock.tick()
                if self._awake.is_set() or now - sent >= INTERVAL:
                    self._awake.clear()
                    sent = now
                    self._send()
                await self._check(now)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._awake.wait(), INTERVAL / 4)
            await self._await_others()  # who must hear first that all have ended

    def _send(self) -> None:
        self._own = dataclasses.replace(
            self._own,
            beat=self._own.beat + 1,
            begun=self._progress.begun,
            done=self._progress.done,
            saved=self._progress.saved,
            resting=self._progress.resting,
            trouble=self._progress.error is not None,
            ended=self._ended,
        )
        if self._link:
            verdict = self._verdict and dataclasses.asdict(self._verdict)
            message = {
                "record": dataclasses.asdict(self._own),
                "verdict": verdict,
                "all_ended": self._all_ended.is_set(),
            }
            self._link.send(message, but=self._verdict.silent if self._verdict else ())

    async def _check(self, now: float) -> None:
        self._say_what_it_waits_for()
        if self._sigterm.came() and self._told_since is None:
            self._told_since = now
        records = self._records()
        heard = self._link.heard.get(0, {}) if self._link else {}
        if self._reported.is_set():
            if heard.get("verdict") or self._others <= self._gone:
                self._released.set()
            self._exit_if_stuck(now)
        elif self._link and self._progress.error is not None and self._is_own_error(now):
            self._report_own_error(self._progress.error)
        elif heard.get("verdict"):
            await self._end_with(Verdict(**heard["verdict"]))
        elif self._is_stuck_after_sigterm(now):
            await self._stop_at_once()
        elif heard.get("all_ended") or self._all_have_ended(records):
            self._all_ended.set()
            self._send()
        elif verdict := self._judge(records, now):
            await self._end_with(verdict)

    def _say_what_it_waits_for(self) -> None:
        waiting, now = self._progress.waiting, time.monotonic()
        if waiting is None:
            return
        if now - max(waiting.since, self._said_waiting) >= _WAITING_SECONDS:
            self._said_waiting = now
            logging.info("waiting for %s, for %.0f s now", waiting.what, now - waiting.since)

    def _is_stuck_after_sigterm(self, now: float) -> bool:
        """Whether SIGTERM came a while ago, and no step will end soon of which the state is saved.

        A checkpoint that is being written is waited for.
        """
        if self._told_since is None or now - self._told_since < _STOP_SECONDS or self._ended:
            return False
        waiting = self._progress.waiting
        if waiting is None or not waiting.can_be_left:
            return self._progress.done == 0
        return time.monotonic() - waiting.since >= _STOP_SECONDS

    async def _stop_at_once(self) -> None:
        """Ends this process, and so the others, without saving."""
        waiting = self._progress.waiting
        doing = f"waiting for {waiting.what}" if waiting else "beginning"
        text = f"stopped by SIGTERM while {doing}; {restart_advice({self._me: self._own})}"
        say(text)
        self._report_own_error(PreemptedError(0), text)
        await self._await_others()
        await asyncio.sleep(INTERVAL / 4)  # for the record to be sent
        exit_now(EXIT_CODE)

    def _records(self) -> dict[int, Record]:
        """Returns the newest record of each process whose records come here."""
        heard = self._link.heard if self._link else {}
        records = {
            i: Record(**message["record"] | {"gone": i in self._gone})
            for i, message in heard.items()
        }
        return records | {self._me: self._own}

    def _all_have_ended(self, records: dict[int, Record]) -> bool:
        return (
            self._me == 0
            and len(records) == len(self._others) + 1
            and (all(record.ended for record in records.values()))
        )

    def _is_own_error(self, now: float) -> bool:
        """Whether no death of another process caused the error. It would be known by now."""
        if self._error_since is None:
            self._error_since = now
        return self._certain or now - self._error_since > SUSPICIOUS_SECONDS + 4 * INTERVAL

    def _report_own_error(self, error: BaseException, text: str = "") -> None:
        self._error_since = self._clock.now
        text = (text or str(error) or type(error).__name__)[:4000]
        self._own = dataclasses.replace(self._own, code=exit_code(error), text=text)
        if self._me == 0:
            self._verdict = Verdict(self._own.code, f"{process_name(0, self._own)} ended: {text}")
        self._send()
        self._reported.set()

    def _exit_if_stuck(self, now: float) -> None:
        """Ends the process if its main thread seems stuck in closing what its error left open."""
        if now - self._error_since > 2 * _FAREWELL_SECONDS:
            if not self._printed:
                say(self._own.text)
            exit_now(self._own.code)

    async def _end_with(self, verdict: Verdict) -> None:
        """Says the verdict, passes it on, and ends this process."""
        if 0 in self._gone:
            self._abort.begun.wait(_ABORT_SECONDS)  # JAX's trace comes first, not in between
        say(verdict.text)
        self._verdict = verdict
        self._send()
        await self._await_others()
        exit_now(verdict.code)

    async def _await_others(self) -> None:
        """Waits, on process 0, until all others have left or will not hear any more."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        left = self._others - set(self._verdict.silent if self._verdict else ())
        while self._me == 0 and left - self._gone and time.monotonic() < deadline:
            await asyncio.sleep(INTERVAL / 20)

    @property
    def _gone(self) -> set[int]:
        return self._link.gone if self._link else set()


def open_watchdog(
    progress: Progress,
    heartbeat: float,
    step: float,
    abort: HeldAbort,
    host: str | None,
    port: int,
) -> Watchdog:
    """Returns the watch of this process among those that jax.distributed has joined.

    All processes call it, and it connects them.

    Args:
      progress: what the main thread tells of itself.
      heartbeat: the seconds of silence after which a process is taken for dead.
      step: the seconds after which a step is taken for stuck; 0 stands for never.
      abort: was made before the processes were joined, with LOST for its last words.
      host: the name of process 0's host, if the user has given one.
      port: the port on which process 0 listens, 0 for any that is free.

    Raises UserError if they cannot be connected. If one dies meanwhile the others end with exit
    code 75 and LOST, since it is not known yet which one it was.
    """
    try:
        link = open_link(host, port)
    except UserError as error:
        abort.last_words = None
        atexit.register(exit_now, exit_code(error))  # JAX's end would wait for the others
        raise
    except RuntimeError as error:  # of the collective by which they meet
        say(f"{LOST} ({str(error).splitlines()[0]})")
        exit_now(EXIT_CODE)
    abort.last_words = None
    return Watchdog(progress, heartbeat, step, link, abort)


class _Clock:
    """Counts the seconds that this process has been awake.

    No tick is longer than two intervals. So a process that was stopped does not take the others for
    dead when it goes on.
    """

    def __init__(self):
        self.now = 0.0
        self._last = time.monotonic()

    def tick(self) -> float:
        now = time.monotonic()
        self.now += min(now - self._last, 2 * INTERVAL)
        self._last = now
        return self.now


def exit_code(error: BaseException) -> int:
    """Returns the exit code that `sae-jax` ends with after an error."""
    if isinstance(error, PreemptedError):
        return EXIT_CODE
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, (UserError, OSError)) else 1
