"""The bench command: its figures are there, and consistent."""

import json

import pytest

from sae_jax.cli import main

SHAPE = ["--batch=64", "--d_in=16", "--d_sae=128", "--k=4", "--rounds=2"]


@pytest.mark.parametrize("architecture", ["topk", "relu", "batchtopk", "gated"])
@pytest.mark.slow
def test_step(architecture, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert main(["bench", f"--architecture={architecture}", f"--out={out}", *SHAPE]) == 0
    figures = json.loads(out.read_text())
    seconds = figures["seconds"]
    assert figures["tokens_per_second"]["sae_jax"] == pytest.approx(64 / seconds["sae_jax"])
    flops = 64 * 16 * 128 * (2 if "topk" in architecture else 12)
    floor = flops / figures["matmul_flops_per_second"]
    assert figures["fraction_of_floor"] == pytest.approx(floor / seconds["sae_jax"])
    assert "tokens/s" in capsys.readouterr().out


WORDS = "".join(f"x{i} = {i} + y[{i}]\n" for i in range(2000))
HARVEST = ["--harvest", "--tokens=9000", "--context_length=32", "--rounds=2"]


def test_harvest(tmp_path, capsys):
    out = tmp_path / "figures.json"
    text = tmp_path / "text.py"
    text.write_text(WORDS)
    options = [f"--text={text}", "--sites=resid_post.0,z.0", f"--out={out}", *HARVEST]
    assert main(["bench", *options]) == 0
    figures = json.loads(out.read_text())
    assert set(figures["seconds"]) == {"sae_jax", "sae_jax to disk"}
    assert figures["tokens"] % figures["batch_size"] == 0 and "times_faster" not in figures
    for name, rate in figures["tokens_per_second"].items():
        assert figures["tokens"] == pytest.approx(rate * figures["seconds"][name])
        assert figures["fraction_of_floor"][name] > 0
    assert "tokens/s" in capsys.readouterr().out
