"""`sae-jax sweep`: what it lists before it trains, what it refuses, what it says of a sweep."""

import csv
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from training import make_config, make_store

from sae_jax import cli
from sae_jax.config import assign, to_dict
from sae_jax.sae import ARCHITECTURES
from sae_jax.sweep import dry_run, grid
from sae_jax.sweep.directory import Run, SweepDirectory, expand, load
from sae_jax.sweep.leases import Leases
from sae_jax.train.branch import Origin
from sae_jax.train.results import planned
from sae_jax.train.step import Trainer

GRID = """
    return grid.product(
        grid.sweep("sae.d_sae", [64, 128]),
        grid.budgets([3200, 6400], batch_size=64, warmup_tokens=640),
        grid.sweep("optimizer.learning_rate", [1e-3, 1e-2]),
    )"""
SEEDS = "return grid.sweep('train.seed', range({}))"
THREE_SEEDS = SEEDS.format(3)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture
def sweep_file(store, tmp_path):
    """Writes a sweep file with a body of get_sweep(); returns its path."""

    def write(body: str = GRID, name: str = "sweep.py") -> str:
        file = tmp_path / name
        file.write_text(
            "from sae_jax.config import Config, from_dict\n"
            "from sae_jax.sweep import grid\n"
            f"def get_config(): return from_dict({to_dict(make_config(store))!r})\n"
            f"def get_sweep(): {body}\n"
        )
        return str(file)

    return write


@pytest.fixture
def run_cli(capsys):
    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(["sweep", *map(str, argv)])
        return code, *capsys.readouterr()

    return run


def refused(run_cli, *argv: str) -> str:
    code, out, err = run_cli(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("sae-jax sweep: error: ") and err.count("\n") == 1
    return err


def test_a_dry_run_lists_runs_and_costs_without_a_device(sweep_file, store):
    """With a platform that does not exist, jax fails as soon as a device is asked for."""
    command = [sys.executable, "-m", "sae_jax", "sweep", f"--config={sweep_file()}", "--dry_run"]
    paths = ":".join([str(pathlib.Path(__file__).parents[1]), *sys.path])
    environment = os.environ | {"JAX_PLATFORMS": "none-such", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    runs = load(sweep_file(), {})
    for run in runs:
        assert run.id in done.stdout
    assert "8 runs in 4 packs, 100 steps of 64 tokens" in done.stdout
    assert "branches off pack 0 at step 40" in done.stdout
    alone, together = (re.split(" {2,}", line)[1:4] for line in done.stdout.splitlines()[-5:-3])
    tokens = 4 * (3200 + 6400)
    flops = 12 * 16 * (64 + 128) * 2 * (3200 + 6400)
    assert alone == [f"{tokens:,}", "2.46 MB", f"{flops:.3g}"], "16 float32 a token"
    shared = 12 * 16 * (64 + 128) * 2 * (10 * 64 + 6400)
    assert together == ["6,400", "410 kB", f"{shared:.3g}"], "one reading; decays of 10 steps"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_estimated_parameters_are_those_that_are_trained(store, architecture):
    config = make_config(store, architecture)
    (run,) = expand(config, [{}])
    with jax.set_mesh(
        jax.make_mesh((1, 1, 1), ("run", "data", "model"), devices=jax.devices()[:1])
    ):
        parameters = Trainer(run.config, 50, 1.0).abstract().parameters
    got = dry_run.parameters(run.config.sae)
    assert got == sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))


@pytest.mark.parametrize(
    "body,words",
    [
        ("return grid.sweep('sae.kk', [1])", ["'sae.kk'", "did you mean 'sae.k'"]),
        ("return grid.sweep('sae.k', [2, 129])", ["run 2 of 2 (sae.k=129)", "128"]),
        ("return grid.sweep('train.tokens', [64, 10**9])", ["run 2", "1000000000", "epochs"]),
        ("return grid.sweep('data.store', ['no/store'])", ["run 1", "no/store"]),
        (
            "return grid.sweep('sae.aux_k', [None, 8])",
            ["sae.aux_k=None and sae.aux_k=8", "the same run"],
        ),
        ("return []", ["get_sweep()", "not a grid"]),
        ("return [3]", ["get_sweep()", "not a grid"]),
        ("return {}", ["get_sweep()", "not a grid"]),
        ("return 1 / 0", ["sweep.py", "ZeroDivisionError"]),
    ],
)
def test_mistakes_in_a_sweep_are_found_before_it_starts(sweep_file, run_cli, tmp_path, body, words):
    err = refused(run_cli, f"--config={sweep_file(body)}", f"--workdir={tmp_path / 'S'}")
    for word in words:
        assert word in err
    assert not (tmp_path / "S").exists()


