"""Workers of a sweep: killed, stopped, asleep, several processes each; no run is done twice."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from training import BATCH, make_config, make_store, together

from sae_jax.config import MeshConfig, to_dict
from sae_jax.errors import UserError
from sae_jax.sweep import grid, leases, worker
from sae_jax.sweep.design import make_passes
from sae_jax.sweep.directory import SweepDirectory, expand
from sae_jax.train.directory import read_config
from sae_jax.train.preemption import PreemptedError
from sae_jax.train.results import planned
from sae_jax.train.run import train_run

ROOT = pathlib.Path(__file__).parents[1]
GRID = grid.product(
    grid.sweep("sae.d_sae", [64, 96, 128]), grid.sweep("optimizer.learning_rate", [1e-3, 3e-3])
)
PASSES, STEPS, CHECKPOINT_EVERY = 3, 600, 50
LEASE_SECONDS = 4.0


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store")


def make_base(store: str, steps: int = STEPS):
    return make_config(
        store,
        steps=steps,
        data={"epochs": 10},
        train={"log_every": 10, "checkpoint_every": CHECKPOINT_EVERY},
    )


# ------------------------------------------------------ the worker alone, with pretended training


@pytest.fixture
def directory(store, tmp_path):
    """Of a sweep of three passes of one run."""
    runs = expand(make_base(store, 50), grid.sweep("data.seed", range(3)))
    return SweepDirectory.start(tmp_path / "S", runs)


def passes_of(directory):
    return make_passes([run.config for run in directory.runs], directory.passes)


@pytest.fixture
def training(directory, monkeypatch):
    """Makes `train(work, path, check, ...)` what trains a pass; returns how to pretend that
    a pass was trained."""

    def finish(work):
        for config in work.runs:
            result = planned(config)
            path = directory.path / "runs" / result["run_id"]
            path.mkdir(parents=True)
            (path / "result.json").write_text(json.dumps(result))

    def use(train):
        monkeypatch.setattr(worker.pass_trainer, "train_pass", train)
        return finish

    return use


def test_a_worker_waits_for_another_and_trains_the_rest(directory, training):
    others = leases.Leases(directory.path / "leases", 60)
    names, trained = [], []
    finish = training(lambda work, *_: (trained.append(work.name), finish(work)))
    for work in passes_of(directory):
        names.append(work.name)
    held = others.claim(names[1])

    def end_the_other():
        while len(trained) < 2:
            time.sleep(0.01)
        time.sleep(0.3)  # the worker waits
        trained.append("other's")
        (work,) = [w for w in passes_of(directory) if w.name == names[1]]
        finish(work)
        held.release()

    other = threading.Thread(target=end_the_other)
    other.start()
    worker.work(directory, lease_seconds=1)
    other.join()
    assert trained == [names[0], names[2], "other's"]
    assert all(directory.state(run) == "done" for run in directory.runs)
    rows = (directory.path / "results.csv").read_text().splitlines()
    assert len(rows) == 4 and all(",done," in row for row in rows[1:])


def take_over(directory, name: str) -> leases.Lease:
    """As if the owner had been silent for an hour."""
    (file,) = (directory.path / "leases").glob(f"{name}.*")
    os.utime(file, (1e9, 1e9))
    return leases.Leases(directory.path / "leases", 60).claim(name)


@pytest.mark.parametrize("trips", [False, True])
def test_a_worker_that_lost_its_lease_stops_without_a_word_of_error(directory, training, trips):
    """Also where it stumbled, over files that the other removed, before it had looked."""
    wrote, others = [], []

    def train(work, path, check, *_):
        check()
        if not others:
            others.append(take_over(directory, work.name))
            if trips:
                raise UserError("could not save a checkpoint")
            check()
            wrote.append(work.name)
        finish(work)
        others[0].release()

    finish = training(train)
    worker.work(directory, lease_seconds=60)
    assert not wrote
    assert all(directory.state(run) == "done" for run in directory.runs)


@pytest.mark.parametrize("error", [UserError("disk full"), KeyboardInterrupt()])
def test_what_ends_a_worker_frees_its_pass(directory, training, error):
    def train(*_):
        raise error

    training(train)
    with pytest.raises(type(error)):
        worker.work(directory, lease_seconds=60)
    free = leases.Leases(directory.path / "leases", 60)
    assert all(free.claim(work.name) for work in passes_of(directory))


def test_sigterm_ends_a_worker_that_waits(directory, training):
    training(lambda *_: None)
    others = leases.Leases(directory.path / "leases", 60)
    held = [others.claim(work.name) for work in passes_of(directory)]
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(PreemptedError):
        worker.work(directory, lease_seconds=60)
    assert not any(lease.lost() for lease in held)


# --------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def sweep_file(store, tmp_path_factory):
    file = tmp_path_factory.mktemp("sweep") / "directory.py"
    file.write_text(
        "from sae_jax.config import from_dict\n"
        f"def get_config(size=''): return from_dict({to_dict(make_base(store))!r})\n"
        f"def get_sweep(size=''): return {GRID!r}[: 2 if size == 'small' else None]\n"
    )
    return file


@pytest.fixture
def start(sweep_file):
    """Starts a worker; whoever still runs at the end of the test is killed."""
    workers = []

    def begin(directory: pathlib.Path, *flags: str, size: str = "") -> subprocess.Popen:
        command = [sys.executable, "-m", "sae_jax", "sweep", f"--config={sweep_file}:{size}"]
        command += [f"--workdir={directory}", f"--lease_seconds={LEASE_SECONDS}", *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        workers.append(process)
        return process

    yield begin
    for process in workers:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """The log of a worker that ends."""
    _, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "Traceback" not in err, err
    return err


@pytest.fixture(scope="module")
def undisturbed(sweep_file, tmp_path_factory):
    """The directory of the sweep, done by one worker."""
    directory = tmp_path_factory.mktemp("undisturbed") / "S"
    command = [sys.executable, "-m", "sae_jax", "sweep", f"--config={sweep_file}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [*command, f"--workdir={directory}", f"--passes={PASSES}"],
        env=environment,
        check=True,
        capture_output=True,
    )
    return directory


def assert_same_sweep(directory: pathlib.Path, undisturbed: pathlib.Path) -> None:
    results = (directory / "results.csv").read_text()
    assert results == (undisturbed / "results.csv").read_text()
    assert results.count(",done,") == len(GRID)
    for run in (undisturbed / "runs").iterdir():
        steps = [line["step"] for line in lines_of(directory / "runs" / run.name)]
        assert steps == sorted(set(steps)), "no step twice"
        others = set(steps) - set(range(10, STEPS + 1, 10))
        assert len(others) <= 1 and len(steps) == STEPS // 10 + len(others), "one for SIGTERM"


def lines_of(run: pathlib.Path) -> list[dict]:
    """Whole lines of a run's metrics.jsonl."""
    try:
        text = (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]


