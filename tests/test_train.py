"""A run and its mistakes, in this process, on one device."""

import dataclasses
import json
import shutil
import threading

import jax
import numpy as np
import pytest
from training import BATCH, make_config, make_store, metrics, saved_arrays, sparse_rows

import sae_jax
from sae_jax import cli
from sae_jax.activations import open_stream, write_store
from sae_jax.config import override
from sae_jax.errors import UserError
from sae_jax.train import preparation, results, run
from sae_jax.train.directory import RunDirectory, read_config
from sae_jax.train.median import geometric_median
from sae_jax.train.recorder import NonFiniteError
from sae_jax.train.run import train_run
from sae_jax.train.step import Trainer


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="module")
def done(store, tmp_path_factory):
    """A finished run of 30 steps and its result."""
    run = tmp_path_factory.mktemp("runs") / "done"
    config = make_config(store, steps=30, train={"log_every": 10, "checkpoint_every": 20})
    return run, config, train_run(config, run).result


FIELDS = """run_id architecture d_in d_sae k sparsity_coefficient seed lr tokens flops eval_loss
eval_fvu eval_l0 dead_fraction wall_seconds devices""".split()
LINE = """step tokens flops loss mse fvu l0 l1 dead_fraction grad_norm lr sparsity_coefficient
tokens_per_second""".split()


def test_what_a_run_leaves(done):
    run, config, result = done
    assert {path.name for path in run.iterdir()} == {
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "result.json",
    }
    assert json.loads((run / "result.json").read_text()) == result
    assert set(FIELDS) <= result.keys()
    assert result["tokens"] == 30 * BATCH and result["flops"] == 12 * 16 * 128 * 30 * BATCH
    lines = metrics(run)
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert all(set(LINE) <= line.keys() for line in lines)
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"20", "30"}
    resolved = read_config(run)
    assert resolved.sae.d_in == 16 and resolved.sae.aux_k == 8
    assert resolved.optimizer.learning_rate > 0
    assert json.loads((run / "config.json").read_text())["environment"]["jax"] == jax.__version__


@pytest.mark.slow
def test_checkpoints_leave_no_threads(store, tmp_path):
    """Each with files of its own, of which a process may have a thousand open."""
    before = threading.active_count()
    config = make_config(store, steps=24, train={"checkpoint_every": 1, "keep_checkpoints": 1})
    train_run(config, tmp_path / "run")
    assert threading.active_count() < before + 12


def test_loaded_sae_is_the_trained_one(done):
    run, _, result = done
    sae, saved = sae_jax.load(run), saved_arrays(run)
    for name, value in sae.parameters().items():
        np.testing.assert_array_equal(value, saved[f"['parameters']['{name}']"])
    rows = sparse_rows(512, seed=9)
    fvu = np.sum((rows - sae(rows)) ** 2) / np.sum((rows - rows.mean(axis=0)) ** 2)
    assert fvu == pytest.approx(result["eval_fvu"], rel=0.3)
    assert sae.scale == pytest.approx(4 / np.sqrt(np.mean(np.sum(rows**2, axis=1))), rel=0.1)


def test_one_checkpoint_of_a_run_loads(done):
    run, _, _ = done
    last = sae_jax.load(run).parameters()
    for step, same in (("30", True), ("20", False)):
        there = sae_jax.load(run / "checkpoints" / step).parameters()
        assert np.array_equal(there["w_enc"], last["w_enc"]) == same
    with pytest.raises(UserError, match=r"no checkpoint of step 25, only of \[20, 30\]"):
        sae_jax.load(run / "checkpoints" / "25")


def test_finished_run_is_not_trained_again(done, monkeypatch):
    run, config, result = done
    monkeypatch.setattr(Trainer, "__init__", None)
    assert train_run(config, run).result == result


def test_scalar_normalisation_gives_norm_d(store):
    config = make_config(store)
    stream = open_stream(config.data)
    rows = np.concatenate([stream.read(step) for step in range(stream.num_steps)])
    for normalize, norm in (("sqrt_d", 16), ("unit", 1)):
        config = override(config, {"sae.normalize": normalize})
        scale, target_scale, variance = preparation.normalisation(config, stream)
        assert scale == target_scale
        scaled = rows * scale
        assert np.mean(np.sum(scaled**2, axis=1)) == pytest.approx(norm, rel=0.02)
        assert np.sum(np.var(scaled, axis=0)) == pytest.approx(variance, rel=0.02)