@pytest.mark.parametrize(
    "argv,words",
    [
        ([], ["--workdir"]),
        (["--workdir={tmp}/S"], ["--config"]),
        (["--workdir={tmp}/S", "--status"], ["S holds no sweep", "--config"]),
        (["--config={file}", "--workdir={tmp}/sweep.py"], ["sweep.py is a file"]),
        (["--config={plain}", "--dry_run"], ["plain.py has no get_sweep()"]),
        (["--config={file}", "--dry_run", "--passes=0"], ["passes"]),
        (["--config={file}", "--dry_run", "--config.sae.d_sae=256"], ["sae.d_sae", "sweep sets"]),
        (["--config={file}", "--dry_run", "--config.sae.d_sea=256"], ["did you mean"]),
    ],
)
def test_wrong_commands(sweep_file, run_cli, tmp_path, argv, words):
    plain = tmp_path / "plain.py"
    plain.write_text("from sae_jax.config import Config\ndef get_config(): return Config()\n")
    names = {"tmp": tmp_path, "file": sweep_file(), "plain": plain}
    err = refused(run_cli, *[text.format(**names) for text in argv])
    for word in words:
        assert word in err


def test_overrides_change_the_base(sweep_file):
    plain = load(sweep_file(), {})
    changed = load(sweep_file(), {"sae.k": "3", "mesh.model": "2"})
    assert {run.config.sae.k for run in changed} == {3}
    assert {run.id for run in plain}.isdisjoint(run.id for run in changed)
    moved = load(sweep_file(), {"mesh.model": "2"})
    assert [run.id for run in moved] == [run.id for run in plain], "the same runs elsewhere"
    assert moved[0].config.mesh.model == 2


def start(sweep_file, tmp_path, body=THREE_SEEDS, passes=None, **overrides):
    runs = load(sweep_file(body), {k.replace("__", "."): v for k, v in overrides.items()})
    return SweepDirectory.start(tmp_path / "S", runs, passes)


def test_the_same_sweep_is_opened_again(sweep_file, tmp_path):
    first = start(sweep_file, tmp_path, GRID, passes=2)
    for again in (
        start(sweep_file, tmp_path, GRID),
        start(sweep_file, tmp_path, GRID, passes=2, mesh__data="2"),
        SweepDirectory(tmp_path / "S"),
    ):
        assert [run.id for run in again.runs] == [run.id for run in first.runs]
        assert [run.swept for run in again.runs] == [run.swept for run in first.runs]
        assert again.passes == 2
    assert start(sweep_file, tmp_path, GRID, mesh__data="2").runs[0].config.mesh.data == 2
    assert sorted(path.name for path in (tmp_path / "S").iterdir()) == ["sweep.json"]


@pytest.mark.parametrize(
    "body,flags,words",
    [
        (SEEDS.format(4), [], ["new: train.seed=3)"]),
        (SEEDS.format(1), [], ["gone: train.seed=1, train.seed=2)"]),
        (THREE_SEEDS, ["--config.sae.k=5"], ["train.seed=0: sae.k: 2 -> 5"]),
        (THREE_SEEDS, ["--passes=3"], ["--passes=2, not 3"]),
        (
            "return grid.sweep('optimizer.b1', [0.5])",
            [],
            ["gone: train.seed=0, train.seed=1, train.seed=2; new: optimizer.b1=0.5"],
        ),
    ],
)
def test_another_grid_in_the_directory_is_shown(sweep_file, run_cli, tmp_path, body, flags, words):
    start(sweep_file, tmp_path, passes=2)
    before = (tmp_path / "S" / "sweep.json").read_text()
    file = sweep_file(body, "other.py")
    err = refused(run_cli, f"--config={file}", f"--workdir={tmp_path / 'S'}", *flags)
    for word in [*words, "another --workdir", "finished stand"]:
        assert word in err
    assert (tmp_path / "S" / "sweep.json").read_text() == before


