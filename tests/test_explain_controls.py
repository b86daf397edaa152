"""Controls of explanations fire as they are said to, on the same text, and go on after a kill."""

import subprocess
import sys
import time

import jax
import numpy as np
import planted
import pytest
import tokenizers
from planted import BOS, D, T

import sae_jax
from sae_jax import lm
from sae_jax.activations import write_store
from sae_jax.config import Config, TrainConfig
from sae_jax.errors import UserError
from sae_jax.evaluate.sources import HeldOutRows
from sae_jax.interpret.activity import record
from sae_jax.interpret.explain import controls
from sae_jax.interpret.explain.single_token import single_token
from sae_jax.sae import ReLU, ReLUConfig, resolve
from sae_jax.train.directory import run_there

SEQUENCES = 200


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Rows of two sites in which no two values of a column are equal."""
    path = tmp_path_factory.mktemp("controls") / "store"
    rng = np.random.default_rng(0)
    sites = {n: rng.normal(size=(SEQUENCES * T, D)).astype(np.float32) for n in ("a", "b")}
    return write_store(
        path, sites, context_length=T, tokens=planted.texts(SEQUENCES), special_tokens=(BOS,)
    )


def rows_of(store, sites):
    return HeldOutRows(store, sites, tokens=10**6, holdout_fraction=None)


@pytest.mark.parametrize(
    ("sites", "kind", "columns"),
    [
        ("a", "autoencoder", slice(0, D)),
        ("a,b", "crosscoder", slice(0, 2 * D)),
        ("a,b", "skip_transcoder", slice(0, D)),
    ],
)
def test_neurons_are_what_is_above_their_quantiles(store, tmp_path, sites, kind, columns):
    source = rows_of(store, sites)
    found = record(controls.neurons(source, 0.1, kind), source, tmp_path / "activity")
    x = source.read(np.arange(SEQUENCES))[..., columns]
    used = source.texts().used
    above = round(0.1 * used.sum())
    thresholds = np.sort(x[used], axis=0)[-above - 1]
    expected = np.maximum(x - thresholds, 0) * used[..., None]
    assert found.d_sae == x.shape[-1]
    for neuron in range(found.d_sae):
        np.testing.assert_allclose(found.dense(neuron), expected[..., neuron], rtol=1e-6)
    np.testing.assert_array_equal(found.counts, above)


def test_random_directions_fire_as_often_and_have_length_1(store, tmp_path):
    source = rows_of(store, "a")
    sae = controls.random_directions(source, 300, 0.03, seed=1)
    w = np.asarray(sae.w_enc[...])
    np.testing.assert_allclose(np.linalg.norm(w, axis=0), 1, rtol=1e-6)
    assert np.abs(w @ w.T * D / 300 - np.eye(D)).max() < 0.3  # from no side in particular
    found = record(sae, source, tmp_path / "activity")
    np.testing.assert_allclose(found.density, 0.03, rtol=0.05)
    x = source.read(np.arange(SEQUENCES))
    rows, values = found.of(7)
    above = x.reshape(-1, D)[rows] @ w[:, 7]
    np.testing.assert_allclose(values, above + np.asarray(sae.b_enc[...])[7], atol=1e-5)
    again = controls.random_directions(source, 300, 0.03, seed=1)
    np.testing.assert_array_equal(w, again.w_enc[...])
    with pytest.raises(UserError, match=r"\(0, 1\)"):
        controls.neurons(source, 0.0)


def test_the_sample_is_spread_and_small(store, monkeypatch):
    monkeypatch.setattr("sae_jax.interpret.explain.controls._SAMPLE", 400)
    sae = controls.random_directions(rows_of(store, "a"), 300, 0.1)
    x = rows_of(store, "a").read(np.arange(SEQUENCES)).reshape(-1, D)
    fired = np.asarray(sae.encode(x)) > 0
    assert fired.mean() == pytest.approx(0.1, rel=0.15)


def test_controls_are_recorded_on_the_text_of_the_latents_and_reused(store, tmp_path):
    source, sae = rows_of(store, "a"), planted.sae("topk")
    activity = record(sae, source, tmp_path / "activity", tokens=100 * T)
    names = ("neurons", "random")
    made = controls.record_controls(names, activity, sae, source, tmp_path)
    fires = activity.counts > 0
    for name in names:
        np.testing.assert_array_equal(made[name].tokens, activity.tokens)
        assert made[name].density.mean() == pytest.approx(activity.density[fires].mean(), rel=0.2)
    file = tmp_path / "controls" / "random" / "activity" / "rows.npy"
    before = file.stat().st_mtime_ns
    controls.record_controls(names, activity, sae, source, tmp_path)
    assert file.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        controls.record_controls(names, activity, sae, source, tmp_path, seed=1)
    controls.record_controls(names, activity, sae, source, tmp_path, seed=1, overwrite=True)
    assert file.stat().st_mtime_ns > before
    with pytest.raises(UserError, match="other text"):
        part = HeldOutRows(store, "a", tokens=10**6, holdout_fraction=0.5)
        controls.record_controls(names, activity, sae, part, tmp_path / "other")
    with pytest.raises(UserError, match="--run"):
        controls.record_controls(["shuffled_model"], activity, sae, source, tmp_path)
    with pytest.raises(UserError, match="neuron"):
        controls.record_controls(["neuron"], activity, sae, source, tmp_path)


def test_single_tokens(tmp_path):
    """Latent 0 fires on one token, 1 on it and, weaker, on another, 2 on both alike, 3 never; 4 on
    one token of copies of one text."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 15, (60, T)).astype(np.int32)
    tokens[:30, 3] = 11
    tokens[30:40][tokens[30:40] == 11] = 12
    tokens[40:] = np.arange(20, 20 + T)  # the copies
    of = {0: [(11, 1)], 1: [(11, 3), (12, 1)], 2: [(11, 1), (12, 1)], 3: [], 4: [(25, 1)]}
    x = np.zeros((*tokens.shape, 5), np.float32)
    for latent, fires in of.items():
        for token, value in fires:
            x[tokens == token, latent] = value
    store = write_store(tmp_path / "store", x.reshape(-1, 5), context_length=T, tokens=tokens)
    config = resolve(ReLUConfig(d_sae=5, normalize="none", apply_b_dec_to_input=False), 5)
    eye, zero = np.eye(5, dtype=np.float32), np.zeros(5, np.float32)
    sae = ReLU.from_parameters(config, {"w_enc": eye, "w_dec": eye, "b_enc": zero, "b_dec": zero})
    source = HeldOutRows(store, "", tokens=10**6, holdout_fraction=None, include_excluded=True)
    activity = record(sae, source, tmp_path / "activity")
    assert single_token(activity).tolist() == [True, True, False, False, False]
    assert single_token(activity, [2, 0]).tolist() == [False, True]
    assert not single_token(activity, [1], top=1000)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory of two random layers in two files, and a tokenizer of single letters."""
    directory = tmp_path_factory.mktemp("model")
    letters = "abcdefghijklmnopqrstuvwxyz \n"
    vocab = {"<s>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.save(str(directory / "tokenizer.json"))
    config = lm.DecoderConfig(
        vocab_size=len(vocab), d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
        d_mlp=24, max_context=32,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape), lm.layout(config))
    lm.save_model(directory, config, params, bos_token_id=0)
    return directory


def tensors(directory):
    """The parameters of a model by their paths."""
    return jax.tree_util.tree_leaves_with_path(lm.load_params(directory))


def test_a_shuffled_model_keeps_the_entries_of_each_matrix_and_no_function(model, tmp_path):
    spec = lm.shuffled_model(model, tmp_path / "shuffled", seed=3)
    for (path, old), (_, new) in zip(tensors(model), tensors(spec), strict=True):
        assert np.array_equal(np.sort(old, axis=None), np.sort(new, axis=None)), path
        assert np.array_equal(old, new) == (old.ndim == 1), path
    first, other = lm.open_model(model), lm.open_model(spec)
    assert first.config == other.config and first.fingerprint != other.fingerprint
    ids = [[0, 1, 2, 3]]
    assert not np.allclose(first.forward(ids)[0], other.forward(ids)[0], atol=0.1)
    assert len(lm.generate(other, "ab", max_new_tokens=3, stop_at_eos=False)[0].tokens) == 3
    same, unlike = tmp_path / "same", tmp_path / "unlike"
    lm.shuffled_model(model, same, seed=3)
    lm.shuffled_model(model, unlike, seed=4)
    written = (tmp_path / "shuffled", same, unlike)
    weights = [(directory / "model.safetensors").read_bytes() for directory in written]
    assert weights[0] == weights[1] != weights[2]
    assert lm.shuffled_model(model, same, seed=3) == str(same)
    with pytest.raises(UserError, match="something else"):
        lm.shuffled_model(model, same, seed=4)
    (tmp_path / "cut").mkdir()
    for file in model.iterdir():
        content = file.read_bytes()
        cut = content[:-100] if file.suffix == ".safetensors" else content
        (tmp_path / "cut" / file.name).write_bytes(cut)
    with pytest.raises(UserError, match="damaged or truncated"):
        lm.shuffled_model(tmp_path / "cut", tmp_path / "o")


@pytest.mark.slow
def test_the_run_of_a_shuffled_model_goes_on_after_a_kill(model, tmp_path):
    """It has the tokens and the recipe of the run that it is the control of."""
    text = "".join(np.random.default_rng(1).choice(list("abcdefgh \n"), 40_000))
    site, where = "resid_post.1", tmp_path / "store"
    store = lm.harvest(model, [text], where, sites=site, context_length=16, dtype="float32")
    sae_jax.train(
        sae_jax.TopKConfig(d_sae=48, k=4), store, workdir=tmp_path / "run", epochs=1,
        batch_size=64, config=Config(train=TrainConfig(checkpoint_every=200)),
    )  # fmt: skip
    folder = tmp_path / "controls" / "shuffled_model"
    program = f"""
