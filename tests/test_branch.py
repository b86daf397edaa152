"""Runs that go on from another's checkpoint: branches, extensions, and what they refuse."""

import dataclasses
import json
import shutil
import signal
import sys

import numpy as np
import pytest
from training import (
    BATCH,
    assert_each_step_once,
    assert_same_arrays,
    finish_all,
    launch,
    logged_step,
    make_config,
    make_store,
    metrics,
    saved_arrays,
    sparse_rows,
    wait_until,
)

import sae_jax
from sae_jax import cli, interop
from sae_jax.config import override
from sae_jax.errors import UserError
from sae_jax.train.branch import extension
from sae_jax.train.checkpoints import saved_steps
from sae_jax.train.directory import read_config
from sae_jax.train.run import train_run

STEPS, TRUNK = 40, 32  # of the run that is left


def base(store, architecture="topk", **sections):
    optimizer = {"schedule": "warmup_stable_decay", "warmup_fraction": 0.1, "learning_rate": 3e-3}
    train = {"log_every": 5, "checkpoint_every": 20, "keep_trunk": True}
    sections = {"optimizer": optimizer, "train": train} | sections
    return make_config(store, architecture, STEPS, **sections)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="module")
def done(store, tmp_path_factory):
    """A finished run."""
    run = tmp_path_factory.mktemp("runs") / "done"
    train_run(base(store), run)
    return run


def command(*flags) -> int:
    return cli.main(["train", *map(str, flags)])


def refused(capsys, *flags) -> str:
    assert command(*flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("sae-jax train: error: ") and err.count("\n") == 1
    return err


def without_speed(run) -> list[dict]:
    return [{n: v for n, v in line.items() if n != "tokens_per_second"} for line in metrics(run)]


def from_the_beginning(config):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, branch_from=""))


def test_a_run_keeps_the_end_of_its_trunk(done):
    assert saved_steps(done) == [20, TRUNK, 40]
    assert [line["step"] for line in metrics(done)] == [*range(5, 41, 5)]


@pytest.mark.slow
def test_the_directory_alone_resumes(done, store, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative store is that of where the run was started
    run = shutil.copytree(done, tmp_path / "run")
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "40")
    assert command(f"--workdir={run}", "--config.mesh.data=1") == 0
    assert_same_arrays(saved_arrays(run), saved_arrays(done))
    assert json.loads(capsys.readouterr().out)["tokens"] == STEPS * BATCH
    assert "sae.k: 2 -> 3" in refused(capsys, f"--workdir={run}", "--config.sae.k=3")
    assert "--config.data.store" in refused(capsys, f"--workdir={tmp_path / 'none'}")


@pytest.mark.parametrize("step", [20, pytest.param(TRUNK, marks=pytest.mark.slow)])
def test_a_branch_that_changes_nothing_is_the_run_that_it_left(done, tmp_path, step):
    branch = tmp_path / "branch"
    assert command(f"--workdir={branch}", f"--branch_from={done}/checkpoints/{step}") == 0
    assert_same_arrays(saved_arrays(branch), saved_arrays(done))
    assert without_speed(branch) == without_speed(done)