def test_more_passes_than_the_runs_make_are_told(sweep_file, run_cli):
    _, out, _ = run_cli(f"--config={sweep_file()}", "--dry_run", "--passes=7")
    assert "--passes=7 is more than can be made of 8 runs: there are 4 passes" in out
    _, out, _ = run_cli(f"--config={sweep_file()}", "--dry_run", "--passes=4")
    assert "--passes" not in out


def test_what_a_branch_takes_of_the_file_and_not_of_the_run_is_told(
    store, sweep_file, tmp_path, monkeypatch
):
    origin = Origin(tmp_path / "runs" / "a", 20, expand(make_config(store), [{}])[0].config)
    monkeypatch.setattr(dry_run, "_cached_origin", lambda name: origin)
    base = origin.branch()
    rates = [{"optimizer.learning_rate": 0.5}, {"optimizer.learning_rate": 0.25}]
    alike = [Run(f"{i}", grid.apply(base, swept), swept) for i, swept in enumerate(rates)]
    assert not [line for line in dry_run.doubts(alike) if "the sweep's file" in line]
    other = [dataclasses.replace(r, config=assign(r.config, {"sae.k": 3})) for r in alike]
    (line,) = [line for line in dry_run.doubts(other) if "the sweep's file" in line]
    assert line.startswith("2 of 2 runs: they go on from") and line.endswith(": sae.k: 2 -> 3")


def pretend(directory, run, file: str, values: dict, step: int = 50) -> None:
    path = directory.run_path(run)
    path.mkdir(parents=True, exist_ok=True)
    (path / file).write_text(json.dumps(values))
    line = {"step": step, "loss": 100.0 / step, "tokens_per_second": 640.0}
    (path / "metrics.jsonl").write_text(
        json.dumps({"step": 1}) + f"\n{json.dumps(line)}\n" + '{"st'
    )


def test_results_have_a_row_for_each_run_in_the_order_of_the_grid(sweep_file, tmp_path):
    directory = start(sweep_file, tmp_path)
    texts = []
    for wall_seconds, order in ((3.0, (0, 1)), (4.0, (1, 0))):  # other workers, another order
        for i in order:
            run = directory.runs[i]
            result = planned(run.config) | {"eval_loss": 0.1 + i, "wall_seconds": wall_seconds}
            pretend(directory, run, "result.json", result)
        pretend(directory, directory.runs[2], "failed.json", {})
        texts.append(directory.write_results().read_bytes())
    assert texts[0] == texts[1]
    rows = list(csv.DictReader(texts[0].decode().splitlines()))
    assert [row["run_id"] for row in rows] == [run.id for run in directory.runs]
    assert [row["status"] for row in rows] == ["done", "done", "failed"]
    assert [row["eval_loss"] for row in rows] == ["0.1", "1.1", ""]
    assert [row["train.seed"] for row in rows] == ["0", "1", "2"]
    assert {row["tokens"] for row in rows} == {"3200"} and "wall_seconds" not in rows[0]


def test_status_tells_of_passes_workers_and_failures(sweep_file, run_cli, tmp_path):
    directory = start(sweep_file, tmp_path, "return grid.sweep('data.seed', range(3))")
    done, failed, going = directory.runs
    pretend(directory, done, "result.json", planned(done.config))
    pretend(directory, failed, "failed.json", {})
    pretend(directory, going, "config.json", {}, step=20)
    name = f"pass-{going.id}"
    with Leases(directory.path / "leases", 60).claim(name):
        code, out, err = run_cli(f"--workdir={directory.path}", "--status")
    assert (code, err) == (0, "")
    assert "3 runs in 3 passes: 1 started, 1 done, 1 failed" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("pass-")}
    assert re.search(r" 20/50 +0/1/0/0 +5 +0:00:03 ", lines[name]), "30 steps of 64 at 640 a second"
    assert f"process {os.getpid()}, heard of 0 s ago" in lines[name]
    assert "50/50" in lines[f"pass-{done.id}"] and "ended" in lines[f"pass-{done.id}"]
    assert f"runs/{failed.id}  data.seed=1" in out
    assert len((directory.path / "results.csv").read_text().splitlines()) == 4
    assert "nobody" in run_cli(f"--workdir={directory.path}", "--status")[1]