def snapshot(directory: pathlib.Path) -> dict[str, list]:
    """What must never be written again: results, with their wall time, and what was logged, with
    its speed, up to the newest step that all runs of the pass had saved."""
    kept = {}
    for run in (directory / "runs").glob("*"):
        if (run / "result.json").exists():
            kept[f"{run.name}/result.json"] = [(run / "result.json").read_text()]
        saved = [int(d.name) for d in run.glob("checkpoints/*") if d.name.isdigit()]
        until = max(saved, default=0) - CHECKPOINT_EVERY  # its pack may be one checkpoint behind
        kept[run.name] = [line for line in lines_of(run) if line["step"] <= until]
    return kept


def assert_nothing_was_done_twice(directory: pathlib.Path, kept: dict[str, list]) -> None:
    for name, what in kept.items():
        path = directory / "runs" / name
        if name.endswith("result.json"):
            assert [path.read_text()] == what, name
        else:
            assert lines_of(path)[: len(what)] == what, name


def last_steps(directory: pathlib.Path) -> list[int]:
    runs = (directory / "runs").glob("*")
    return sorted(lines[-1]["step"] for lines in map(lines_of, runs) if lines)


def wait_until(condition, processes, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.slow
def test_two_of_three_workers_killed_at_random_moments(start, undisturbed, tmp_path):
    directory = tmp_path / "S"
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)  # shown when the test fails
    moments = random.Random(seed)
    workers = [start(directory, f"--passes={PASSES}") for _ in range(3)]
    kept = {}
    alive = list(workers)
    for count in (2, 3):  # runs have come so far when a worker dies
        target = moments.randrange(60, 400)
        wait_until(lambda t=target, c=count: sum(s > t for s in last_steps(directory)) >= c, alive)
        victim = moments.choice(alive)
        alive.remove(victim)
        victim.kill()
        victim.communicate()
        assert victim.returncode == -signal.SIGKILL
        kept |= snapshot(directory)
    log = finish(alive[0])
    assert_same_sweep(directory, undisturbed)
    assert_nothing_was_done_twice(directory, kept)
    claims = [path for path in (directory / "leases").iterdir() if path.name != "clock"]
    assert len(claims) <= PASSES + 2, "a pass was claimed anew without a death"
    print(log)

    finished = snapshot(directory)
    assert len(finished) == 2 * len(GRID)
    assert "pass-" not in finish(start(directory)), "started again, there is nothing to do"
    assert snapshot(directory) == finished


