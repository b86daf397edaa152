"""Texts that activate latents, against brute force over a whole store."""

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.activations import write_store
from sae_jax.errors import UserError
from sae_jax.evaluate.metrics import activation_scale
from sae_jax.interpret import find_examples
from sae_jax.sae import ReLU, ReLUConfig, resolve

D, N, T, SEQUENCES, BOS = 8, 24, 16, 300, 7


@pytest.fixture(scope="module")
def sae():
    rng = np.random.default_rng(0)
    parameters = {
        "w_enc": rng.normal(size=(D, N)),
        "w_dec": rng.normal(size=(N, D)),
        "b_enc": rng.normal(size=N) - 1.0,
        "b_dec": np.zeros(D),
    }
    parameters["b_enc"][5] = -1e6  # never fires
    parameters = {name: jnp.asarray(value, jnp.float32) for name, value in parameters.items()}
    return ReLU.from_parameters(resolve(ReLUConfig(d_sae=N), D), parameters, 0.8)


@pytest.fixture(scope="module")
def world(tmp_path_factory, sae):
    """(store, tokens, activations (SEQUENCES, T, N) with 0 where a row is excluded)."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(10, 50, (SEQUENCES, T)).astype(np.int32)
    tokens[:, 0] = BOS
    x = rng.normal(size=(SEQUENCES, T, D)).astype(np.float32)
    x[:, 0] *= 50  # of no account: the rows are excluded
    path = tmp_path_factory.mktemp("examples") / "store"
    store = write_store(
        path, x.reshape(-1, D), context_length=T, tokens=tokens, special_tokens=(BOS,)
    )
    acts = np.array(sae.encode(x) * activation_scale(sae))
    acts[:, 0] = 0
    return store, tokens, acts


def find(sae, world, latents, **options):
    store, _, acts = world
    maxima = acts.max(axis=(0, 1))[latents]
    return find_examples(sae, store, "", np.array(latents), maxima, **options)


def test_the_strongest_sequences_in_order_with_their_peaks(sae, world):
    _, tokens, acts = world
    latents = [3, 0, 17]
    found = find(sae, world, latents, count=6, before=4, after=3)
    for latent, groups in zip(latents, found, strict=True):
        peaks = acts[:, :, latent].max(axis=1)
        expected = np.argsort(-peaks, kind="stable")[:6]
        assert [e.sequence for e in groups[0]] == expected.tolist()
        for example in groups[0]:
            row = acts[example.sequence, :, latent]
            assert example.peak == row.argmax()
            assert example.start == max(0, example.peak - 4)
            assert example.stop == min(T, example.peak + 4)
            np.testing.assert_array_equal(example.ids, tokens[example.sequence])
            window = slice(example.start, example.stop)
            usable = example.ids[window] != BOS
            np.testing.assert_allclose(
                example.activations[usable], row[window][usable], rtol=1e-4, atol=1e-5
            )


def test_examples_of_an_interval_peak_inside_it(sae, world):
    _, _, acts = world
    latent = 3
    peaks = acts[:, :, latent].max(axis=1)
    (groups,) = find(sae, world, [latent], count=4, per_interval=3, intervals=4)
    assert len(groups) == 5
    for i, group in enumerate(groups[1:]):
        low, high = peaks.max() * (3 - i) / 4, peaks.max() * (4 - i) / 4
        inside = np.flatnonzero((peaks > low) & (peaks <= high * (1 + 1e-6)))
        assert len(group) == min(3, len(inside))
        sequences = [e.sequence for e in group]
        assert set(sequences) <= set(inside.tolist()) and len(set(sequences)) == len(sequences)


def test_other_seeds_draw_other_examples_and_the_same_seed_the_same(sae, world):
    def drawn(seed):
        (groups,) = find(sae, world, [3], seed=seed)
        return [[e.sequence for e in group] for group in groups]

    assert drawn(0) == drawn(0)
    assert drawn(0)[0] == drawn(1)[0] and drawn(0) != drawn(1)


def test_it_does_not_matter_how_many_sequences_are_taken_at_once(sae, world, monkeypatch):
    def sequences():
        return [[[e.sequence for e in g] for g in groups] for groups in find(sae, world, [3, 9])]

    whole = sequences()
    monkeypatch.setattr("sae_jax.interpret.examples._LATENTS", 5 * T * N)
    assert sequences() == whole


def test_a_latent_that_never_fires_has_no_examples(sae, world):
    assert find(sae, world, [5])[0] == [[]] * 5


def test_a_store_without_tokens_is_refused(sae, tmp_path):
    store = write_store(tmp_path / "store", np.ones((40, D), np.float32))
    with pytest.raises(UserError, match="no tokens"):
        find_examples(sae, store, "", np.array([0]), np.ones(1))
