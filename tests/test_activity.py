"""What is recorded of every latent equals brute force; stops and processes change nothing."""

import numpy as np
import planted
import pytest
from planted import N, T

from sae_jax.errors import UserError
from sae_jax.evaluate.metrics import activation_scale
from sae_jax.evaluate.sources import HeldOutRows
from sae_jax.interpret.activity import Activity, record


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return planted.store(tmp_path_factory.mktemp("activity") / "store")


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_equals_brute_force(store, tmp_path, architecture, monkeypatch):
    for name, value in (("_PIECE", 700), ("BLOCK_EVENTS", 900), ("BLOCK_LATENTS", 3)):
        monkeypatch.setattr(f"sae_jax.interpret.passes.{name}", value)
    sae = planted.sae(architecture)
    source = HeldOutRows(store, "a", tokens=10**6, holdout_fraction=None)
    found = record(sae, source, tmp_path / "activity", tokens=10**6)
    texts = source.texts()
    x = source.read(np.arange(len(texts.tokens)))
    expected = np.asarray(sae.encode(x)) * np.asarray(activation_scale(sae))
    expected[~texts.used] = 0
    np.testing.assert_array_equal(found.tokens, texts.tokens)
    np.testing.assert_array_equal(
        np.stack([found.dense(i) for i in range(N)], axis=-1), np.maximum(expected, 0)
    )
    np.testing.assert_array_equal(found.counts, (expected > 0).sum((0, 1)))
    np.testing.assert_array_equal(found.max_activation, np.maximum(expected, 0).max((0, 1)))


def test_copies_of_a_text_are_in_one_half(store, tmp_path):
    source = HeldOutRows(store, "a", tokens=10**6, holdout_fraction=None)
    found = record(planted.sae("topk"), source, tmp_path / "activity")
    _, which = np.unique(found.tokens, axis=0, return_inverse=True)
    for text in range(which.max() + 1):
        assert len(set(found.held_out[which == text])) == 1
    assert 0.3 < found.held_out.mean() < 0.7
    assert found.tokens.shape[1] == T


def test_what_is_damaged_is_named(store, tmp_path):
    with pytest.raises(UserError, match="no recorded activity"):
        Activity(tmp_path)
    source = HeldOutRows(store, "a", tokens=10**6, holdout_fraction=None)
    record(planted.sae("topk"), source, tmp_path / "activity")
    with pytest.raises(UserError, match="not empty"):
        record(planted.sae("topk"), source, tmp_path / "activity")
    with pytest.raises(UserError, match="no latent 40"):
        Activity(tmp_path / "activity").of(N)
    (tmp_path / "activity" / "rows.npy").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"rows\.npy"):
        Activity(tmp_path / "activity")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("starts", lambda a: a[::-1]),
        ("starts", lambda a: a.astype(float)),
        ("rows", lambda a: a + 10**6),
        ("rows", lambda a: a[:, None]),
        ("values", lambda a: a[:-1]),
        ("values", lambda a: a * np.nan),
        ("tokens", lambda a: a[:-1]),
        ("tokens", lambda a: -1 - a),
        ("used", lambda a: a[:, :3]),
        ("numbers", lambda a: a[:1]),
    ],
)
def test_files_that_do_not_fit_together_are_no_activity(store, tmp_path, name, change):
    source = HeldOutRows(store, "a", tokens=256, holdout_fraction=None)
    found = record(planted.sae("topk"), source, tmp_path / "activity")
    file = found.path / f"{name}.npy"
    np.save(file, change(np.array(np.load(file))))
    with pytest.raises(UserError, match="do not fit together"):
        Activity(found.path)
