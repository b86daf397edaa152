"""`--log`: what Weights & Biases (offline) and TensorBoard are told equals metrics.jsonl."""

import json
import pathlib
import shutil
import struct
import sys
import time

import numpy as np
import pytest
from training import (
    BATCH,
    finish_all,
    logged_step,
    make_config,
    make_store,
    metrics,
    run_to_end,
    start,
    together,
    wait_until,
)

from sae_jax import cli
from sae_jax.config import to_dict
from sae_jax.errors import UserError
from sae_jax.sweep import grid, worker
from sae_jax.sweep.directory import SweepDirectory, expand
from sae_jax.train import directory, loggers
from sae_jax.train.loggers import Log, open_loggers, parse_log
from sae_jax.train.run import train_run

pytest.importorskip("wandb", reason='needs pip install "sae-jax[log]"')
pytest.importorskip("tensorboard", reason='needs pip install "sae-jax[log]"')

OFFLINE = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
BOTH = "wandb:a_project,tensorboard"
_BLOCK, _HEAD = 32_768, 7  # of a .wandb file: LevelDB's log format
_FULL, _LAST = 1, 4


class Killed(BaseException):
    """What ends a run of this process at once."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # or processes share that of this one


def small(store: str, steps: int = 24, every: int = 10, **sections):
    """A run that logs every step and saves every tenth."""
    return make_config(store, steps=steps, train={"checkpoint_every": every}, **sections)


def train_and_die(config, run: pathlib.Path, step: int, log_to: Log | None) -> None:
    def die(line: dict) -> None:
        if line["step"] == step:
            raise Killed

    with pytest.raises(Killed):
        train_run(config, run, log_to=log_to, on_metrics=[die])


def wandb_records(file: pathlib.Path) -> list:
    """Everything in an offline run's .wandb file, of which wandb has no public reader."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, records, parts = file.read_bytes(), [], []
    assert data[:4] == b":W&B"
    at = _HEAD
    while at + _HEAD <= len(data):
        if _BLOCK - at % _BLOCK < _HEAD:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + _HEAD])
        at += _HEAD
        parts.append(data[at : at + length])
        at += length
        if kind in (_FULL, _LAST):
            records.append(Record.FromString(b"".join(parts)))
            parts = []
    return records


def wandb_folders(run: pathlib.Path) -> list[list]:
    """The records of each start of a run, in their order."""
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    for _ in range(200):  # wandb's own process writes, also after finish()
        if all(any(r.HasField("exit") for r in wandb_records(file)) for file in files):
            break
        time.sleep(0.05)
    return [wandb_records(file) for file in files]


def wandb_lines(records: list) -> list[dict]:
    """The lines of metrics among a start's records; wandb's own fields begin with "_"."""
    lines = []
    for record in records:
        if record.HasField("history"):
            items = {(i.key or i.nested_key[0]): i.value_json for i in record.history.item}
            line = {key: json.loads(text) for key, text in items.items() if key[0] != "_"}
            assert record.history.step.num == line["step"]
            lines.append(line)
    return lines


def wandb_run(records: list):
    return next(record.run for record in records if record.HasField("run"))


def tensorboard_values(folder: pathlib.Path) -> dict[str, dict[int, float]]:
    """As TensorBoard itself reads them: for each name, the values by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    values = {}
    for name in events.Tags()["scalars"]:
        scalars = events.Scalars(name)
        values[name] = {scalar.step: scalar.value for scalar in scalars}
        assert len(values[name]) == len(scalars), "a step is there twice"
    return values


def without_nulls(line: dict) -> dict:
    return {name: value for name, value in line.items() if value is not None}


def assert_tensorboard_equals(run: pathlib.Path) -> None:
    want = {}
    for line in metrics(run):
        for name in without_nulls(line).keys() - {"step"}:
            want.setdefault(name, {})[line["step"]] = float(np.float32(line[name]))
    assert tensorboard_values(run / "tensorboard") == want


def assert_wandb_equals(run: pathlib.Path, starts: list[range]) -> None:
    """Every start has the lines of its steps, and the last word on each is metrics.jsonl's."""
    got = [wandb_lines(records) for records in wandb_folders(run)]
    assert [[line["step"] for line in lines] for lines in got] == [list(r) for r in starts]
    last = {line["step"]: line for lines in got for line in lines}
    assert list(last.values()) == [without_nulls(line) for line in metrics(run)]


