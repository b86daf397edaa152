"""What changes from step to step besides the learning rate: sparsity, k, the penalty's exponent.

All of it follows from the step, but for what the state carries: `log_coefficient`, the logarithm of
what the configured sparsity coefficient has been multiplied by to reach a target L0, or to make up
for an exponent that is being annealed; and the L0 of the step before.
"""

import math

import jax
import jax.numpy as jnp

from sae_jax.sae import Losses, LossInputs, SAEConfig
from sae_jax.train.schedule_steps import ScheduleSteps

_MOST = math.log(1e3)  # the controller multiplies the coefficient by up to this, or its inverse
_GAIN = 2.0  # change of ln(coefficient) for a change of ln(L0)
_INTEGRALS = 20  # time constants of the integral part in a run
_LARGE_ERROR, _ANY_ERROR = 0.35, 3.0  # of ln(L0): what the integral part, and all of it, see


def controls_at(
    config: SAEConfig,
    step: jax.Array | int,
    lengths: ScheduleSteps,
    log_coefficient,
    dead: jax.Array,
    k: jax.Array | None = None,
) -> LossInputs:
    """The controls of `step`, from 0. k: the run's own, where config.k is only the largest of its
    pack."""
    steps = lengths.steps
    return LossInputs(
        dead=dead,
        coefficient=_coefficient(config, step, lengths.sparsity_warmup, log_coefficient),
        k=_k(config, config.k if k is None else k, step, steps) if config.k_start else k,
        p=_p(config, step, steps),
        next_p=_p(config, step + 1, steps),
    )


def next_log_coefficient(
    config: SAEConfig,
    step: jax.Array,
    lengths: ScheduleSteps,
    log_coefficient: jax.Array,
    last_l0: jax.Array,
    losses: Losses,
) -> jax.Array:
    """`log_coefficient` after a step; last_l0: of the step before.

    The controller of `target_l0` is proportional and integral in ln(L0 / target), and cares for
    three things. L0 falls from half the dictionary at a speed that Adam sets, not the coefficient:
    the integral part must not wind up meanwhile, so the proportional part takes back what L0 has
    come nearer, and large errors count as moderate ones. Latents that too large a coefficient
    kills at the start do not come back: it is lowered at once. While it warms up it is not raised.
    """
    new = log_coefficient + losses.log_coefficient
    if not config.adapts_to_target_l0:
        return new
    error = _log_error(losses.l0, config.target_l0)
    before = jnp.where(step == 0, error, _log_error(last_l0, config.target_l0))
    slow = jnp.clip(error, -_LARGE_ERROR, _LARGE_ERROR) * _INTEGRALS / lengths.steps
    change = _GAIN * (error - before + slow)
    starting = step < jnp.minimum(lengths.sparsity_warmup, lengths.steps // 20)
    change = jnp.where(starting, jnp.where(error < 0, jnp.minimum(change, 0.0), 0.0), change)
    return jnp.clip(new + change, -_MOST, _MOST)


def _log_error(l0: jax.Array, target: float) -> jax.Array:
    return jnp.clip(jnp.log(jnp.maximum(l0, 1e-6) / target), -_ANY_ERROR, _ANY_ERROR)


def running_mean_weight(step: jax.Array, horizon: float) -> jax.Array:
    """The weight of this step's value in an exponential running mean, corrected for its start: at
    step 0 it is 1, and whatever the mean began with is forgotten."""
    part = 1 / horizon
    return part / -jnp.expm1((step + 1.0) * jnp.log1p(-part))


def _coefficient(config: SAEConfig, step, warmup: int, log_coefficient) -> jax.Array:
    if config.sparsity_coefficient is None:
        return jnp.zeros(())
    warm = jnp.minimum(1.0, (step + 1) / jnp.maximum(1, warmup))
    return config.sparsity_coefficient * warm * jnp.exp(log_coefficient)


def _k(config: SAEConfig, k, step, steps: int) -> jax.Array:
    part = jnp.minimum(1.0, step / max(1, round(config.k_anneal_fraction * steps)))
    return jnp.round(config.k_start + (k - config.k_start) * part).astype(jnp.int32)


def _p(config: SAEConfig, step, steps: int) -> jax.Array | float:
    if config.p_end == 1:
        return 1.0
    start = config.p_anneal_start * steps
    part = jnp.clip((step - start) / max(1.0, steps - 1 - start), 0.0, 1.0)
    return 1 + (config.p_end - 1) * part
