"""Attribution: circuits that are built by hand, where it equals ablation, and completeness."""

import hand_built
import numpy as np
import pytest
import world
from hand_built import CURRENT, OUT, PREVIOUS, V
from test_effects import relu_sae

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.interpret import attribution
from sae_jax.interpret import placed as placed_module
from sae_jax.interpret.attribution import Target, ablate, attribute, correlation
from sae_jax.interpret.placed import Placed

STRENGTH, DIRECT, LOUD = 4.0, 0.3, 5.0
A, X, B = (hand_built.WORDS.index(word) for word in "AxB")


@pytest.fixture(scope="module")
def circuit(tmp_path_factory):
    fill = hand_built.skip_circuit(STRENGTH, DIRECT, LOUD)
    return hand_built.make_model(tmp_path_factory.mktemp("circuit") / "model", 2, fill)


def each_part():
    """An SAE with a latent for each part of the hand-built residual stream but the constant."""
    return relu_sae(np.eye(hand_built.D)[1:])


def of(found, position, part):
    """The activation and contribution of the latent that reads a part of the residual stream."""
    place = found.latents[position].tolist().index(part - 1)
    return found.activations[position, place], found.contributions[position, place]


def test_the_latent_between_has_the_largest_attribution_and_is_not_the_most_active(circuit):
    """ "A x" makes B: by a head that copies the word before, and a neuron that reads the copy."""
    ids = hand_built.ids("y A x")
    placed = [Placed(each_part(), site) for site in ("resid_pre.0", "resid_post.0", "resid_post.1")]
    first, between, last = attribute(circuit, placed, ids, Target(B))
    share = 1 - 1 / V  # of a logit, less the mean of all
    np.testing.assert_allclose(between.value, (STRENGTH + DIRECT * LOUD) * share, rtol=1e-6)
    (t, i), *_ = between.largest(5)
    assert (t, between.latents[t, i]) == (3, PREVIOUS + A - 1)
    assert between.activations[t, i] == pytest.approx(1.0)
    np.testing.assert_allclose(between.contributions[t, i], STRENGTH * share, rtol=1e-6)
    loudest = np.unravel_index(between.activations.argmax(), between.activations.shape)
    assert between.latents[loudest] == CURRENT + X - 1
    np.testing.assert_allclose(
        of(between, 3, CURRENT + X), [LOUD, LOUD * DIRECT * share], rtol=1e-6
    )
    # The same circuit from end to end: the word A one position earlier, and what the neuron wrote.
    np.testing.assert_allclose(of(first, 2, CURRENT + A), [1.0, STRENGTH * share], rtol=1e-6)
    np.testing.assert_allclose(of(last, 3, OUT + B), [STRENGTH] + [STRENGTH * share], rtol=1e-6)
    rest = between.total.sum() - (STRENGTH + LOUD * DIRECT) * share
    assert abs(rest) < 1e-5
    assert max(f.gap for f in (first, between, last)) < 1e-6


@pytest.mark.slow
def test_attribution_equals_ablation_where_what_follows_is_linear(circuit):
    """The norms' scales do not change (see hand_built), the head's pattern is constant, and the
    ReLU is linear from 0 up: what is left is a linear function of every latent."""
    ids = hand_built.ids("x A x")
    both = [Placed(each_part(), site) for site in ("resid_pre.0", "resid_post.0")]
    every = attribute(circuit, both, ids, Target(B, A))
    for placed, found in zip(both, every, strict=True):
        places = found.largest(1000)
        assert len(places) == found.active.sum() >= 4
        positions, latents, activations, contributions = (
            np.array([a for a in column])
            for column in zip(
                *((t, found.latents[t, i], found.activations[t, i], found.contributions[t, i])
                  for t, i in places), strict=True,
            )
        )  # fmt: skip
        exact = ablate(circuit, placed, ids, Target(B, A), positions, latents, activations)
        np.testing.assert_allclose(contributions, exact, atol=3e-6)
        assert np.abs(exact).max() > 1 and correlation(contributions, exact) > 0.999999


@pytest.mark.slow
@pytest.mark.parametrize("kind, target", [("autoencoder", Target()), ("transcoder", Target(7))])
def test_contributions_add_up(tmp_path, monkeypatch, kind, target):
    """To y . gradient, and integrated ones to what the model loses with all latents taken out, in
    blocks of rows and of steps."""
    world.make_model(tmp_path / "model", num_layers=2)
    model, rng = lm.JaxModel(tmp_path / "model"), np.random.default_rng(0)
    ids = rng.integers(1, model.vocab_size, 9)
    sae = relu_sae(
        0.3 * rng.normal(size=(40, 16)), rng.normal(size=(16, 40)), kind, b_dec=rng.normal(size=16)
    )
    sites = ("mlp_in.1", "mlp_out.1") if kind == "transcoder" else ("resid_post.0",)
    placed, where = Placed(sae, *sites), np.arange(9) > 0
    monkeypatch.setattr(attribution, "sequences_at_once", lambda _, n, __: min(n, 3))
    monkeypatch.setattr(placed_module, "_LATENTS", 40 * 4)
    (found,) = attribute(model, [placed], ids, target, positions=where)
    assert found.gap < 1e-5 and not found.total[0] and found.active[0] == 0
    clean, taps = model.forward(ids[None], taps=(placed.written, placed.site))
    assert found.value == pytest.approx(float(target.values(clean, ids[None])[0]), abs=1e-4)
    y, x = taps[placed.written], taps[placed.site]
    latents = sae.decode(sae.encode(x)) - sae.decode(0 * sae.encode(x))
    edits = {placed.written: lm.put(y - where[:, None] * latents)}
    without = target.values(model.forward(ids[None], edits=edits)[0], ids[None])[0]
    (integrated,) = attribute(model, [placed], ids, target, steps=32, positions=where)
    assert integrated.without_latents == pytest.approx(float(without), abs=1e-4)
    change = integrated.value - integrated.without_latents
    assert integrated.gap * abs(change) < 0.01 < abs(change)


def test_what_has_no_attribution_is_refused(circuit):
    placed = [Placed(each_part(), "resid_post.0")]
    for target, ids, message in [
        (Target(None, 3), [0, 1], "a loss has no baseline"),
        (Target(), [0], "a loss needs a context of two tokens"),
        (Target(99), [0, 1], "token 99 is not of the model's"),
    ]:
        with pytest.raises(UserError, match=message):
            attribute(circuit, placed, np.array(ids), target)
