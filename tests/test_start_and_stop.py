"""Real processes that are started wrongly, told to stop at any time, or wait for their data: each
ends with one line, within the time that it says."""

import pathlib
import re
import signal
import socket
import subprocess
import time

import pytest
from training import (
    command,
    finish_all,
    launch,
    logged_step,
    make_config,
    saved_arrays,
    together,
    wait_until,
)

from sae_jax.config import Config

WORLD = "world:orthonormal,width=16,features=16"
DATA_STOP = """
import threading
from sae_jax.activations.synthetic import WorldStream
from sae_jax.cli import entry
from sae_jax.train import watchdog
watchdog._WAITING_SECONDS = 0.5
batches = WorldStream.batches

def away(self, *arguments, **named):
    for i, batch in enumerate(batches(self, *arguments, **named)):
        if i == 30:
            threading.Event().wait()
        yield batch

WorldStream.batches = away
raise SystemExit(entry())
"""
WRITES_LITTLE = """
import resource
from sae_jax.cli import entry
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
raise SystemExit(entry())
"""


def endless(mesh: int = 1):
    return make_config(
        WORLD,
        steps=10**6,
        sae={"b_dec_init": "zero"},
        mesh={"data": mesh},
        train={"checkpoint_every": 10**6},
    )


def assert_last_line(err: str, *words: str) -> None:
    last = err.splitlines()[-1]
    assert "Traceback" not in err, err
    for word in words:
        assert word in last, err


@pytest.fixture
def begin():
    """Starts a process of `sae-jax train`, or of `code` in its place. None outlives the test."""
    processes = []

    def begin(run: pathlib.Path, config: Config, *flags: str, code: str = "") -> subprocess.Popen:
        arguments = command(run, config, *flags)
        if code:
            arguments[1:3] = ["-c", code]
        processes.append(launch(arguments))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def answers_sigterm(process: subprocess.Popen) -> bool:
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signal.SIGTERM - 1) & 1)


# ------------------------------------------------------------------------------ the start


@pytest.mark.slow
def test_one_process_is_missing(begin, tmp_path):
    """It was aborted after 300 s, with a trace of C++."""
    flags = together(3)
    begun = time.monotonic()
    ends = finish_all(
        [begin(tmp_path / "run", endless(3), *flags[i], "--start_seconds=4") for i in (0, 2)]
    )
    for code, _, err in ends:
        assert code == 75
        assert_last_line(err, "process 1 of 3 did not come within 4 s (--start_seconds)")
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_two_processes_have_one_number(begin, tmp_path):
    flags = together(3)
    ends = finish_all([begin(tmp_path / "run", endless(3), *flags[i]) for i in (0, 1, 1)])
    assert [code for code, _, _ in ends] == [2, 2, 2], ends
    for _, _, err in ends:
        assert_last_line(err, "two processes have --process_id=1; give each of the 3 its own")


@pytest.mark.slow
def test_the_port_is_taken(begin, tmp_path):
    """Process 0 died of a segmentation fault."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ["--num_processes=2", f"--coordinator=localhost:{port}", "--process_id=0"]
        ((code, _, err),) = finish_all([begin(tmp_path / "run", endless(2), *flags)])
    assert code == 2
    assert_last_line(err, f"process 0 cannot listen on port {port} of --coordinator")


# ------------------------------------------------------------------------------- the stop


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 2, 4])
def test_sigterm_before_the_first_step(begin, tmp_path, seconds):
    """As soon as Python has begun to run the command; it was killed, with 143."""
    process = begin(tmp_path / "run", endless())
    wait_until(lambda: answers_sigterm(process), process)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    ((code, _, err),) = finish_all([process])
    assert code == 75, err
    assert_last_line(err, "stopped by SIGTERM", "start")
    assert time.monotonic() - begun < 30


@pytest.mark.slow
def test_sigterm_while_the_data_do_not_come(begin, tmp_path):
    """The log says what it waits for. Every step that was done is saved."""
    run = tmp_path / "run"
    process = begin(run, endless(), code=DATA_STOP)
    wait_until(lambda: logged_step(run) >= 29, process)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    ((code, _, err),) = finish_all([process])
    assert code == 75, err
    assert_last_line(err, "stopped by SIGTERM; saved at step 30; start it again to go on")
    assert f"waiting for the batch of step 31, from {WORLD}, for " in err
    assert saved_arrays(run)["step of the folder"] == 30


@pytest.mark.slow
def test_sigterm_to_one_of_two_while_the_data_do_not_come_to_one(begin, tmp_path):
    """They cannot save at one step. Both end, with what was saved last."""
    run, flags = tmp_path / "run", together(2)
    codes = ("", DATA_STOP)
    processes = [begin(run, endless(2), *flags[i], code=codes[i]) for i in range(2)]
    wait_until(lambda: logged_step(run) >= 29, processes[0])
    time.sleep(2)
    processes[1].send_signal(signal.SIGTERM)
    begun = time.monotonic()
    ends = finish_all(processes)
    assert time.monotonic() - begun < 40
    assert [code for code, _, _ in ends] == [75, 75], ends
    for _, _, err in ends:
        assert_last_line(err, "stopped by SIGTERM while waiting for the batch of step 31")
    assert "process 1 (pid " in ends[0][2].splitlines()[-1]


@pytest.mark.slow
def test_a_failed_save_ends_the_process_at_once(begin, tmp_path):
    config = make_config(WORLD, steps=60, train={"checkpoint_every": 20, "log_every": 60})
    process = begin(tmp_path / "run", config, code=WRITES_LITTLE)
    lines = []
    while line := process.stderr.readline():
        lines.append((time.monotonic(), line))
    process.communicate(timeout=60)
    said = [when for when, line in lines if "error: could not save a checkpoint" in line]
    assert said, lines
    assert process.returncode == 2
    assert time.monotonic() - said[0] < 3
