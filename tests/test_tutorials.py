"""Every tutorial runs from its first cell to its last in a fresh kernel."""

import importlib.util
import pathlib

import pytest

pytest.importorskip("nbclient", reason='pip install "sae-jax[notebook]"')
FILE = pathlib.Path(__file__).parents[1] / "experiments" / "tutorials" / "run.py"
SPEC = importlib.util.spec_from_file_location("run_tutorials", FILE)
run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", run.names())
def test_it_runs(name):
    notebook = run.execute(name, timeout=240)
    if reason := run.skipped(notebook):
        pytest.skip(reason)
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert figures


@pytest.mark.parametrize("name", run.names())
def test_what_is_kept_has_figures_and_no_errors(name):
    file = FILE.with_name(f"{name}.ipynb")
    text = file.read_text()
    assert file.stat().st_size < 300_000
    assert "image/png" in text and '"output_type": "error"' not in text
    assert '"name": "stderr"' not in text
