"""The tutorials run in a fresh kernel, in under two minutes, and are kept with their outputs."""

import importlib.util
import pathlib
import time

import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "experiments" / "tutorials"
MODEL = "5_real_model"
# test_own_architecture.py and test_experiments.py try what these do; each takes a minute or two.
BY_HAND = ("2_own_architecture", "4_sweep_to_law")

spec = importlib.util.spec_from_file_location("run_tutorials", FOLDER / "run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
NAMES = run.names()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.long if n in BY_HAND else pytest.mark.slow) for n in NAMES],
)
def test_it_runs(name):
    start = time.monotonic()
    notebook = run.execute(name, timeout=240)
    if reason := run.skipped(notebook):
        assert name == MODEL, reason
        pytest.skip(reason)
    assert time.monotonic() - start < 120
    printed = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    noise = [out.text for out in printed if out.get("name") == "stderr"]
    assert not noise, noise


@pytest.mark.parametrize("name", NAMES)
def test_its_outputs_are_kept(name):
    file = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert file.stat().st_size < 300_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [out for cell in code for out in cell.outputs]
    assert any("image/png" in out.get("data", {}) for out in outputs), "it has a figure"
    assert all(out.output_type != "error" and out.get("name") != "stderr" for out in outputs)
    before = nbformat.from_dict(notebook)
    run.tidy(notebook)
    assert notebook == before, "run experiments/tutorials/run.py"
