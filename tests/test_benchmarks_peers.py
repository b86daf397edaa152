"""experiments/benchmarks: ours beside the peers, as real processes."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from sae_jax import lm
from sae_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARKS = ROOT / "experiments" / "benchmarks"
WORDS = "".join(f"x{i} = {i} + y[{i}]\n" for i in range(2000))


def run(script, *flags):
    command = [sys.executable, BENCHMARKS / script, *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("*_beside_*.py")))
def test_scripts_explain_themselves(script):
    shown = run(script, "--help")
    assert f"python experiments/benchmarks/{script}" in shown.stdout and "--out" in shown.stdout


@pytest.mark.slow
def test_collecting_without_a_peer(tmp_path):
    (tmp_path / "text.txt").write_text(WORDS)
    out = tmp_path / "figures.json"
    ended = run(
        "collect_beside_saedashboard.py", f"--model={lm.DEMO_MODEL}", "--site=resid_post.0",
        f"--text={tmp_path / 'text.txt'}", "--tokens=4000", "--latents=64", "--k=4", f"--out={out}",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(out.read_text())
    assert figures["seconds"] > figures["floor_seconds"] > 0
    assert figures["memory_stated_gb"] > 0 and "peer_seconds" not in figures


@pytest.mark.peers
@pytest.mark.parametrize(
    "architecture,count", [("topk", 3), pytest.param("relu", 2, marks=pytest.mark.long)]
)
def test_a_step_beside_the_peers(architecture, count, tmp_path):
    for package in ("sae_lens", "dictionary_learning", "sparsify"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    out = tmp_path / "figures.json"
    shape = ["--batch=64", "--d_in=16", "--d_sae=128", "--k=4", "--rounds=2"]
    done = run("step_beside_peers.py", f"--architecture={architecture}", f"--out={out}", *shape)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert len(figures["times_faster_than"]) == count
    assert all(ratio > 0 for ratio in figures["times_faster_than"].values())


@pytest.mark.peers
def test_a_harvest_beside_transformers(tmp_path):
    pytest.importorskip("transformers")
    model = ROOT.parent / "shared" / "data" / "models" / "stories260K"
    if not model.is_dir():
        pytest.skip(f"no {model}")
    out = tmp_path / "figures.json"
    (tmp_path / "text.py").write_text(WORDS)
    done = run(
        "harvest_beside_transformers.py",
        *(f"--model={model}", f"--text={tmp_path / 'text.py'}", f"--out={out}"),
        *("--tokens=9000", "--context_length=32", "--rounds=2"),
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert len(figures["sites"]) == 5 and figures["times_faster"] > 0
    assert figures["largest_difference"] < 1e-4


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_transformers_gives_the_same_activations_with_hooks(family, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from fixtures.make_lm_fixtures import random_model

    random_model(family, vocab_size=30).save_pretrained(tmp_path)
    monkeypatch.syspath_prepend(BENCHMARKS)
    from torch_hooks import forward_to_host

    model = lm.JaxModel(tmp_path)
    names = ("resid_pre", "attn_out", "mlp_in", "mlp_act", "mlp_out", "resid_post")
    sites = tuple(f"{name}.0" for name in names)
    tokens = np.random.default_rng(0).integers(0, 30, (8, 12))
    theirs = forward_to_host(model, sites, tokens, batch=4)
    theirs.run()
    for site, ours in model.runner(sites, np.float32)(tokens).items():
        np.testing.assert_allclose(theirs.arrays[site], ours, atol=1e-4, err_msg=site)
    with pytest.raises(UserError, match="resid_mid"):
        forward_to_host(model, ("resid_mid.0",), tokens, batch=4)


@pytest.mark.peers
@pytest.mark.long
def test_table_of_a_small_world(tmp_path):
    """Every contestant trains; a second call makes no run again; a package without the
    architecture is left out."""
    pytest.importorskip("sae_lens")
    out = tmp_path / "worlds.json"
    command = [
        *(sys.executable, BENCHMARKS / "worlds_beside_peers.py", f"--out={out}", "--seeds=1"),
        "--architectures=topk,relu_l1_unit",
        *("--world=world:superposition,width=8,features=32", "--d_sae=32"),
        *("--steps=40", "--batch=64"),
    ]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
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
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert second.stdout == first.stdout and "mmcs" not in second.stderr
