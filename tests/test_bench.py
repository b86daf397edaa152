"""The bench command: its figures are there, consistent, and beside the peers where installed."""

import importlib.util
import json

import pytest

from sae_jax.cli import main

SHAPE = ["--batch=64", "--d_in=16", "--d_sae=128", "--k=4", "--rounds=2"]


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_step(architecture, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert main(["bench", f"--architecture={architecture}", f"--out={out}", *SHAPE]) == 0
    figures = json.loads(out.read_text())
    seconds = figures["seconds"]
    assert figures["tokens_per_second"]["sae_jax"] == pytest.approx(64 / seconds["sae_jax"])
    flops = 64 * 16 * 128 * (2 if architecture == "topk" else 12)
    floor = flops / figures["matmul_flops_per_second"]
    assert figures["fraction_of_floor"] == pytest.approx(floor / seconds["sae_jax"])
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.peers
@pytest.mark.parametrize("architecture,count", [("topk", 3), ("relu", 2)])
@pytest.mark.filterwarnings("default")
def test_peers_stand_beside(architecture, count, tmp_path):
    for package in ("sae_lens", "dictionary_learning", "sparsify"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    out = tmp_path / "figures.json"
    assert main(["bench", f"--architecture={architecture}", "--peers", f"--out={out}", *SHAPE]) == 0
    figures = json.loads(out.read_text())
    assert len(figures["times_faster_than"]) == count
    assert all(ratio > 0 for ratio in figures["times_faster_than"].values())