@pytest.mark.long  # test_slurm.py tells workers to stop, too
@pytest.mark.parametrize("sign,code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_worker_told_to_stop_gives_its_pass_back(start, undisturbed, tmp_path, sign, code):
    directory = tmp_path / "S"
    process = start(directory, f"--passes={PASSES}")
    wait_until(lambda: sum(step > 230 for step in last_steps(directory)) >= 2, [process])
    process.send_signal(sign)
    assert "start it again to go on" in finish(process, code).splitlines()[-1]
    kept = snapshot(directory)
    begin = time.monotonic()
    log = finish(start(directory))
    assert "waiting" not in log, f"nobody was to be waited for, {time.monotonic() - begin} s"
    assert_same_sweep(directory, undisturbed)
    assert_nothing_was_done_twice(directory, kept)


@pytest.mark.long  # test_object_store.py has sleepers, too
def test_a_worker_that_slept_leaves_its_pass_to_its_successor(start, undisturbed, tmp_path):
    directory = tmp_path / "S"
    sleeper = start(directory, f"--passes={PASSES}")
    wait_until(lambda: sum(step > 130 for step in last_steps(directory)) >= 2, [sleeper])
    sleeper.send_signal(signal.SIGSTOP)
    successor = start(directory)
    wait_until(lambda: list((directory / "leases").glob("*.2")), [successor])
    (taken,) = (directory / "leases").glob("*.2")
    sleeper.send_signal(signal.SIGCONT)
    log = finish(sleeper)
    assert f"left {taken.name.removesuffix('.2')} to the worker that has taken it over" in log
    finish(successor)
    assert_same_sweep(directory, undisturbed)


@pytest.mark.slow
def test_a_worker_of_two_processes(start, tmp_path):
    """Process 0 claims, the other follows; told to stop, both do; started again, both go on. Each
    run's result is that of the run alone."""
    directory = tmp_path / "S"

    def start_pair():
        flags = ["--config.mesh.data=2", f"--config.train.tokens={200 * BATCH}"]
        return [start(directory, *flags, *own, size="small") for own in together(2)]

    pair = start_pair()
    wait_until(lambda: sum(step > 60 for step in last_steps(directory)) >= 2, pair)
    pair[1].send_signal(signal.SIGTERM)
    logs = [finish(process, 75) for process in pair]
    assert "pass-" in logs[0] and "pass-" not in logs[1]
    kept = snapshot(directory)
    logs = [finish(process) for process in start_pair()]
    assert "waiting" not in logs[0]
    assert_nothing_was_done_twice(directory, kept)
    for run in (directory / "runs").iterdir():
        result = json.loads((run / "result.json").read_text())
        alone = train_run(
            dataclasses.replace(read_config(run), mesh=MeshConfig(data=1)), tmp_path / run.name
        ).result
        assert (result["devices"], alone["devices"]) == (2, 1)
        for name in ("eval_loss", "eval_fvu", "eval_l0"):
            assert result[name] == pytest.approx(alone[name], rel=1e-4), name
    assert (directory / "results.csv").read_text().count(",done,") == 2
