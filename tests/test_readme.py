"""The README's commands and Python work as they stand."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

import sae_jax

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_start_is_two_lines():
    first, second = blocks("bash")[:2]
    assert "sae-jax demo" in first and "pytest" in second
    for block in (first, second):
        assert len(block.strip().splitlines()) == 1


def test_it_cites_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (entry,) = blocks("bibtex")
    assert f"version = {{{project['version']}}}" in entry and project["license"] in entry
    assert project["authors"][0]["name"] in entry.replace("\\_", "_")
    assert README.partition("## Changelog")[2].split()[0] == f"**{project['version']}**"


def run_python(directory, *arguments):
    """In `directory`, with the sae_jax that this test imports."""
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(sae_jax.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stderr}"


@pytest.mark.slow
def test_the_way_from_text_to_an_evaluated_sae(tmp_path):
    commands, more = (block for block in blocks("bash") if "sae-jax harvest" in block)
    texts = tmp_path / "my_texts"
    texts.mkdir()
    for file in (ROOT / "sae_jax").rglob("*.py"):
        (texts / f"{file.parent.name}_{file.name}.txt").write_text(file.read_text())
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (branches,) = (block for block in blocks("bash") if "--extend_tokens" in block)
    (reading,) = (block for block in blocks("bash") if "sae-jax dashboard" in block)
    (explaining,) = (block for block in blocks("bash") if "sae-jax explain" in block)
    lines = (commands + more + branches + reading + explaining).replace("\\\n", " ").splitlines()
    lines = [line for line in lines if line]
    assert len(lines) == 4 + 3 + 2 + 3 + 1
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "sae-jax"
        run_python(tmp_path, "-m", "sae_jax", *arguments)

    check = "import numpy, sys; x = numpy.ones((3, 512), 'float32'); "
    check += "activations = numpy.random.default_rng(0).normal(size=(4096, 512)); "
    check += "tokens = numpy.arange(20).reshape(2, 10); "
    check += "batches = [numpy.ones((2000, 8), 'float32')]\n" + "".join(blocks("python"))
    check += "assert latents.shape == (3, 1024) and x_hat.shape == (3, 512)\n"
    check += "assert numpy.abs(steered - logits).max() > 0.01\n"
    run_python(tmp_path, "-c", check)
    assert (tmp_path / "my_store" / "meta.json").exists()
