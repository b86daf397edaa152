"""The recipe of the one-layer transformer: its baselines, its data, a short real run, and the
model it made, which ships in the package."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from sae_jax import lm
from sae_jax.python_files import load_module

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = ROOT / "experiments" / "one_layer_transformer.py"


@pytest.fixture(scope="module")
def recipe():
    return load_module(str(RECIPE))


def test_ngrams_of_a_markov_chain_reach_its_entropies(recipe):
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.full(6, 0.5), size=6)
    tokens = np.zeros((3000, 64), int)
    for t in range(1, 64):
        cumulative = transition[tokens[:, t - 1]].cumsum(axis=1)
        tokens[:, t] = np.minimum((rng.random((3000, 1)) > cumulative).sum(axis=1), 5)
    unigram, bigram = recipe.ngram_losses(tokens[:2000], tokens[2000:], 6)
    before, after = tokens[2000:, :-1], tokens[2000:, 1:]
    share = np.bincount(after.ravel(), minlength=6) / after.size
    assert unigram == pytest.approx(-(share * np.log(share)).sum(), rel=1e-2)
    assert bigram == pytest.approx(-np.log(transition[before, after]).mean(), rel=1e-2)


def test_the_smoothed_bigram_is_a_distribution(recipe):
    train = np.random.default_rng(0).integers(0, 5, (4, 6))
    for first in (0, 3, 6):  # 6 was never seen
        pairs = (np.array([[first, second]]) for second in range(7))
        total = sum(np.exp(-recipe.ngram_losses(train, pair, 7)[1]) for pair in pairs)
        assert total == pytest.approx(1, abs=1e-9)


def test_every_epoch_sees_each_context_once_in_another_order(recipe):
    steps = np.array(list(recipe.batches(num_rows=20, batch_size=4, steps=10, seed=0)))
    assert steps.shape == (10, 4)
    for epoch in (steps[:5], steps[5:]):
        assert sorted(epoch.ravel()) == list(range(20))
    assert not np.array_equal(steps[:5], steps[5:])


def test_files_stay_on_their_side_of_the_split(recipe, tmp_path):
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    train, heldout = recipe.read_corpus([str(tmp_path)])
    assert 1 <= len(heldout) <= 15 and len(train) + len(heldout) == 100
    for i in range(0, 100, 2):
        (tmp_path / f"{i}.txt").unlink()
    train_left, heldout_left = recipe.read_corpus([str(tmp_path)])
    assert set(train_left) < set(train) and set(heldout_left) < set(heldout)


def test_the_shipped_model_is_small_and_what_the_paper_decomposes():
    assert sum(file.stat().st_size for file in lm.DEMO_MODEL.iterdir()) < 6_000_000
    config = lm.load_config(lm.DEMO_MODEL)
    assert config.num_layers == 1 and not config.gated_mlp and config.activation == "relu"
    assert lm.site_width(config, "mlp_act.0") == 4 * config.d_model


@pytest.mark.slow
def test_the_shipped_model_beats_both_baselines_here_too(recipe):
    """On files held out of this machine's own standard library, as training.json says of another.
    If this fails on a new Python only, its library may have changed: loosen the bound, not the
    claim in training.json."""
    report = json.loads((lm.DEMO_MODEL / "training.json").read_text())
    assert report["heldout_loss"] < report["heldout_loss_bigram"] - 0.8
    assert report["heldout_loss_bigram"] < report["heldout_loss_unigram"]
    config, params = lm.load_config(lm.DEMO_MODEL), lm.load_params(lm.DEMO_MODEL)
    tokenizer = lm.load_tokenizer(lm.DEMO_MODEL)
    _, heldout = recipe.read_corpus([])
    tokens = lm.pack(heldout, tokenizer, config.max_context, 64 * config.max_context)
    assert tokens.shape == (64, config.max_context)

    @jax.jit
    def mean_loss(params, tokens):
        return lm.next_token_loss(lm.forward(params, tokens, config)[0], tokens).mean()

    losses = [mean_loss(params, tokens[i : i + 16]) for i in range(0, 64, 16)]
    assert np.mean(losses) < report["heldout_loss_bigram"] - 0.5


def test_text_comes_back_from_the_shipped_tokenizer():
    tokenizer = lm.load_tokenizer(lm.DEMO_MODEL)
    text = "def f(x):\n    return {'a': x ** 2}  # naïve — 数学\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special_tokens == (tokenizer.bos,)


@pytest.mark.slow
def test_a_short_run_makes_a_model_that_loads(tmp_path):
    words = [f"word{i}" for i in range(50)]
    rng = np.random.default_rng(0)
    (tmp_path / "text").mkdir()
    for i in range(60):
        text = " ".join(words[j] for j in np.cumsum(rng.integers(1, 3, 400)) % 50)
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    out = tmp_path / "model"
    run = [sys.executable, str(RECIPE), f"--text={tmp_path / 'text'}", f"--out={out}",
           "--vocab_size=400", "--d_model=32", "--context_length=64", "--steps=150"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    assert subprocess.run(run, env=environment).returncode == 0
    report = json.loads((out / "training.json").read_text())
    assert report["heldout_loss"] < report["heldout_loss_bigram"] < report["heldout_loss_unigram"]
    config, params, tokenizer = lm.load_config(out), lm.load_params(out), lm.load_tokenizer(out)
    tokens = lm.pack(["word1 word2 word3 word4 word5 " * 20], tokenizer, 64)
    logits, taps = lm.forward(params, tokens, config, ("mlp_act.0",))
    assert taps["mlp_act.0"].shape == (*tokens.shape, 128) and (taps["mlp_act.0"] >= 0).all()
    again = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert again.returncode != 0 and "exists; remove it or give another --out" in again.stderr
    assert [path.name for path in tmp_path.glob("model*")] == ["model"]
