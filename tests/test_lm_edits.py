"""Edits with SAEs: what they must leave alone, and what they must change."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax import lm
from sae_jax import sae as saes
from sae_jax.errors import UserError
from sae_jax.sae import ReLUConfig

MODEL = pathlib.Path(__file__).parent / "fixtures" / "lm" / "llama_tied_gqa"
SITE, D, N = "resid_mid.0", 16, 24
TOKENS = np.arange(36).reshape(4, 9)


def random_sae(kind="autoencoder", scale=3.0):
    target = D if kind == "transcoder" else None
    config = saes.resolve(ReLUConfig(kind=kind, d_sae=N), (D,), target)
    rng = np.random.default_rng(0)
    shapes = {"w_enc": (D, N), "w_dec": (N, D), "b_enc": (N,), "b_dec": (D,)}
    parameters = {name: jnp.float32(rng.normal(size=s)) for name, s in shapes.items()}
    return saes.ReLU.from_parameters(config, parameters, scale)


@pytest.fixture(scope="module")
def run():
    config, params = lm.load_config(MODEL), lm.load_params(MODEL)

    def run(edit=None, params=params, tokens=TOKENS):
        edits = {SITE: edit} if edit else None
        go = jax.jit(lambda p, t: lm.forward(p, t, config, (SITE,), edits))
        logits, taps = go(params, tokens)
        return np.asarray(logits), np.asarray(taps[SITE])

    return run


def test_reconstruction_and_its_error(run):
    sae = random_sae()
    clean, x = run()
    np.testing.assert_allclose(run(lm.reconstruct(sae))[1], sae(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(lm.reconstruct(sae, with_error=True))[0], clean, atol=1e-3)
    halved = run(lm.reconstruct(sae, lambda latents: latents / 2, with_error=True))[1]
    np.testing.assert_allclose(halved, x - (sae(x) - sae.decode(0 * sae.encode(x))) / 2, atol=1e-4)


@pytest.mark.parametrize("activation", [0.0, 7.0])
def test_a_clamped_latent_has_its_activation_and_the_error_stays(run, activation):
    sae = random_sae()
    _, x = run()
    latents = sae.encode(x)
    norm = np.linalg.norm(np.asarray(sae.w_dec[...])[5] / sae.scale)
    clamped = latents.at[..., 5].set(activation / norm)
    expected = sae.decode(clamped) + (x - sae.decode(latents))
    np.testing.assert_allclose(run(lm.clamp(sae, 5, activation))[1], expected, atol=1e-4)


def test_a_direction_at_some_positions_only(run):
    _, x = run()
    direction, mask = np.linspace(-1, 1, D), TOKENS % 2 == 0
    steered = run(lm.at(mask, lm.add_direction(direction, 2.0)))[1]
    np.testing.assert_allclose(steered - x, 2 * direction * mask[..., None], atol=1e-5)


def test_on_a_mesh_edits_are_the_same(run):
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    params = lm.load_params(MODEL, mesh=mesh)
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("data", None)))
    for edit in (lm.reconstruct(random_sae()), lm.clamp(random_sae(), 3, 5.0)):
        for ours, whole in zip(run(edit, params, tokens), run(edit), strict=True):
            np.testing.assert_allclose(ours, whole, atol=1e-4)


def test_what_cannot_be_edited_is_refused():
    with pytest.raises(UserError, match="no latent 24: the SAE has latents 0 to 23"):
        lm.clamp(random_sae(), N, 1.0)
    with pytest.raises(UserError, match="a transcoder does not reconstruct"):
        lm.reconstruct(random_sae("transcoder"))