from sae_jax import lm
from sae_jax.interpret.explain.shuffled_run import shuffled_run
model = lm.open_model({str(model)!r})
shuffled_run({str(tmp_path / "run")!r}, {str(folder)!r}, model=model)
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    while process.poll() is None and not list(folder.glob("run/checkpoints/[0-9]*")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert (folder / "run").is_dir() and not (folder / "run" / "result.json").exists()
    files = [folder / "model" / "model.safetensors", folder / "store" / "meta.json"]
    before = [file.stat().st_mtime_ns for file in files]
    source = HeldOutRows(store, site, tokens=10**6, holdout_fraction=None)
    sae = sae_jax.load(tmp_path / "run")
    activity = record(sae, source, tmp_path / "activity")
    made = controls.record_controls(
        ["shuffled_model"], activity, sae, source, tmp_path,
        run=tmp_path / "run", model=lm.open_model(model),
    )["shuffled_model"]  # fmt: skip
    assert [file.stat().st_mtime_ns for file in files] == before
    np.testing.assert_array_equal(made.tokens, activity.tokens)
    np.testing.assert_array_equal(made.used, activity.used)
    shuffled_store = lm.open_store(folder / "store")
    for read in (lambda s: s.read_tokens(slice(None)), lambda s: s.meta.provenance["packing"]):
        np.testing.assert_array_equal(read(shuffled_store), read(store))
    old, new = (run_there(run) for run in (tmp_path / "run", folder / "run"))
    assert old.sae == new.sae and old.optimizer == new.optimizer
    assert new.train.tokens == pytest.approx(old.train.tokens, rel=0.02)
    x, used = shuffled_store.read(site, slice(0, 160)), activity.used.reshape(-1)[:160]
    fires = (np.asarray(sae_jax.load(folder / "run").encode(x)) > 0) & used[:, None]
    found = [made.dense(latent).reshape(-1)[:160] > 0 for latent in range(48)]
    np.testing.assert_array_equal(np.stack(found, axis=1), fires)
