"""Who is judged dead, stuck or failed, and when. (With real processes: test_faults.)"""

import dataclasses
import subprocess
import sys
import threading
import time

import pytest

from sae_jax.train import watchdog
from sae_jax.train.peer_health import Judge, Record, Verdict
from sae_jax.train.progress import Progress

HEARTBEAT, STEP = 30.0, 100.0


def first_verdict(count: int, record_at, seconds: int = 400) -> tuple[int, Verdict] | None:
    """When the judge speaks, and what; record_at(i, now) is process i's record at a second."""
    judge = Judge(count, HEARTBEAT, STEP)
    for now in range(seconds):
        records = {i: record_at(i, now) for i in range(count)}
        if verdict := judge({i: r for i, r in records.items() if r}, float(now)):
            return now, verdict
    return None


def well(i: int, now: int) -> Record:
    """A step ends each second."""
    return Record(f"host{i}", 100 + i, beat=now, begun=now + 1, done=now, saved=7, resting=False)


def until(second: int, process: int, **changes):
    """All are well until then; after that one is as it was, or with the changes, but lives."""

    def record_at(i, now):
        if i != process or now <= second:
            return well(i, now)
        return dataclasses.replace(well(i, second), **changes)

    return record_at


def test_nobody_is_blamed_while_all_go_on():
    assert first_verdict(3, well) is None


def test_a_silent_process_is_named_in_time():
    when, verdict = first_verdict(3, until(50, 2))
    assert 50 + HEARTBEAT < when <= 50 + HEARTBEAT + 2
    assert verdict.code == 75 and verdict.silent == (2,)
    assert verdict.text.startswith("process 2 (pid 102 on host2) has not been heard of for 31 s")
    assert "start the same command again" in verdict.text and "step 7" in verdict.text


def test_one_that_never_began_is_named():
    when, verdict = first_verdict(2, lambda i, now: None if i else well(i, now))
    assert when <= HEARTBEAT + 2 and "process 1 (which had not begun) has not" in verdict.text


def test_an_error_elsewhere_makes_silence_suspicious():
    def record_at(i, now):
        record = until(50, 2)(i, now)
        return dataclasses.replace(record, trouble=now > 51) if i == 1 else record

    when, verdict = first_verdict(3, record_at)
    assert when <= 50 + 7 and verdict.silent == (2,)


def test_an_error_of_its_own_ends_all_with_its_code_and_text():
    failed = until(50, 1, beat=60, code=2, text="the disk is full")
    when, verdict = first_verdict(3, failed)
    assert (when, verdict.code) == (51, 2)
    assert verdict.text == "process 1 (pid 101 on host1) ended: the disk is full"


@pytest.mark.parametrize(
    "ahead,said",
    [
        (2, "step 52 has not ended for 100 s (--watchdog_seconds); process 1 (pid 101 on host1) "
            "has not begun it, the others have; start"),
        (0, "step 51 has not ended for 100 s (--watchdog_seconds) in process 0 (pid 100 on host0), "
            "process 1 (pid 101 on host1), process 2 (pid 102 on host2); start"),
    ],
    ids=["one has not begun", "all have begun"],
)  # fmt: skip
def test_a_stuck_step_names_who_has_not_begun_it(ahead, said):
    def record_at(i, now):
        begun = min(now, 50) + 1 + (ahead if i != 1 and now > 50 else 0)
        return dataclasses.replace(well(i, min(now, 50)), beat=now, begun=begun)

    when, verdict = first_verdict(3, record_at)
    assert 50 + STEP < when <= 50 + STEP + 2
    assert verdict.code == 75 and verdict.text.startswith(said)


@pytest.mark.parametrize("changes", [{"resting": True}, {"ended": True}], ids=str)
def test_saving_evaluating_and_waiting_for_the_end_are_not_timed(changes):
    def record_at(i, now):
        if now <= 50:
            return well(i, now)
        return dataclasses.replace(well(i, 50), beat=now, **changes)

    assert first_verdict(1, record_at) is None


def test_a_process_that_was_stopped_does_not_count_that_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = watchdog._Clock()
    for step in (0.25, 0.25, 3600.0, 0.25):
        now[0] += step
        clock.tick()
    assert clock.now < 4


@pytest.mark.parametrize("leave", ["end", "stop"])
@pytest.mark.parametrize("seconds", [0, 0.4])
def test_the_watch_of_one_process_ends_with_it(leave, seconds):
    before = set(threading.enumerate())
    watch = watchdog.Watchdog(Progress(), HEARTBEAT, STEP)
    watch.start()
    assert set(threading.enumerate()) - before
    time.sleep(seconds)
    getattr(watch, leave)()
    assert not set(threading.enumerate()) - before


def test_a_stuck_step_ends_the_only_process():
    code = """
import threading
import time
from sae_jax.train.progress import Progress
from sae_jax.train.watchdog import Watchdog
progress = Progress()
Watchdog(progress, heartbeat=9, step=1).start()
progress.end(41)
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 75
    assert done.stderr == (
        "sae-jax: step 42 has not ended for 1 s (--watchdog_seconds); start the same command "
        "again: it goes on from what was saved last\n"
    )
