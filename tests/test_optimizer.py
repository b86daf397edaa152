"""Schedules at known points; the decoder's unit rows; clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sae_jax.config import Config, OptimizerConfig
from sae_jax.errors import UserError
from sae_jax.train import optimizer
from sae_jax.train.schedule_steps import ScheduleSteps

STEPS = 1000  # warm-up: 100 steps; tail: the last 200


@pytest.mark.parametrize(
    "schedule,points",
    [
        ("constant", {0: 0.01, 49: 0.5, 99: 1, 500: 1, 999: 1}),
        ("linear_tail", {0: 0.01, 99: 1, 800: 1, 900: 0.5, 999: 0.005}),
        ("warmup_stable_decay", {49: 0.5, 800: 1, 850: 0.5, 950: 1 - 0.75**0.5}),
        ("cosine", {49: 0.5, 100: 1, 550: 0.5, 325: 0.5 + 0.5 * 0.5**0.5}),
    ],
)
def test_schedule(schedule, points):
    config = OptimizerConfig(
        learning_rate=3e-3, schedule=schedule, warmup_fraction=0.1, decay_fraction=0.2
    )
    rate = optimizer.schedule(config, lengths(config))
    for step, part in points.items():
        assert float(rate(jnp.int32(step))) == pytest.approx(3e-3 * part, rel=1e-5), step
    every = [float(rate(jnp.int32(step))) for step in range(0, STEPS, 50)]
    assert min(every) > 0, "a step that learns nothing"


def lengths(config: OptimizerConfig) -> ScheduleSteps:
    return ScheduleSteps.from_config(Config(optimizer=config), STEPS)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def parameters():
    w_dec = normal(0, 12, 5)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    return {"w_dec": jnp.asarray(w_dec), "w_enc": jnp.asarray(normal(1, 5, 12))}


def test_decoder_rows_stay_unit_and_moments_orthogonal(parameters):
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_fraction=0)
    adam = optimizer.make(config, lengths(config), unit_norm_decoder=True)
    state = adam.init(parameters)
    for step in range(5):
        before = parameters
        gradients = jax.tree.map(lambda p, step=step: normal(10 + step, *p.shape), parameters)
        updates, state = adam.update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        norms = np.linalg.norm(parameters["w_dec"], axis=1)
        np.testing.assert_allclose(norms, 1, atol=1e-6)
        assert float(jnp.abs(parameters["w_dec"] - before["w_dec"]).max()) > 0.01
        if step == 0:  # Adam's first moment is then its whole input, times 1 - b1
            moment = optax.tree.get(state, "mu")["w_dec"]
            along = jnp.sum(moment * before["w_dec"], axis=1)
            np.testing.assert_allclose(along, 0, atol=1e-6)
            assert float(jnp.abs(moment).max()) > 1e-3


def test_free_decoder_is_plain_adam(parameters):
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", warmup_fraction=0, clip_norm=None
    )
    ours, plain = optimizer.make(config, lengths(config), unit_norm_decoder=False), optax.adam(0.1)
    gradients = jax.tree.map(lambda p: jnp.asarray(normal(7, *p.shape)), parameters)
    got, _ = ours.update(gradients, ours.init(parameters), parameters)
    want, _ = plain.update(gradients, plain.init(parameters), parameters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_clip_is_of_the_global_norm(parameters):
    config = OptimizerConfig(learning_rate=0.1, clip_norm=0.5)
    adam = optimizer.make(config, lengths(config), unit_norm_decoder=False)
    gradients = jax.tree.map(lambda p: jnp.asarray(normal(7, *p.shape)), parameters)
    _, state = adam.update(gradients, adam.init(parameters), parameters)
    moments = optax.tree.get(state, "mu")
    norm = float(optax.tree.norm(gradients))
    assert norm > 0.5
    for name, gradient in gradients.items():
        np.testing.assert_allclose(moments[name], 0.1 * gradient * 0.5 / norm, rtol=1e-5)


@pytest.mark.parametrize(
    "field,value",
    [
        ("schedule", "linear-tail"),
        ("learning_rate", 0.0),
        ("eps", -1.0),
        ("b2", 1.0),
        ("clip_norm", 0.0),
        ("warmup_fraction", -0.1),
        ("decay_fraction", 1.5),
    ],
)
def test_wrong_values_are_named(field, value):
    with pytest.raises(UserError, match=field):
        optimizer.check(OptimizerConfig(**{field: value}))