@pytest.mark.slow
def test_a_branch_changes_fields_and_tells_its_lineage(done, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ["--config.optimizer.learning_rate=1e-3", "--config.optimizer.clip_norm=none"]
    assert command(f"--workdir={first}", f"--branch_from={done}/checkpoints/20", *flags) == 0
    lines = {line["step"]: line for line in without_speed(first)}
    assert [lines[step] for step in (5, 20)] == [without_speed(done)[i] for i in (0, 3)]
    assert lines[25]["lr"] == pytest.approx(1e-3)
    shutil.rmtree(first / "checkpoints" / "40")
    (first / "result.json").unlink()
    assert command(f"--workdir={first}") == 0  # a branch, too, is resumed by its directory
    flags = [f"--workdir={second}", f"--branch_from={first}", "--config.sae.k=4"]
    assert command(*flags, "--config.train.tokens=3840") == 0
    eldest, parent = json.loads((second / "config.json").read_text())["lineage"]
    assert (eldest["step"], parent["step"], parent["tokens"]) == (20, 40, STEPS * BATCH)
    assert eldest["changed"] == [
        "optimizer.clip_norm: 1.0 -> None",
        "optimizer.learning_rate: 0.003 -> 0.001",
    ]
    assert parent["changed"] == ["sae.k: 2 -> 4", "train.tokens: 2560 -> 3840"]
    result = json.loads((second / "result.json").read_text())
    assert result["branched_from"] == f"{first}/checkpoints/40" and result["tokens"] == 3840
    provenance = interop.read_provenance(second)
    interop.export(sae_jax.load(second), "saelens", tmp_path / "export", provenance)
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"run {eldest['run_id']} at 1,280 tokens" in card and "sae.k: 2" in card


@pytest.mark.parametrize("architecture,fields", [
    pytest.param("topk", {}, marks=pytest.mark.slow),
    pytest.param("relu", {"sparsity_warmup_fraction": 0.2}, marks=pytest.mark.long),
])  # fmt: skip
def test_an_extension_is_the_longer_run(store, tmp_path, architecture, fields):
    config = base(store, architecture, sae=fields)
    train_run(config, tmp_path / "run")
    flags = [f"--workdir={tmp_path / 'longer'}", f"--branch_from={tmp_path / 'run'}"]
    assert command(*flags, f"--extend_tokens={70 * BATCH}") == 0
    longer = read_config(tmp_path / "longer")
    assert longer.train.branch_from == f"{tmp_path / 'run'}/checkpoints/{TRUNK}"
    train_run(from_the_beginning(longer), tmp_path / "whole")
    assert_same_arrays(saved_arrays(tmp_path / "longer"), saved_arrays(tmp_path / "whole"))
    before = (tmp_path / "longer" / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "run")  # the longer run is whole without it
    assert command(*flags, f"--extend_tokens={70 * BATCH}") == 0
    assert (tmp_path / "longer" / "metrics.jsonl").read_text() == before


def test_what_an_extension_keeps_and_changes_is_told(done, caplog):
    with caplog.at_level("INFO"):
        longer = extension(str(done), 80 * BATCH, {})
    before = read_config(done)
    assert longer.sae.dead_after_tokens == before.sae.dead_after_tokens
    fractions = [c.optimizer.warmup_fraction for c in (before, longer)]
    assert fractions[1] == round(40 * fractions[0]) / 80
    assert f"sae.dead_after_tokens {before.sae.dead_after_tokens}; it changes" in caplog.text
    assert f"optimizer.warmup_fraction: {fractions[0]} -> {fractions[1]}" in caplog.text


@pytest.mark.slow
def test_an_extension_that_was_killed_is_the_longer_run(store, tmp_path):
    """Before its first checkpoint and after it; what goes on knows its directory alone."""
    train = {"log_every": 5, "checkpoint_every": 50, "keep_trunk": True}
    config = base(store, data={"epochs": 20}, train=train | {"tokens": 200 * BATCH})
    train_run(config, tmp_path / "run")
    longer, tokens = tmp_path / "longer", 1200 * BATCH
    program = [sys.executable, "-m", "sae_jax", "train", f"--workdir={longer}"]
    begin = [f"--branch_from={tmp_path / 'run'}", f"--extend_tokens={tokens}"]
    begun, far = (longer / "config.json").exists, lambda: logged_step(longer) > 500
    for flags, until in ((begin, begun), ([], far)):
        process = launch([*program, *flags])
        wait_until(until, process)
        process.kill()
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"it ended before it was killed: {err}"
    code, _, err = finish_all([launch(program)])[0]
    assert code == 0, err
    train_run(from_the_beginning(read_config(longer)), tmp_path / "whole")
    assert_same_arrays(saved_arrays(longer), saved_arrays(tmp_path / "whole"))
    assert_each_step_once(longer, 1200, 5)


@pytest.mark.slow
def test_in_python(done, store, tmp_path):
    rows = sparse_rows(8192)
    whole = sae_jax.train(sae_jax.TopK(d_in=16, d_sae=64, k=2), rows, workdir=tmp_path / "a")
    steps = whole.result["tokens"] // whole.config.data.batch_size
    trunk = steps - max(1, round(0.2 * steps))
    again = sae_jax.train(data=rows, branch_from=f"{tmp_path / 'a'}/checkpoints/{trunk}")
    for name, value in whole.sae.parameters().items():
        np.testing.assert_array_equal(again.sae.parameters()[name], value, err_msg=name)
    assert len(again.metrics) == len(whole.metrics)
    longer = sae_jax.train(branch_from=done, extend_tokens=60 * BATCH)
    assert longer.result["tokens"] == 60 * BATCH and longer.metrics[0]["step"] == 5
    with pytest.raises(UserError, match="parameters"):
        sae_jax.train(whole.sae, branch_from=done)


# ------------------------------------------------------------------ mistakes


@pytest.fixture(scope="module")
def places(done, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    old = shutil.copytree(done, folder / "old")  # as an earlier version left it
    for step in (20, 32):
        shutil.rmtree(old / "checkpoints" / str(step))
    return {"other": make_store(folder / "other", sparse_rows(8192, seed=1)), "old": old}


@pytest.mark.parametrize("flags,words", [
    (["--branch_from={done}/checkpoints/30"], ["step 30", "only of [20, 32, 40]"]),
    (["--branch_from={tmp}"], ["is not a run"]),
    (["--branch_from={done}/checkpoints/20", "--config.sae.d_sae=64"], ["128 -> 64", "init"]),
    (["--branch_from={done}/checkpoints/20", "--config.data.seed=1"], ["seed: 0 -> 1"]),
    (["--branch_from={done}/checkpoints/20", "--config.train.tokens=1280"], ["step 20"]),
    (["--branch_from={done}/checkpoints/20", "--config.data.store={other}"], ["not the data"]),
    (["--branch_from={done}", "--extend_tokens=2560"], ["40 already", "give more"]),
    (["--branch_from={done}", "--extend_tokens=2000"], ["40 already"]),
    (["--branch_from={done}", "--extend_tokens=1e4", "--config.sae.k=3"], ["sae.k", "another run"]),
    (["--branch_from={done}/checkpoints/20", "--extend_tokens=1e4"], ["without a step"]),
    (["--extend_tokens=1e4"], ["--branch_from="]),
    (["--branch_from={done}", "--extend_tokens=1e9"], ["epochs"]),
    (["--branch_from={old}", "--extend_tokens=1e4"], ["no checkpoint of its trunk", "[40]"]),
])  # fmt: skip
def test_mistakes(done, places, tmp_path, capsys, flags, words):
    flags = [flag.format(done=done, tmp=tmp_path, **places) for flag in flags]
    err = refused(capsys, f"--workdir={tmp_path / 'new'}", *flags)
    for word in words:
        assert word in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("changes,words", [
    ({"optimizer.schedule": "cosine"}, ["the schedule cosine"]),
    ({"sae.architecture": "relu", "sae.target_l0": "4"}, ["target_l0"]),
])  # fmt: skip
def test_a_run_without_a_trunk_has_no_extension(store, tmp_path, changes, words):
    config = override(base(store), changes)
    (tmp_path / "run").mkdir()
    values = sae_jax.config.to_dict(config)
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        extension(str(tmp_path / "run"), 10**5, {})
    for word in words:
        assert word in str(error.value)


def test_another_run_in_the_directory_of_a_branch(done, tmp_path, capsys):
    run = shutil.copytree(done, tmp_path / "run")
    assert "no branch" in refused(capsys, f"--workdir={run}", f"--branch_from={done}")
    assert "stays as it is" in refused(capsys, f"--workdir={run}", "--extend_tokens=1e4")