def test_geometric_median_ignores_outliers():
    rows = np.random.default_rng(0).normal(size=(1001, 4)).astype(np.float32) + 3
    rows[:100] = 1e4
    np.testing.assert_allclose(geometric_median(rows), 3, atol=0.4)


# ------------------------------------------------------------------ mistakes


def refused(config, run) -> str:
    """The one line that `train` refuses with."""
    with pytest.raises(UserError) as error:
        train_run(config, run)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_config_in_the_same_directory(done):
    run, config, result = done
    other = override(config, {"sae.k": "5", "optimizer.b2": "0.99"})
    message = refused(other, run)
    assert "sae.k: 2 -> 5" in message and "optimizer.b2: 0.999 -> 0.99" in message
    assert str(run) in message and "--workdir" in message
    assert json.loads((run / "result.json").read_text()) == result


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"train.tokens": "1e6"}, ["train.tokens 1000000", "data.epochs=", "harvest more"]),
        ({"train.tokens": "63"}, ["train.tokens 63", "one batch of 64"]),
        ({"data.batch_size": "66"}, ["data.batch_size is 66", "data.virtual_shards=8"]),
        ({"mesh.data": "3"}, ["data.batch_size 64", "3 devices"]),
        ({"mesh.model": "3"}, ["sae.d_sae 128", "3 devices"]),
        ({"mesh.data": "5"}, ["takes 5 devices", "there are 4"]),
        ({"mesh.data": "-1", "mesh.model": "3"}, ["4 devices"]),
        ({"mesh.data": "0"}, ["mesh.data=0"]),
        ({"sae.d_in": "17"}, ["sae.d_in is 17", "16 wide"]),
        ({"sae.k": "129"}, ["sae.k must be", "128", "129"]),
        ({"data.site": "resid"}, ["resid", "activations"]),
        ({"data.holdout_fraction": "1"}, ["data.holdout_fraction"]),
        ({"train.on_nonfinite": "ignore"}, ["train.on_nonfinite", "stop"]),
        ({"train.log_every": "0"}, ["train.log_every"]),
        ({"optimizer.schedule": "linear"}, ["optimizer.schedule", "linear_tail"]),
    ],
)
def test_wrong_configs(store, tmp_path, changes, words):
    with pytest.raises(UserError) as error:
        train_run(override(make_config(store), changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"


def test_epochs_named_in_the_message_are_enough(store, tmp_path):
    config = make_config(store, steps=300)
    message = refused(config, tmp_path / "run")
    epochs = int(message.split("data.epochs=")[2].split()[0])
    enough = dataclasses.replace(config.data, epochs=epochs)
    config = dataclasses.replace(config, data=enough)
    stream = open_stream(config.data)
    assert preparation.checked_steps(config, stream) == 300
    assert epochs == 3


@pytest.mark.slow
def test_store_with_nan(tmp_path):
    rows = sparse_rows(4096)
    rows[100, 3], rows[200, 5] = np.nan, np.inf
    store = make_store(tmp_path / "bad", rows)
    message = refused(make_config(store, steps=5), tmp_path / "run")
    assert "2 rows" in message and "data.drop_nonfinite=true" in message
    config = make_config(store, steps=5, data={"drop_nonfinite": True})
    assert train_run(config, tmp_path / "run").result["eval_fvu"] > 0


def test_directory_that_is_no_run(store, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "holds no run" in refused(make_config(store), tmp_path)
    assert "is a file" in refused(make_config(store), tmp_path / "thesis.tex")
    with pytest.raises(UserError, match="is not a run"):
        read_config(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_killed_before_its_config_was_written(store, tmp_path):
    (tmp_path / "config.json.tmp").write_text('{"sa')
    RunDirectory(tmp_path, make_config(store))
    assert read_config(tmp_path) == make_config(store)


# What Orbax's reading threads had under way ends after their event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_checkpoint_is_named(done, tmp_path):
    run, config, _ = done
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    for file in (tmp_path / "run" / "checkpoints" / "30").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    message = refused(config, tmp_path / "run")
    assert "checkpoint 30" in message and "delete" in message
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "30")
    assert train_run(config, tmp_path / "run").result["tokens"] == 30 * BATCH


# ---------------------------------------------------------------- non-finite


@pytest.fixture(scope="module")
def huge_store(tmp_path_factory):
    """Finite rows, one of which is so large that its loss is not."""
    rows = sparse_rows(8192)
    rows[4000] = 3e22
    return make_store(tmp_path_factory.mktemp("store") / "huge", rows)


def bad_step(store, config) -> int:
    stream = open_stream(config.data)
    steps = [step for step in range(stream.num_steps) if 4000 in stream.batch_rows(step)]
    return steps[0] + 1


def test_nonfinite_loss_stops_with_the_last_good_checkpoint(huge_store, tmp_path):
    config = make_config(
        huge_store,
        steps=100,
        sae={"normalize": "none", "b_dec_init": "zero"},
        data={"include_excluded": True, "seed": 1},  # the large row counts as a high-norm position
        train={"log_every": 7, "checkpoint_every": 5, "keep_checkpoints": 3},
    )
    step = bad_step(huge_store, config)
    assert 10 < step < 95, "change data.seed"
    with pytest.raises(NonFiniteError) as error:
        train_run(config, tmp_path / "run")
    message = str(error.value)
    assert f"at step {step};" in message and "intact" in message and "\n" not in message
    saved = saved_arrays(tmp_path / "run")
    assert saved["step of the folder"] == (step - 1) // 5 * 5
    assert all(np.isfinite(array).all() for array in saved.values())
    assert sae_jax.load(tmp_path / "run").config.d_sae == 128
    with pytest.raises(NonFiniteError, match=f"step {step};"):  # and again when resumed
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


def test_nonfinite_step_is_skipped(huge_store, tmp_path):
    config = make_config(
        huge_store,
        steps=100,
        sae={"normalize": "none", "b_dec_init": "zero"},
        data={"include_excluded": True, "holdout_fraction": 0.0},
        train={"on_nonfinite": "skip"},
    )
    step = bad_step(huge_store, config)
    train_run(config, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["loss"] is None] == [step]
    assert lines[step]["loss"] < 2 * lines[step - 2]["loss"]
    saved = saved_arrays(tmp_path / "run")
    assert all(np.isfinite(array).all() for array in saved.values())


def test_exit_code_of_a_nonfinite_loss(monkeypatch, capsys, tmp_path):
    def explode(*_, **__):
        raise NonFiniteError("the loss became NaN")

    monkeypatch.setattr(run, "train_run", explode)
    assert cli.main(["train", f"--workdir={tmp_path}", "--config.data.store=x"]) == 3
    assert capsys.readouterr().err == "sae-jax train: error: the loss became NaN\n"


def test_too_few_held_out_rows_are_refused_before_training(tmp_path):
    store = make_store(tmp_path / "small", sparse_rows(2048))
    config = make_config(store, steps=5, data={"virtual_shards": 64, "holdout_fraction": 0.01})
    message = refused(config, tmp_path / "run")
    assert "held out" in message and "data.holdout_fraction" in message
    config = override(config, {"data.holdout_fraction": "0"})
    assert train_run(config, tmp_path / "run").result["eval_fvu"] is None


def test_two_sites_need_a_choice(tmp_path):
    sites = {"a": sparse_rows(4096), "b": sparse_rows(4096, width=8)}
    write_store(tmp_path / "two", [sites], context_length=8)
    message = refused(make_config(str(tmp_path / "two")), tmp_path / "run")
    assert "a" in message and "b" in message
    config = override(make_config(str(tmp_path / "two")), {"data.site": "b"})
    assert preparation.resolve(config, open_stream(config.data)).sae.d_in == 8


def test_run_id_is_the_config_without_the_mesh(store):
    def run_id(**changes):
        config = override(make_config(store), changes)
        return results.run_id(preparation.resolve(config, open_stream(config.data)))

    assert run_id() == run_id(**{"mesh.model": "4"}) == run_id(**{"sae.aux_k": "8"})
    assert run_id() != run_id(**{"train.seed": "1"})
