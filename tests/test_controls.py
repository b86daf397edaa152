"""Schedules, and the controller that brings L0 to its target: on a model of L0, and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from sae_jax.sae import Losses, SAEConfig, by_name, resolve
from sae_jax.train import controls
from sae_jax.train.run import train_run
from sae_jax.train.schedule_steps import ScheduleSteps

STEPS, WIDTH = 400, 16
WORLD = "world:superposition,width=32,features=128"


def resolved(architecture: str, **fields) -> SAEConfig:
    return resolve(by_name(architecture).Config(d_sae=512, **fields), WIDTH)


def lengths(config: SAEConfig) -> ScheduleSteps:
    return ScheduleSteps.from_config(Config(sae=config), STEPS)


def over_a_run(config: SAEConfig) -> controls.LossInputs:
    """The controls of every step, stacked."""
    dead = jnp.zeros(())
    return jax.vmap(lambda step: controls.controls_at(config, step, lengths(config), 0.0, dead))(
        jnp.arange(STEPS)
    )


def test_the_coefficient_warms_up():
    config = resolved(architecture="relu", sparsity_coefficient=3.0, sparsity_warmup_fraction=0.25)
    got = np.asarray(over_a_run(config).coefficient)
    np.testing.assert_allclose(got[:100], 3 * np.arange(1, 101) / 100, rtol=1e-6)
    np.testing.assert_allclose(got[100:], 3, rtol=1e-6)


@pytest.mark.parametrize("k_start", [64, 2])
def test_k_goes_in_whole_steps_from_its_start_to_its_end(k_start):
    config = resolved(architecture="topk", k=8, k_start=k_start, k_anneal_fraction=0.5)
    k = np.asarray(over_a_run(config).k)
    assert k[0] == k_start and (k[200:] == 8).all() and set(k[:200]) > {8, k_start}
    assert (np.diff(k) * np.sign(8 - k_start) >= 0).all()


def test_p_is_annealed_to_the_last_step():
    config = resolved(architecture="relu", p_end=0.2, p_anneal_start=0.5)
    now = over_a_run(config)
    p, next_p = np.asarray(now.p), np.asarray(now.next_p)
    assert (p[:200] == 1).all() and (np.diff(p[200:]) < 0).all()
    assert p[-1] == pytest.approx(0.2) and next_p[-1] == pytest.approx(0.2)
    np.testing.assert_array_equal(p[1:], next_p[:-1])


def test_a_running_mean_forgets_what_it_began_with():
    values = np.random.default_rng(0).normal(size=STEPS) + 5
    mean = 1e6
    for step, value in enumerate(values):
        mean += controls.running_mean_weight(step, STEPS / 20) * (value - mean)
    assert mean == pytest.approx(values[-60:].mean(), abs=0.5)


@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0], ids="factor{}".format)
@pytest.mark.parametrize("target", [8.0, 30.0, 100.0])
def test_the_controller_without_training(target, factor):
    """L0 begins at 256 and follows the coefficient as training's does: with a lag, at a bounded
    speed, and with noise; L0 in equilibrium is 60 / coefficient."""
    config = resolved(
        architecture="relu", target_l0=target, sparsity_coefficient=factor * 60 / target
    )

    def step_on(state, inputs):
        (log_l0, log_coefficient, last_l0), (step, noise) = state, inputs
        now = controls.controls_at(config, step, lengths(config), log_coefficient, None)
        log_l0 += jnp.clip((jnp.log(60 / now.coefficient) - log_l0) / 20, -0.03, 0.03)
        l0 = jnp.exp(log_l0 + 0.02 * noise)
        losses = Losses(*[jnp.zeros(())] * 5)._replace(l0=l0)
        new = controls.next_log_coefficient(
            config, step, lengths(config), log_coefficient, last_l0, losses
        )
        return (log_l0, new, l0), jnp.exp(log_l0)

    noise = np.random.default_rng(0).normal(size=STEPS).astype(np.float32)
    start = (jnp.log(256.0), jnp.zeros(()), jnp.zeros(()))
    seen = np.asarray(jax.lax.scan(step_on, start, (jnp.arange(STEPS), noise))[1])
    assert np.mean(seen[-40:]) == pytest.approx(target, rel=0.03)
    assert np.std(np.log(seen[-100:])) < 0.05, "it swings"
    assert seen.min() > target / 2, "it overshoots"


def train_on_world(tmp_path, architecture, steps=STEPS, **sae) -> dict:
    config = Config(
        sae=by_name(architecture).Config(d_sae=128, dead_after_tokens=50_000, **sae),
        data=DataConfig(store=WORLD, batch_size=512),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        train=TrainConfig(tokens=steps * 512, checkpoint_every=steps),
    )
    return train_run(config, tmp_path).result


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture, factor",
    [
        ("relu", 10.0),
        ("relu_l1_unit", 0.1),
        ("jumprelu", 10.0),
        ("gated", 0.1),
        pytest.param("relu", 0.1, marks=pytest.mark.long),
        pytest.param("relu_l1_unit", 10.0, marks=pytest.mark.long),
        pytest.param("jumprelu", 0.1, marks=pytest.mark.long),
        pytest.param("gated", 10.0, marks=pytest.mark.long),
    ],
)
def test_l0_ends_at_its_target(tmp_path, architecture, factor):
    result = train_on_world(
        tmp_path, architecture=architecture, target_l0=6.0, sparsity_coefficient=2 * factor
    )
    assert result["eval_l0"] == pytest.approx(6, rel=0.05)
    assert result["dead_fraction"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", ["batchtopk", pytest.param("matryoshka", marks=pytest.mark.long)]
)
def test_the_threshold_lets_as_many_latents_through(tmp_path, architecture):
    result = train_on_world(tmp_path, architecture=architecture, k=6)
    assert result["eval_l0"] == pytest.approx(6, rel=0.02)
