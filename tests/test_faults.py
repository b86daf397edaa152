"""Four processes that are one run of `sae-jax train`, and what can happen to them. Every test is
the next misfortune of one and the same run, which the last test ends; alone it begins a run.
"""

import dataclasses
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import pytest
from training import (
    assert_each_step_once,
    assert_same_arrays,
    command,
    finish_all,
    launch,
    logged_step,
    make_config,
    metrics,
    saved_arrays,
    together,
    wait_until,
)

from sae_jax.config import Config

COUNT, STEPS, LOG_EVERY, CHECKPOINT_EVERY = 4, 300, 5, 20
HEARTBEAT, STUCK = 5, 8  # seconds
DIED, SILENT = "has died", "has not been heard of for"
AGAIN = r"start the same command again: it goes on from what was saved last, step (\d+) or later"
WRONG_CLOCK = """
import time
now, now_ns = time.time, time.time_ns
time.time, time.time_ns = lambda: now() + {0}, lambda: now_ns() + {0} * 10**9
"""
HANGS = """
import time
from sae_jax.cli import entry
from sae_jax.train.mesh import BatchPlacement
place, left = BatchPlacement.place, [30]

def hang(*arguments):
    left[0] -= 1
    time.sleep(0 if left[0] else 1e6)
    return place(*arguments)

BatchPlacement.place = hang
raise SystemExit(entry())
"""
WRITES_LITTLE = """
import resource
from sae_jax.cli import entry
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
raise SystemExit(entry())
"""
CONFIG = make_config(
    "world:orthonormal,width=16,features=16",
    steps=STEPS,
    sae={"aux_coefficient": 0.0},
    mesh={"data": 2, "model": 2},
    train={"log_every": LOG_EVERY, "checkpoint_every": CHECKPOINT_EVERY},
)


class Program:
    """The processes of the run in `run`, started again and again."""

    def __init__(self, run: pathlib.Path, config: Config = CONFIG):
        self.run, self.config = run, config
        self.processes: list[subprocess.Popen] = []

    def start(self, code: dict[int, str] | None = None, environment: dict | None = None) -> None:
        """code: what runs instead of `sae-jax`, by process; environment: of processes, as well."""
        self.saved = newest_checkpoint(self.run)
        flags = [f"--heartbeat_seconds={HEARTBEAT}", f"--watchdog_seconds={STUCK}"]
        for i, own in enumerate(together(COUNT)):
            program, *arguments = command(self.run, self.config, *flags, *own)
            if i in (code or {}):
                arguments = ["-c", code[i], *arguments[2:]]
            self.processes.append(launch([program, *arguments], (environment or {}).get(i)))

    def go_on(self) -> None:
        """Until a checkpoint and some steps were added to what was there."""
        before = self.saved or 0

        def came_on() -> bool:
            return (newest_checkpoint(self.run) or 0) > before and (
                logged_step(self.run) >= newest_checkpoint(self.run) + LOG_EVERY
            )

        wait_until(came_on, self.processes[0])

    def begin(self, **options) -> list[subprocess.Popen]:
        self.start(**options)
        self.go_on()
        if any(process.poll() is not None for process in self.processes):
            pytest.fail(f"ended too early: {finish_all(self.processes)}")
        return self.processes

    def finish(self, what: str) -> list[tuple[int, str]]:
        """(exit code, stderr) of each; prints how long they took, and what is lost."""
        begun, reached = time.monotonic(), logged_step(self.run)
        ends = [(code, err) for code, _, err in finish_all(self.processes)]
        self.processes = []
        saved = newest_checkpoint(self.run)
        print(f"{what}: all ended after {time.monotonic() - begun:.1f} s with "
              f"{[code for code, _ in ends]}; at step {reached}, saved {saved}")  # fmt: skip
        if self.saved is not None and ends[0][1]:
            assert f"resumed {self.run} at step {self.saved} of {STEPS}" in ends[0][1]
        return ends

    def assert_named(self, ends, victim: int, pid: int, words: str) -> None:
        """All but the victim end with 75 and one line that names it and says what to do."""
        for i in set(range(COUNT)) - {victim}:
            code, err = ends[i]
            (line,) = [line for line in err.splitlines() if line.startswith("sae-jax: ")]
            assert code == 75 and err.splitlines()[-1] == line, err
            assert line.startswith(f"sae-jax: process {victim} (pid {pid} on ")
            assert words in line
            assert int(re.search(AGAIN, line)[1]) <= newest_checkpoint(self.run)


def newest_checkpoint(run: pathlib.Path) -> int | None:
    """The newest that is whole."""
    try:
        names = os.listdir(run / "checkpoints")
    except FileNotFoundError:
        return None
    return max((int(name) for name in names if name.isdigit()), default=None)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A disk of 8 MB where one can be mounted, else any directory."""
    place = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    yield place
    if mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def program(disk):
    program = Program(disk / "run")
    yield program
    for process in program.processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_sigterm_to_one(program):
    program.begin()[3].send_signal(signal.SIGTERM)
    ends = program.finish("SIGTERM to one")
    step = newest_checkpoint(program.run)
    assert all(code == 75 and f"saved at step {step}" in err for code, err in ends), ends
    assert metrics(program.run)[-1]["step"] == step, "nothing is lost"


@pytest.mark.slow
def test_sigkill_to_one(program):
    victim = program.begin()[2]
    victim.kill()
    program.assert_named(program.finish("SIGKILL to one"), 2, victim.pid, DIED)


@pytest.mark.slow
def test_sigkill_to_the_coordinator(program):
    """JAX's trace comes first, and then who it was."""
    victim = program.begin()[0]
    victim.kill()
    program.assert_named(program.finish("SIGKILL to process 0"), 0, victim.pid, DIED)


