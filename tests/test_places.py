"""Places as users write them: ~, relative to where a run was started, with commas and colons."""

import os
import pathlib

import numpy as np
import pytest
from absl import flags
from training import make_config, make_store, sparse_rows

from sae_jax import cli, config, python_files
from sae_jax.cli import path_lists
from sae_jax.config import DataConfig
from sae_jax.train.directory import RunDirectory, find_store, read_config

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
RUN = [
    *("--config.sae.d_sae=32", "--config.sae.k=4", "--config.train.tokens=128"),
    *("--config.data.batch_size=64", "--config.data.virtual_shards=8"),
]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's home with a store and other files in it; the working directory is another."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    make_store(home / "store", sparse_rows(1024))
    np.save(home / "rows.npy", sparse_rows(64))
    (home / "table.csv").write_text(
        "flops,loss\n"
        + "".join(f"{10.0**i},{2 * 0.7**i + 0.1 + 1e-3 * (i % 2)}\n" for i in range(6))
    )
    (home / "a_config.py").write_text(
        "from sae_jax.config import Config, DataConfig\n\n"
        "def get_config():\n    return Config(data=DataConfig(store='~/store'))\n"
    )
    return home


def sae_at(home: pathlib.Path) -> str:
    (home / "theirs").symlink_to(FIXTURES / "exports" / "saelens-topk-autoencoder")
    return "~/theirs"


@pytest.mark.slow
def test_the_home_is_where_a_path_begins_with_a_tilde(home, capsys):
    """For every command that needs no language model: what it reads and what it writes."""
    for command in (
        ["store", "--path=~/store"],
        ["store", "--from=~/rows.npy", "--out=~/made"],
        ["fit", "--results=~/table.csv", "--law=power", "--out=~/fitted", "--bootstrap=50"],
        ["import", f"--path={sae_at(home)}", "--out=~/imported"],
        ["train", "--workdir=~/run", "--config.data.store=~/store", *RUN],
        ["train", "--workdir=~/other", "--config=~/a_config.py", *RUN],
        ["eval", "--run=~/run", "--out=~/run/eval_again.json"],
        ["export", "--checkpoint=~/run", "--format=saelens", "--out=~/exported"],
        ["launch", "--copy=slurm", "--out=~/launch"],
    ):
        assert cli.main(command) == 0, capsys.readouterr().err
    made = ("made", "fitted", "imported", "run", "other", "exported", "launch")
    assert all((home / name).is_dir() for name in made)
    assert not os.listdir("."), "a folder called ~"


def test_a_runs_relative_store_is_found_from_anywhere(tmp_path, monkeypatch):
    """The store of the directory that the run was started in, even beside another of its name."""
    there, here = tmp_path / "there", tmp_path / "here" / "a" / "b"
    there.mkdir()
    here.mkdir(parents=True)
    monkeypatch.chdir(there)
    store = make_store(pathlib.Path("store"), sparse_rows(1024))
    RunDirectory(pathlib.Path("runs/a"), make_config(store))
    data = read_config(there / "runs" / "a").data
    assert data.store == "store" and find_store(there / "runs" / "a", data) == data
    monkeypatch.chdir(here)
    make_store(pathlib.Path("store"), sparse_rows(64))
    assert find_store(there / "runs" / "a", data).store == str(there / "store")

    # Both moved: from the run upwards. A run of an earlier version has noted no directory.
    moved = there.rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    assert find_store(moved / "runs" / "a", data).store == str(moved / "store")
    file = moved / "runs" / "a" / "config.json"
    file.write_text(file.read_text().replace('"directory"', '"before"'))
    assert find_store(moved / "runs" / "a", data).store == str(moved / "store")


@pytest.mark.parametrize("store", ["world:orthonormal,width=8,features=8", "s3://a/b", "", "gone"])
def test_other_stores_are_as_they_are_written(tmp_path, store):
    data = DataConfig(store=store)
    assert find_store(tmp_path, data) is data


@pytest.mark.parametrize(
    "text, names",
    [
        ("a.txt,b.txt", ["a.txt", "b.txt"]),
        ("with,comma.txt", ["with,comma.txt"]),
        ("a.txt,with,comma.txt,b.txt", ["a.txt", "with,comma.txt", "b.txt"]),
        ("one, two,three.txt,a.txt", ["one, two,three.txt", "a.txt"]),
        ('"with,comma.txt",b.txt', ["with,comma.txt", "b.txt"]),
        ("not,there", ["not", "there"]),
        ("~/with,comma.txt", ["~/with,comma.txt"]),
    ],
)
def test_a_comma_in_the_name_of_a_file(tmp_path, monkeypatch, text, names):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.txt", "b.txt", "with,comma.txt", "one, two,three.txt"):
        pathlib.Path(name).touch()
    values = flags.FlagValues()
    path_lists.define("text", "Text.", values)
    values(["command", f"--text={text}"])
    assert values.text == names


@pytest.mark.parametrize(
    "spec, parts",
    [
        ("a.py", ("a.py", "")),
        ("a.py:tiny", ("a.py", "tiny")),
        ("C:/a b/a.py:x:y", ("C:/a b/a.py", "x:y")),
        ("12:30/a.py", ("12:30/a.py", "")),
        ("openai_topk:tiny", ("openai_topk", "tiny")),
        ("openai_topk", ("openai_topk", "")),
    ],
)
def test_a_colon_in_a_path_is_not_where_the_argument_begins(spec, parts):
    assert python_files.split(spec) == parts


def test_a_config_in_a_folder_with_a_colon_and_a_comma(tmp_path):
    folder = tmp_path / "at 12:30, again"
    folder.mkdir()
    (folder / "a.py").write_text(
        "from sae_jax.config import Config, TrainConfig\n\n"
        "def get_config(seed='0'):\n    return Config(train=TrainConfig(seed=int(seed)))\n"
    )
    assert config.load_file(f"{folder}/a.py").train.seed == 0
    assert config.load_file(f"{folder}/a.py:7").train.seed == 7
