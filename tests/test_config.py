"""Configs: typed, overridden by dotted fields, and every mistake named in one line."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from sae_jax import cli
from sae_jax.config import (
    Config,
    MeshConfig,
    difference,
    from_dict,
    identity,
    load_file,
    override,
    to_dict,
)
from sae_jax.errors import UserError
from sae_jax.paths import save_json


@pytest.mark.parametrize(
    "path,text,value",
    [
        ("train.tokens", "200e3", 200_000),
        ("train.tokens", "1_000_000", 1_000_000),
        ("sae.k_start", "none", None),
        ("sae.k", "32", 32),
        ("optimizer.clip_norm", "None", None),
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("data.drop_nonfinite", "True", True),
        ("data.drop_nonfinite", "false", False),
        ("data.store", "none", "none"),  # a text field that cannot be None
        ("data.store", "12", "12"),
        ("mesh.data", "-1", -1),
    ],
)
def test_override(path, text, value):
    section, name = path.split(".")
    got = getattr(getattr(override(Config(), {path: text}), section), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "path,text,words",
    [
        ("sae.kk", "1", ["'sae.kk'", "did you mean 'sae.k'"]),
        ("sea.k", "1", ["'sea.k'", "did you mean 'sae.k'"]),
        ("optimizer.learning_rat", "1", ["did you mean 'optimizer.learning_rate'"]),
        ("k", "1", ["unknown field 'k'", "did you mean 'sae.k'?"]),
        ("seed", "1", ["did you mean 'data.seed' or 'train.seed'?"]),
        ("sae.learning_rate", "1", ["did you mean 'optimizer.learning_rate'?"]),
        ("sae", "1", ["unknown field 'sae'"]),
        ("sae.k", "three", ["sae.k", "'three'", "number"]),
        ("sae.k", "1.5", ["sae.k", "1.5", "whole"]),
        ("sae.k", "", ["sae.k", "''"]),
        ("train.tokens", "inf", ["train.tokens", "inf", "finite"]),
        ("train.tokens", "none", ["train.tokens", "'none'"]),
        ("optimizer.learning_rate", "nan", ["optimizer.learning_rate", "nan"]),
        ("data.drop_nonfinite", "yes", ["data.drop_nonfinite", "true or false", "'yes'"]),
    ],
)
def test_wrong_override_names_field_value_and_nearest(path, text, words):
    with pytest.raises(UserError) as error:
        override(Config(), {path: text})
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "values,words",
    [
        ({"sae": 3}, ["sae", "section"]),
        ({"sae": {"k": True}}, ["sae.k", "True"]),
        ({"sae": {"k": "4"}}, ["sae.k", "'4'"]),
        ({"sae": {"architecture": 4}}, ["sae.architecture", "text"]),
        ({"data": {"drop_nonfinite": 1}}, ["data.drop_nonfinite", "true or false"]),
        ({"data": {"stroe": "x"}}, ["'data.stroe'", "'data.store'"]),
        ({"daat": {}}, ["'daat'", "'data'"]),
    ],
)
def test_wrong_values(values, words):
    with pytest.raises(UserError) as error:
        from_dict(values)
    for word in words:
        assert word in str(error.value)


def test_json_round_trip(tmp_path):
    config = override(Config(), {"sae.k": "7", "optimizer.eps": "1e-9", "data.store": 'a "b"\n'})
    save_json(to_dict(config), tmp_path / "config.json")
    assert from_dict(json.loads((tmp_path / "config.json").read_text())) == config
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]  # no temporary left


def test_difference_and_identity():
    a = Config()
    b = override(a, {"sae.k": "7", "mesh.model": "4"})
    assert difference(to_dict(a), to_dict(b)) == ["mesh.model: 1 -> 4", "sae.k: 32 -> 7"]
    assert difference(identity(a), identity(b)) == ["sae.k: 32 -> 7"]
    assert identity(a) == identity(dataclasses.replace(a, mesh=MeshConfig(2, 2)))


def test_load_file(tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text(
        "from sae_jax.config import Config, override\n"
        "def get_config(k='3'):\n    return override(Config(), {'sae.k': k})\n"
    )
    assert load_file(str(file)).sae.k == 3
    assert load_file(f"{file}:9").sae.k == 9


def test_a_recipe_is_found_by_name_anywhere(tmp_path, monkeypatch):
    recipe = pathlib.Path(__file__).parents[1] / "experiments" / "openai_topk.py"
    monkeypatch.chdir(tmp_path)
    assert load_file("openai_topk:tiny") == load_file(f"{recipe}:tiny")
    (tmp_path / "openai_topk").touch()  # is no Python file, and hides no recipe
    assert load_file("openai_topk") == load_file(str(recipe))


def in_process(capsys, *argv: str) -> tuple[int, str]:
    code = cli.main(list(argv))
    return code, capsys.readouterr().err


@pytest.fixture
def files(tmp_path):
    texts = {
        "empty.py": "",
        "config.json": "{}",
        "syntax.py": "x = (",
        "raises.py": "import no_such_module",
        "call.py": "def get_config(): return 1 / 0",
        "dict.py": "def get_config(): return {}",
        "typo.py": "from sae_jax.sae import *\ndef get_config():\n  return TopKConfig(kk=1)\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "argv,words",
    [
        ([], ["--workdir"]),
        (["--wrkdir=x"], ["wrkdir", "workdir"]),
        (["runs/a"], ["'runs/a'"]),
        (["--workdir=x"], ["data.store", "sae-jax harvest"]),
        (["--workdir=x", "--config.sae.kk=1"], ["'sae.kk'", "'sae.k'"]),
        (["--workdir=x", "--config.sae.k"], ["--config.sae.k=VALUE"]),
        (["--workdir=x", "--config.train.tokens=1e400"], ["train.tokens"]),
        (["--workdir=x", "--process_id=one"], ["process_id"]),
        (["--workdir=x", "--config.data.store=no/store"], ["no/store"]),
        (["--workdir=x", "--config=nowhere.py"], ["nowhere.py"]),
        (["--workdir=x", "--config=openai_tokp:tiny"], ["openai_tokp", "'openai_topk'"]),
        (["--workdir=x", "--config=old/gemma_scope.py"], ["old/gemma_scope.py", "'gemma_scope'"]),
        (["--workdir=x", "--config=one_layer_transformer"], ["no recipe of that name"]),
        (["--workdir=x", "--config={}/config.json"], ["config.json", "ends in .py"]),
        (["--workdir=x", "--config={}/empty.py"], ["get_config"]),
        (["--workdir=x", "--config={}/syntax.py"], ["syntax.py", "never closed"]),
        (["--workdir=x", "--config={}/raises.py"], ["raises.py", "no_such_module"]),
        (["--workdir=x", "--config={}/call.py"], ["call.py", "ZeroDivisionError"]),
        (["--workdir=x", "--config={}/call.py:arg"], ["call.py", "argument"]),
        (["--workdir=x", "--config={}/dict.py"], ["dict", "Config"]),
        (["--workdir=x", "--config={}/typo.py"], ["typo.py", "kk"]),
    ],
)
def test_a_wrong_command_is_one_line_and_code_2(files, capsys, argv, words):
    code, err = in_process(capsys, "train", *[text.format(files) for text in argv])
    assert code == 2
    assert err.startswith("sae-jax train: error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_unknown_command(capsys):
    code, err = in_process(capsys, "trian")
    assert (code, err.count("\n")) == (2, 1)
    assert "did you mean 'train'" in err


def test_help_shows_flags_and_fields(capsys):
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--workdir" in out and "--config.sae.d_sae=4096" in out
    assert "  openai_topk:paper|tiny\n    TopK SAEs" in out and "  stories260k_topk:STORE\n" in out
    assert "  towards_monosemanticity:4k|512|16k|131k|tiny\n" in out
    assert cli.main(["sweep", "--help"]) == 0
    out = capsys.readouterr().out
    assert "  scaling_laws:tiny|frontier|" in out and "openai_topk" not in out
    assert cli.main(["--help"]) == 0
    assert "train" in capsys.readouterr().out


def test_mistakes_need_no_device(monkeypatch, capsys):
    """With a platform that does not exist, jax fails as soon as a device is asked for."""
    command = [sys.executable, "-m", "sae_jax", "train", "--workdir=x", "--config.sae.k=x"]
    monkeypatch.setenv("JAX_PLATFORMS", "none-such")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "sae-jax train: error: sae.k must be a number, not 'x'\n"


@pytest.mark.parametrize("name", ["openai_topk", "scaling_monosemanticity"])
def test_recipe_refuses_a_size_it_does_not_have(name):
    recipe = f"{pathlib.Path(__file__).parents[1]}/experiments/{name}.py"
    assert load_file(f"{recipe}:tiny").sae.d_sae < load_file(recipe).sae.d_sae
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        load_file(f"{recipe}:tny")


@pytest.mark.parametrize("code", ["0", "1", "'done'", ""])
def test_a_config_file_that_ends_the_program(tmp_path, code):
    """It ended with exit code 0, as if the run were done."""
    file = tmp_path / "ends.py"
    file.write_text(f"import sys\nsys.exit({code})\n")
    with pytest.raises(UserError, match="config file .*ends.py fails: SystemExit"):
        load_file(str(file))
