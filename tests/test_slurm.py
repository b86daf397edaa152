"""launch/slurm.sbatch on a real Slurm of two nodes: many nodes, an array, back to the queue."""

import csv
import json
import pathlib
import re
import subprocess
import sys
import time

import pytest
import small_slurm
from training import assert_same_arrays, command, make_config, saved_arrays

from sae_jax.config import to_dict
from sae_jax.sweep import grid

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(small_slurm.MISSING),
        reason=f"{', '.join(small_slurm.MISSING)} not installed (Debian: slurm-wlm munge)",
    ),
]

ROOT = pathlib.Path(__file__).parents[1]
WORLD = "world:superposition,width=16,features=64"
STEPS, LOG_EVERY = 300, 5


class Jobs:
    """Jobs of launch/slurm.sbatch; what they write is in `directory`."""

    def __init__(self, environment: dict[str, str], directory: pathlib.Path):
        self.environment, self.directory = environment, directory

    def slurm(self, *command) -> str:
        done = subprocess.run(
            list(map(str, command)), env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, name: str, options: list[str], arguments: list[str]) -> str:
        """Submits `sae-jax ARGUMENTS`; returns the number of the job."""
        out = f"--output={self.directory}/{name}.%a.out"
        sbatch = ["sbatch", "--parsable", out, *options, ROOT / "launch" / "slurm.sbatch"]
        return self.slurm(*sbatch, *arguments)

    def show(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.slurm("scontrol", "show", "job", job)))

    def finish(self, *jobs: str) -> list[dict[str, str]]:
        """Until the jobs have ended; what Slurm says of them then."""
        self.wait(lambda: not self.slurm("squeue", "--noheader", f"--jobs={','.join(jobs)}"))
        ended = [self.show(job) for job in jobs]
        assert all(job["JobState"] == "COMPLETED" for job in ended), self.written()
        return ended

    def wait(self, condition) -> None:
        end = time.monotonic() + 150
        while not condition():
            assert time.monotonic() < end, f"waited too long\n{self.written()}"
            time.sleep(0.2)

    def written(self) -> str:
        return "\n".join(f"{p.name}:\n{p.read_text()}" for p in self.directory.glob("*.out"))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("jobs")
    program = directory / "bin" / "sae-jax"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m sae_jax "$@"\n')
    program.chmod(0o755)
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    with small_slurm.cluster() as slurm:
        path = f"{program.parent}:{slurm['PATH']}"
        yield Jobs(slurm | devices | {"PATH": path}, directory)


def logged_steps(run: pathlib.Path) -> list[int]:
    """Of the lines that are written to their end."""
    file = run / "metrics.jsonl"
    lines = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines]


def test_two_nodes_sent_back_to_the_queue_end_as_if_undisturbed(jobs, tmp_path):
    config = make_config(
        WORLD,
        steps=STEPS,
        mesh={"data": 2, "model": 2},
        data={"holdout_fraction": 0.0},  # nothing to evaluate: it takes longest
        train={"log_every": LOG_EVERY, "checkpoint_every": 50},
    )
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    numbers = [
        jobs.submit(run.name, ["--nodes=2"], command(run, config)[3:]) for run in (whole, disturbed)
    ]
    jobs.wait(lambda: max(logged_steps(disturbed), default=0) >= 50)
    jobs.slurm("scontrol", "requeue", numbers[1])
    ended = jobs.finish(*numbers)
    assert [(job["NumNodes"], job["Restarts"]) for job in ended] == [("2", "0"), ("2", "1")], (
        jobs.written()
    )
    stopped = re.search(r"stopped by SIGTERM; saved at step (\d+)", jobs.written())
    assert 50 <= int(stopped[1]) < STEPS
    assert_same_arrays(saved_arrays(disturbed), saved_arrays(whole))
    steps = logged_steps(disturbed)
    assert steps == sorted(set(steps)), "a step was logged twice"
    assert set(steps) - {int(stopped[1])} == set(logged_steps(whole)) - {int(stopped[1])}


def test_an_array_shares_a_sweep_and_who_is_told_to_stop_comes_back(jobs, tmp_path):
    """SIGTERM as Slurm sends it before a time limit: to the program and not to the shell."""
    file, directory = tmp_path / "sweep.py", tmp_path / "sweep"
    steps = 2000
    base = make_config(WORLD, steps=steps, train={"log_every": LOG_EVERY})
    runs = grid.sweep("optimizer.learning_rate", [1e-3, 3e-3])
    file.write_text(
        "from sae_jax.config import from_dict\n"
        f"def get_config(): return from_dict({to_dict(base)!r})\n"
        f"def get_sweep(): return {runs!r}\n"
    )
    arguments = ["sweep", f"--config={file}", f"--workdir={directory}", "--passes=2"]
    array = jobs.submit("worker", ["--array=0-1"], [*arguments, "--lease_seconds=5"])
    workers = [f"{array}_{i}" for i in range(2)]

    jobs.wait(lambda: len([run for run in directory.glob("runs/*") if logged_steps(run)]) == 2)
    jobs.slurm("scancel", "--signal=TERM", workers[1])
    ended = jobs.finish(*workers)
    assert [job["Restarts"] for job in ended] == ["0", "1"]
    assert f"job {workers[1]} goes back to the queue" in jobs.written()
    with (directory / "results.csv").open() as results:
        rows = list(csv.DictReader(results))
    assert len(rows) == 2 and all(float(row["eval_loss"]) > 0 for row in rows)
    for run in directory.glob("runs/*"):
        logged = logged_steps(run)
        assert logged == sorted(set(logged)) and logged[-1] == steps
