"""The bench command: its figures are there, consistent, and beside the peers where installed."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from sae_jax import lm
from sae_jax.bench import torch_hooks
from sae_jax.cli import main
from sae_jax.errors import UserError

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


WORDS = "".join(f"x{i} = {i} + y[{i}]\n" for i in range(2000))
HARVEST = ["--harvest", "--tokens=9000", "--context_length=32", "--rounds=2"]


def test_harvest(tmp_path, capsys):
    out = tmp_path / "figures.json"
    text = tmp_path / "text.py"
    text.write_text(WORDS)
    options = [f"--text={text}", "--sites=resid_post.0,z.0", f"--out={out}", *HARVEST]
    found = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:  # as where there is no torch
        patch.setattr(importlib.util, "find_spec", lambda n: None if n == "torch" else found(n))
        assert main(["bench", *options]) == 0
    figures = json.loads(out.read_text())
    assert set(figures["seconds"]) == {"sae_jax", "sae_jax to disk"}
    assert figures["tokens"] % figures["batch_size"] == 0 and "times_faster" not in figures
    for name, rate in figures["tokens_per_second"].items():
        assert figures["tokens"] == pytest.approx(rate * figures["seconds"][name])
        assert figures["fraction_of_floor"][name] > 0
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_transformers_gives_the_same_activations_with_hooks(family, tmp_path):
    pytest.importorskip("transformers")
    from fixtures.make_lm_fixtures import random_model

    random_model(family, vocab_size=30).save_pretrained(tmp_path)
    model = lm.Model(tmp_path)
    names = ("resid_pre", "attn_out", "mlp_in", "mlp_act", "mlp_out", "resid_post")
    sites = tuple(f"{name}.0" for name in names)
    tokens = np.random.default_rng(0).integers(0, 30, (8, 12))
    run, theirs = torch_hooks.forward_to_host(model, sites, tokens, batch=4)
    run()
    for site, ours in model.runner(sites, np.float32)(tokens).items():
        np.testing.assert_allclose(theirs[site], ours, atol=1e-4, err_msg=site)
    with pytest.raises(UserError, match="resid_mid"):
        torch_hooks.forward_to_host(model, ("resid_mid.0",), tokens, batch=4)


@pytest.mark.peers
def test_harvest_stands_beside_transformers(tmp_path):
    pytest.importorskip("transformers")
    model = pathlib.Path(__file__).parents[2] / "shared" / "data" / "models" / "stories260K"
    if not model.is_dir():
        pytest.skip(f"no {model}")
    out = tmp_path / "figures.json"
    (tmp_path / "text.py").write_text(WORDS)
    where = [f"--model={model}", f"--text={tmp_path / 'text.py'}", f"--out={out}"]
    assert main(["bench", *where, *HARVEST]) == 0
    figures = json.loads(out.read_text())
    assert len(figures["sites"]) == 5 and figures["times_faster"] > 0
    assert figures["largest_difference"] < 1e-4