@pytest.mark.slow
def test_an_interrupted_run_is_one_run_in_both(store, tmp_path):
    config, run = small(store), tmp_path / "run"
    log_to = parse_log(BOTH, run)
    train_and_die(config, run, 17, log_to)
    result = train_run(config, run, log_to=log_to).result
    assert_tensorboard_equals(run)
    assert_wandb_equals(run, [range(1, 17), range(1, 25)])
    for records in wandb_folders(run):
        said = wandb_run(records)
        assert (said.project, said.run_id, said.display_name) == (
            "a_project",
            result["run_id"],
            "run",
        )
        sae = next(json.loads(u.value_json) for u in said.config.update if u.key == "sae")
        assert sae == to_dict(directory.read_config(run))["sae"]
    stopped, ended = wandb_folders(run)
    codes = [
        [r.exit.exit_code for r in records if r.HasField("exit")] for records in (stopped, ended)
    ]
    assert codes == [[1], [0]]
    summary = {}
    for record in ended:
        summary |= {u.key: u.value_json for u in record.summary.update}
    assert json.loads(summary["eval_fvu"]) == result["eval_fvu"]


@pytest.mark.slow
def test_a_log_that_begins_late_gets_the_lines_before(store, tmp_path):
    config, run = small(store), tmp_path / "run"
    train_and_die(config, run, 17, None)
    train_run(config, run, log_to=parse_log(BOTH, run))
    assert_tensorboard_equals(run)
    assert_wandb_equals(run, [range(1, 25)])


@pytest.mark.long
def test_runs_of_a_sweep_each_have_their_own(store, tmp_path):
    """Two budgets: the longer run branches off the shorter one's trunk, and has its lines too."""
    path, base = tmp_path / "sweep_a", small(store)
    budgets = grid.budgets([24 * BATCH, 40 * BATCH], batch_size=BATCH, warmup_tokens=2 * BATCH)
    sweep = SweepDirectory.start(path, expand(base, budgets))
    worker.work(sweep, 60, log_to=parse_log(BOTH, path, is_sweep=True))
    for run, steps in zip(sweep.runs, (24, 40), strict=True):
        folder = sweep.run_path(run)
        assert_tensorboard_equals(folder)
        assert_wandb_equals(folder, [range(1, steps + 1)])
        (records,) = wandb_folders(folder)
        said = wandb_run(records)
        assert (said.run_id, said.run_group) == (run.id, "sweep_a")


def test_values_that_are_not_finite_are_left_out(store, tmp_path):
    config = small(store)
    for logger in open_loggers(parse_log(BOTH, tmp_path), config, tmp_path, 0, list):
        logger({"step": 5, "loss": None, "l0": 2.0})
        logger.close(None)
    assert tensorboard_values(tmp_path / "tensorboard") == {"l0": {5: 2.0}}
    assert [wandb_lines(r) for r in wandb_folders(tmp_path)] == [[{"step": 5, "l0": 2.0}]]