@pytest.mark.slow
def test_sigstop_of_one(program):
    """When it goes on it finds itself alone."""
    victim = program.begin()[1]
    victim.send_signal(signal.SIGSTOP)
    for i in (0, 2, 3):
        program.processes[i].wait(60)
    victim.send_signal(signal.SIGCONT)
    ends = program.finish("SIGSTOP of one")
    program.assert_named(ends, 1, victim.pid, SILENT)
    assert ends[1][0] == 75 and "sae-jax: process 0 " in ends[1][1]


@pytest.mark.slow
def test_a_stuck_step(program):
    """One process waits for its data for ever, the others for it."""
    program.start(code={3: HANGS})
    pid = program.processes[3].pid
    for code, err in program.finish("a step that hangs in one"):
        last = err.splitlines()[-1]
        assert code == 75 and f"has not ended for {STUCK} s (--watchdog_seconds)" in last, err
        assert f"process 3 (pid {pid} on " in last and "has not begun it, the others have" in last


@pytest.mark.slow
def test_full_disk(program, disk):
    """Whoever finds it tells it, and the others end with the same code and the same reason."""
    if not os.path.ismount(disk):
        pytest.skip("needs to mount a small tmpfs, as root")
    program.begin()
    filler = disk / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        ends = program.finish("disk full")
    finally:
        filler.unlink()
    for code, err in ends:  # in which TensorStore may complain of a closed event loop, before
        assert code == 2, err
        assert re.search("full|No space left", err.splitlines()[-1]), err
    assert any("sae-jax train: error: " in err for _, err in ends)


@pytest.mark.slow
def test_one_that_cannot_save(program):
    """The others have written their part, and wait for its."""
    program.start(code={2: WRITES_LITTLE})
    pid = program.processes[2].pid
    ends = program.finish("one that cannot save")
    for i, (code, err) in enumerate(ends):
        last = err.splitlines()[-1]
        who = "sae-jax train: error: " if i == 2 else f"sae-jax: process 2 (pid {pid} on "
        assert code == 2 and last.startswith(who), err
        assert f"could not save a checkpoint under {program.run / 'checkpoints'}: " in last
        assert f"the last good one (step {program.saved}) is intact" in last
    assert newest_checkpoint(program.run) == program.saved


@pytest.mark.slow
def test_checkpoints_cut_off(program):
    """Half of a checkpoint is passed over where it has not got its name, as a kill leaves it; where
    it has, as a damaged disk leaves it, it is named with what to do."""
    if newest_checkpoint(program.run) is None:
        for process in program.begin():
            process.kill()
        program.finish("begun")
    steps = program.run / "checkpoints"
    newest = newest_checkpoint(program.run)
    half = steps / str(newest + 1)
    shutil.copytree(steps / str(newest), half)
    largest = max((f for f in half.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    shutil.copytree(half, steps / f"{newest + 2}.orbax-checkpoint-tmp")
    program.start()
    program.saved = None  # nothing is resumed
    for code, err in program.finish("half of a checkpoint"):
        assert code == 2 and "Traceback" not in err, err
        last = err.splitlines()[-1]
        assert f"checkpoint {half.name} under {steps} cannot be read" in last
        assert f"delete {half} to go on from the one before, of step {newest}" in last
    assert {path.name for path in steps.iterdir()} >= {str(newest), half.name}
    assert all(path.name.isdigit() for path in steps.iterdir()), "what is unfinished is removed"
    shutil.rmtree(half)


@pytest.mark.long
def test_sigkill_to_all_whose_clocks_are_an_hour_off(program, tmp_path):
    """Nobody is taken for dead before. By libfaketime where there is one, else in what Python
    reads."""
    libraries = list(pathlib.Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))

    def clock(hours: int) -> dict[str, str]:
        if libraries:
            off = {"LD_PRELOAD": str(libraries[0]), "FAKETIME": f"{hours:+d}h"}
            return off | {"DONT_FAKE_MONOTONIC": "1"}
        place = tmp_path / str(hours)
        place.mkdir()
        (place / "sitecustomize.py").write_text(WRONG_CLOCK.format(3600 * hours))
        return {"PYTHONPATH": f"{place}{os.pathsep}{pathlib.Path(__file__).parents[1]}"}

    processes = program.begin(environment={0: clock(1), 3: clock(-1)})
    for process in processes:
        process.kill()
    ends = program.finish("SIGKILL to all, the clocks of two an hour off")
    assert [code for code, _ in ends] == [-signal.SIGKILL] * COUNT
    logged = time.strptime(re.search(r"^\d+:\d+:\d+", ends[0][1], re.MULTILINE)[0], "%H:%M:%S")
    ahead = 3600 * (logged.tm_hour - time.localtime().tm_hour) + 60 * (
        logged.tm_min - time.localtime().tm_min
    )
    assert 1800 < ahead % 86400 < 5400


@pytest.mark.slow
def test_after_all_that_the_run_is_the_undisturbed_one(program, tmp_path):
    program.start()
    assert [code for code, _ in program.finish("to the end")] == [0] * COUNT
    seldom = dataclasses.replace(CONFIG.train, checkpoint_every=STEPS)
    config = dataclasses.replace(CONFIG, train=seldom)
    undisturbed = Program(tmp_path / "undisturbed", config)
    undisturbed.start()
    assert [code for code, _ in undisturbed.finish("undisturbed")] == [0] * COUNT
    assert_same_arrays(saved_arrays(program.run), saved_arrays(undisturbed.run))
    assert_each_step_once(program.run, STEPS, LOG_EVERY)
