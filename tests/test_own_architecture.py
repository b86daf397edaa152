"""An architecture that a file outside the package defines: all that one of ours can do."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from training import make_store, metrics

import sae_jax
from sae_jax import interop, sae
from sae_jax.config import from_dict, load_file, override, to_dict
from sae_jax.errors import UserError
from sae_jax.python_files import load_module
from sae_jax.train.run import train_run

FILE = pathlib.Path(__file__).parent / "own_architecture.py"


@pytest.fixture
def mine(tmp_path):
    """A copy of the file, which nothing has imported; the architecture is forgotten afterwards."""
    shutil.copy(FILE, tmp_path / "mine.py")
    yield tmp_path / "mine.py"
    sae.ARCHITECTURES.pop("level", None)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


def forgotten() -> None:
    """As in a fresh process."""
    sae.ARCHITECTURES.pop("level", None)
    for name in [name for name in sys.modules if name.startswith("_sae_jax_")]:
        del sys.modules[name]


def test_it_trains_and_loads_with_its_path_alone(mine, store, tmp_path):
    config = override(load_file(f"{mine}:{store}"), {"sae.level": "0.75"})
    result = train_run(config, tmp_path / "run").result
    assert result["architecture"] == "level" and result["sparsity_coefficient"] == 0.1
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"]
    trained = sae_jax.load(tmp_path / "run")
    trained.save(tmp_path / "saved")
    interop.export(trained, "sae_jax", tmp_path / "exported")
    x = np.random.default_rng(0).normal(size=(5, 16))
    want = trained.encode(x)
    for folder in ("run", "saved", "exported"):
        forgotten()
        back = sae_jax.load(tmp_path / folder)
        assert back.config.level == 0.75
        np.testing.assert_array_equal(back.encode(x), want)
    with pytest.raises(UserError, match="saelens cannot express a level autoencoder.*sae_jax"):
        interop.export(trained, "saelens", tmp_path / "no")
    assert to_dict(config)["architecture_file"] == str(mine)
    assert to_dict(from_dict(to_dict(config))) == to_dict(config)


def test_code_that_came_with_a_folder_is_not_run(mine, tmp_path):
    module = load_module(mine)
    module.Level(d_in=8, d_sae=16).save(tmp_path / "sae")
    file = tmp_path / "sae" / "sae.json"
    values = json.loads(file.read_text())
    for place, why in (
        (tmp_path / "sae" / "evil.py", "lies in the folder"),
        (tmp_path / "sae" / ".." / "sae" / "evil.py", "lies in the folder"),
        ("evil.py", "not absolute"),
        (tmp_path / "gone.py", "is not there any more"),
    ):
        (tmp_path / "sae" / "evil.py").write_text("raise SystemExit('it was run')")
        file.write_text(json.dumps(values | {"architecture_file": str(place)}))
        forgotten()
        with pytest.raises(UserError) as error:
            sae_jax.load(tmp_path / "sae")
        assert why in str(error.value) and str(place) in str(error.value)
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="was not run, since it came with"):
        interop.load(tmp_path / "sae", trust_code=False)
    load_module(mine)  # what the messages say to do
    assert sae_jax.load(tmp_path / "sae").config.level == 1.0
    file.write_text(json.dumps({n: v for n, v in values.items() if n != "architecture_file"}))
    forgotten()
    with pytest.raises(UserError, match="unknown architecture 'level'.*cell"):
        sae_jax.load(tmp_path / "sae")


def test_a_class_may_be_defined_again_but_not_under_a_name_of_ours(mine):
    first = load_module(mine).Level
    assert load_module(mine).Level is first, "a file is run once"
    mine.write_text(mine.read_text().replace("level: float = 1.0", "level: float = 2.0"))
    second = load_module(mine).Level
    assert sae.ARCHITECTURES["level"] is second and second.Config().level == 2.0
    mine.write_text(mine.read_text().replace('"level"', '"topk"'))
    with pytest.raises(UserError, match="an architecture 'topk' of its own"):
        load_module(mine)
    assert sae.ARCHITECTURES["topk"] is sae.TopK
    with pytest.raises(UserError, match="sae.level must be above 0"):
        second.Config(level=0.0)


@pytest.mark.parametrize("architecture", [pytest.param("topk", marks=pytest.mark.slow), "level"])
def test_an_extra_loss_is_added_and_logged(mine, store, tmp_path, architecture):
    config = load_file(f"{mine}:{store}")
    config = override(config, {"sae.architecture": architecture})
    plain = train_run(config, tmp_path / "plain").result
    train_run(override(config, {"sae.extra_loss": f"{mine}:pull_biases"}), tmp_path / "with")
    with_it, without = metrics(tmp_path / "with"), metrics(tmp_path / "plain")
    assert "extra_loss" not in without[0] and plain["eval_loss"] > 0
    assert with_it[0]["extra_loss"] == pytest.approx(64 * 0.25)
    assert with_it[0]["loss"] == pytest.approx(without[0]["loss"] + with_it[0]["extra_loss"])
    assert with_it[-1]["extra_loss"] < with_it[0]["extra_loss"]


@pytest.mark.slow
def test_every_command_in_processes_of_its_own(mine, store, tmp_path):
    def run(*argv: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "sae_jax", *argv],
            env=os.environ | {"PYTHONPATH": str(FILE.parents[1]), "JAX_PLATFORMS": "cpu"},
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout

    flags = [f"--config=mine.py:{store}", "--workdir=run", "--config.sae.level=0.75"]
    assert json.loads(run("train", *flags, "--show"))["sae"]["level"] == 0.75
    run("train", *flags, "--config.train.tokens=1280")
    shutil.rmtree(tmp_path / "run")
    whole = json.loads(run("train", *flags))
    kept = np.asarray(sae_jax.load(tmp_path / "run").w_enc[...])
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "40")
    again = json.loads(run("train", *flags))
    assert again["eval_loss"] == whole["eval_loss"]
    np.testing.assert_array_equal(sae_jax.load(tmp_path / "run").w_enc[...], kept)
    run("train", *flags, "--config.sae.level=-1", code=2)
    run("sweep", f"--config=mine.py:{store}", "--workdir=sweep")
    rows = (tmp_path / "sweep" / "results.csv").read_text().splitlines()
    assert len(rows) == 5 and "level" in rows[0]
    run("eval", "--run=run")
    run("export", "--checkpoint=run", "--format=sae_jax", "--out=out")
    assert sae_jax.load(tmp_path / "out").config.level == 0.75
    assert jax.tree.leaves(sae_jax.load(tmp_path / "sweep" / "runs" / rows[1].split(",")[0]))