def test_a_failing_log_is_said_once_and_ends_nothing(store, tmp_path, monkeypatch, caplog):
    def fail(self, line):
        raise OSError("the service is gone")

    monkeypatch.setattr(loggers._TensorBoard, "__call__", fail)
    run = tmp_path / "run"
    result = train_run(small(store), run, log_to=parse_log("tensorboard", run)).result
    assert result and len(metrics(run)) == 24
    assert sum("the service is gone" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    "spec, text",
    [
        ("wandbb:p", "did you mean 'wandb'"),
        ("tensorbord", "did you mean 'tensorboard'"),
        ("csv", "must be one of: wandb, tensorboard"),
        ("wandb", "write log=wandb:PROJECT"),
        ("wandb:", "write log=wandb:PROJECT"),
        ("wandb:team/", "write log=wandb:PROJECT"),
        ("wandb:a/b/c", "none of /"),
        ("wandb:50%", "none of /"),
        ("wandb:a,wandb:b", "names wandb twice"),
        ("tensorboard:logs", "write tensorboard alone"),
        ("wandb:a,", "''"),
    ],
)
@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_bad_log_is_refused_before_anything_is_made(spec, text, command, store, tmp_path, capsys):
    file, workdir = tmp_path / "config.py", tmp_path / "there"
    file.write_text(
        "from sae_jax.config import from_dict\n"
        f"def get_config(): return from_dict({to_dict(small(store))!r})\n"
        "def get_sweep(): return [{'train.seed': 1}]\n"
    )
    code = cli.main([command, f"--config={file}", f"--workdir={workdir}", f"--log={spec}"])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and err.count("\n") == 1 and text in err
    assert not workdir.exists()


def test_tensorboard_needs_a_local_directory():
    for workdir in (None, "gs://bucket/run"):
        with pytest.raises(UserError, match="use a local workdir, or log=wandb:PROJECT"):
            parse_log("tensorboard", workdir)
        assert parse_log("wandb:team/a", workdir) == Log(project="team/a")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    """Even where a folder has its name, which Python imports as an empty package."""
    (tmp_path / "wandb").mkdir()
    for path in ([], [str(tmp_path)]):
        monkeypatch.setattr(sys, "path", path)
        monkeypatch.delitem(sys.modules, "wandb", raising=False)
        with pytest.raises(UserError, match=r'pip install "sae-jax\[log\]"'):
            parse_log("wandb:a")


@pytest.mark.slow
def test_of_two_processes_one_logs(store, tmp_path):
    config, run = small(store, mesh={"data": 2}), tmp_path / "run"
    flags = [f"--log={BOTH}", "--watchdog_seconds=0"]
    processes = [start(run, config, *flags, *f, environment=OFFLINE) for f in together(2)]
    assert [code for code, *_ in finish_all(processes)] == [0, 0]
    assert_tensorboard_equals(run)
    assert_wandb_equals(run, [range(1, 25)])


@pytest.mark.long
def test_a_killed_command_goes_on_in_both(store, tmp_path):
    """SIGKILL leaves no time to close anything; wandb's last folder has the whole run."""
    config, run = small(store, steps=120), tmp_path / "run"
    process = start(run, config, f"--log={BOTH}", environment=OFFLINE)
    wait_until(lambda: (run / "checkpoints" / "10").exists() and logged_step(run) > 15, process)
    process.kill()
    process.communicate()
    code, _, err = run_to_end(run, config, f"--log={BOTH}")
    assert code == 0, err
    assert_tensorboard_equals(run)
    killed, _ = sorted((run / "wandb").glob("offline-run-*"))
    shutil.rmtree(killed)
    assert_wandb_equals(run, [range(1, 121)])


@pytest.mark.slow
@pytest.mark.parametrize("key", [pytest.param("", marks=pytest.mark.long), "0" * 40])
def test_a_server_that_refuses_or_is_not_there(key, store, tmp_path):
    """Nobody is logged in: a mistake. The server cannot be reached: one warning."""
    environment = {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": key,
        "WANDB_BASE_URL": "http://localhost:9",
        "WANDB_INIT_TIMEOUT": "5",
        "HOME": str(tmp_path),
    }
    run = tmp_path / "run"
    process = start(run, small(store), "--log=wandb:p", environment=OFFLINE | environment)
    _, err = process.communicate(timeout=120)
    ours = [line for line in err.splitlines() if "wandb" in line and not line.startswith("wandb:")]
    if key:
        assert process.returncode == 0 and len(metrics(run)) == 24
        assert len(ours) == 1 and "the run goes on" in ours[0]
    else:
        assert process.returncode == 2
        assert len(ours) == 1 and "WANDB_MODE=offline" in ours[0]
