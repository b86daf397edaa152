"""The table of worlds beside the peers' trainers, as a real process."""

import json
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.peers
def test_table_of_a_small_world(tmp_path):
    """Every contestant trains; a second call makes no run again; a package without the
    architecture is left out."""
    pytest.importorskip("sae_lens")
    out = tmp_path / "worlds.json"
    command = [
        *(sys.executable, "-m", "sae_jax.bench.worlds", f"--out={out}", "--seeds=1"),
        "--architectures=topk,relu_l1_unit",
        *("--world=world:superposition,width=8,features=32", "--d_sae=32"),
        *("--steps=40", "--batch=64"),
    ]
    root = pathlib.Path(__file__).parents[1]
    first = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    contestants = [line.split()[:2] for line in first.stdout.splitlines()[1:]]
    assert contestants == [
        ["topk", "sae-jax"],
        ["topk", "sae-lens"],
        ["topk", "dictionary-learning"],
        ["relu_l1_unit", "sae-jax"],
        ["relu_l1_unit", "dictionary-learning"],
    ]
    runs = json.loads(out.read_text())
    assert len(runs) == 5 * (3 + 1 + 1)  # sparsities, the other rate, a fresh seed
    assert all(0 < run["mmcs"] <= 1 for run in runs.values())
    second = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert second.stdout == first.stdout and "mmcs" not in second.stderr
