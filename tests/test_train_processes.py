"""Real processes of `sae-jax train`: killed, told to stop, two at once. (What can happen to several
is in test_faults.)"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from training import (
    assert_each_step_once,
    assert_same_arrays,
    finish_all,
    logged_step,
    make_config,
    make_store,
    metrics,
    run_to_end,
    saved_arrays,
    sparse_rows,
    start,
    together,
    wait_until,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="module")
def long_store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "long", sparse_rows(1 << 17))


def long_run(store: str):
    return make_config(
        store, steps=1800, train={"log_every": 5, "checkpoint_every": 20, "keep_checkpoints": 2}
    )


@pytest.fixture(scope="module")
def uninterrupted(long_store, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    code, _, err = run_to_end(run, long_run(long_store))
    assert code == 0, err
    return run


def test_sigkill_at_ten_random_moments(long_store, uninterrupted, tmp_path):
    run, config = tmp_path / "run", long_run(long_store)
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)  # shown when the test fails
    moments = random.Random(seed)
    kills = saving = 0
    for target in sorted(moments.sample(range(1, 1700), 10)):
        process = start(run, config)
        wait_until(lambda target=target: logged_step(run) >= target, process)
        if kills % 2:  # while a checkpoint is being written
            wait_until(lambda: unfinished(run), process)
        else:
            time.sleep(moments.uniform(0, 0.05))
        saving += bool(unfinished(run))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    print("killed", kills, "times, of which while saving:", saving)
    assert kills >= 9 and saving >= 2
    code, _, err = run_to_end(run, config)
    assert code == 0, err
    assert_same_arrays(saved_arrays(run), saved_arrays(uninterrupted))
    assert_each_step_once(run, 1800, 5)
    assert not unfinished(run)
    want = {line["step"]: line["loss"] for line in metrics(uninterrupted)}
    assert {line["step"]: line["loss"] for line in metrics(run)} == want


def unfinished(run: pathlib.Path) -> list[str]:
    """Checkpoints that have no final name yet."""
    try:
        return [name for name in os.listdir(run / "checkpoints") if not name.isdigit()]
    except FileNotFoundError:
        return []


@pytest.mark.parametrize(
    "sign,code",
    [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)],
)
def test_stopped_by_a_signal(long_store, uninterrupted, tmp_path, sign, code):
    run, config = tmp_path / "run", long_run(long_store)
    process = start(run, config)
    wait_until(lambda: logged_step(run) >= 333, process)
    process.send_signal(sign)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    step = int(saved_arrays(run)["step of the folder"])
    if sign == signal.SIGTERM:
        assert metrics(run)[-1]["step"] == step, "saved at another step than it stopped at"
        assert f"saved at step {step}" in err
    else:
        assert err.splitlines()[-1] == "sae-jax train: interrupted; start it again to go on"
    done, _, err = run_to_end(run, config)
    assert done == 0, err
    assert_same_arrays(saved_arrays(run), saved_arrays(uninterrupted))
    assert_each_step_once(run, 1800, 5)


@pytest.mark.parametrize(
    "mesh", [(2, 2), *(pytest.param(m, marks=pytest.mark.long) for m in [(4, 1), (1, 4)])], ids=str
)
def test_two_processes_equal_one(store, tmp_path, mesh):
    shape = {"data": mesh[0], "model": mesh[1]}
    config = make_config(store, mesh=shape)
    flags = together(2, devices=2)
    ends = finish_all([start(tmp_path / "two", config, *flags[i]) for i in range(2)])
    assert [end[0] for end in ends] == [0, 0], ends
    assert "run_id" in ends[0][1] and "run_id" not in ends[1][1]  # one tells the result
    assert "step 50/50" in ends[0][2] and "step 50/50" not in ends[1][2]
    code, _, err = run_to_end(tmp_path / "one", make_config(store))
    assert code == 0, err
    got, want = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert [line["step"] for line in got] == list(range(1, 51))
    np.testing.assert_allclose([m["loss"] for m in got], [m["loss"] for m in want], rtol=1e-5)


@pytest.mark.parametrize("flags", [["--distributed"], ["--coordinator=localhost:1"]])
def test_processes_that_cannot_find_each_other(store, tmp_path, flags):
    code, _, err = run_to_end(tmp_path / "run", make_config(store), *flags)
    assert code == 2
    assert err.count("\n") == 1 and "--coordinator=HOST:PORT" in err


def test_batchtopk_picks_the_same_latents_on_1_2_4_and_8_devices():
    """Bit for bit, ties and all."""
    script = pathlib.Path(__file__).with_name("eight_devices.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 9 and all(line.endswith("same") for line in lines), done.stdout
