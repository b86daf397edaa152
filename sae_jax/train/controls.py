"""What changes from step to step besides the learning rate: sparsity, k, the penalty's exponent.

Most of it follows from the number of the step. Two values are carried in the state. One is
`log_coefficient`: the logarithm of what the configured sparsity coefficient has been multiplied by,
to reach a target L0 or to make up for an exponent that is being annealed. The other is the L0 of
the step before.
"""

import math

import jax
import jax.numpy as jnp

from sae_jax.sae import Losses, LossInputs, SAEConfig
from sae_jax.train.schedule_steps import ScheduleSteps

_MAX_LOG_COEFFICIENT = math.log(1e3)  # the coefficient is multiplied by 1/1000 to 1000
_GAIN = 2.0  # change of ln(coefficient) for a change of ln(L0)
_INTEGRAL_TIMES = 20  # time constants of the integral part in a run
_MAX_INTEGRAL_ERROR = 0.35  # of ln(L0), as the integral part sees it
_MAX_ERROR = 3.0  # of ln(L0), as the whole controller sees it


def controls_at(
    config: SAEConfig,
    step: jax.Array | int,
    lengths: ScheduleSteps,
    log_coefficient,
    dead: jax.Array,
    k: jax.Array | None = None,
) -> LossInputs:
    """Returns what the loss of a step takes besides the batch.

    Args:
      config: the SAE's config.
      step: the number of the step, from 0.
      lengths: the run's schedules, in steps.
      log_coefficient: what the state carries, see above.
      dead: which latents are dead, (d_sae,) bool.
      k: the run's own k, where config.k is the largest of its pack.
    """
    steps = lengths.steps
    return LossInputs(
        dead=dead,
        coefficient=_coefficient(config, step, lengths.sparsity_warmup, log_coefficient),
        k=_annealed_k(config, config.k if k is None else k, step, steps) if config.k_start else k,
        p=_annealed_p(config, step, steps),
        next_p=_annealed_p(config, step + 1, steps),
    )


def next_log_coefficient(
    config: SAEConfig,
    step: jax.Array,
    lengths: ScheduleSteps,
    log_coefficient: jax.Array,
    last_l0: jax.Array,
    losses: Losses,
) -> jax.Array:
    """Returns `log_coefficient` after a step.

    Args:
      config: the SAE's config.
      step: the number of the step, from 0.
      lengths: the run's schedules, in steps.
      log_coefficient: its value in the step.
      last_l0: L0 of the step before.
      losses: those of the step.

    With `target_l0` it is moved by a proportional and integral controller of ln(L0 / target), which
    cares for three things:

    - L0 falls from half the dictionary at a speed that Adam sets, not the coefficient. The integral
      part must not wind up meanwhile. So the proportional part takes back what L0 has come nearer,
      and large errors count as moderate ones.
    - Latents that too large a coefficient kills at the start do not come back. So it is lowered at
      once.
    - While the coefficient warms up it is not raised.
    """
    new = log_coefficient + losses.log_coefficient
    if not config.adapts_to_target_l0:
        return new
    error = _log_error(losses.l0, config.target_l0)
    last_error = jnp.where(step == 0, error, _log_error(last_l0, config.target_l0))
    integral = (
        jnp.clip(error, -_MAX_INTEGRAL_ERROR, _MAX_INTEGRAL_ERROR) * _INTEGRAL_TIMES / lengths.steps
    )
    change = _GAIN * (error - last_error + integral)
    starting = step < jnp.minimum(lengths.sparsity_warmup, lengths.steps // 20)
    change = jnp.where(starting, jnp.where(error < 0, jnp.minimum(change, 0.0), 0.0), change)
    return jnp.clip(new + change, -_MAX_LOG_COEFFICIENT, _MAX_LOG_COEFFICIENT)


def is_limited(log_coefficient: float) -> bool:
    """Returns whether the controller can move the coefficient no further in one direction."""
    return abs(log_coefficient) >= _MAX_LOG_COEFFICIENT * (1 - 1e-6)


def _log_error(l0: jax.Array, target: float) -> jax.Array:
    return jnp.clip(jnp.log(jnp.maximum(l0, 1e-6) / target), -_MAX_ERROR, _MAX_ERROR)


def running_mean_weight(step: jax.Array, horizon: float) -> jax.Array:
    """Returns the weight of a step's value in an exponential running mean over `horizon` steps.

    It is corrected for the start: at step 0 it is 1, so that whatever the mean began with is
    forgotten.
    """
    last_weight = 1 / horizon  # what the weight comes to in the long run
    return last_weight / -jnp.expm1((step + 1.0) * jnp.log1p(-last_weight))


def _coefficient(config: SAEConfig, step, warmup: int, log_coefficient) -> jax.Array:
    if config.sparsity_coefficient is None:
        return jnp.zeros(())
    warmth = jnp.minimum(1.0, (step + 1) / jnp.maximum(1, warmup))
    return config.sparsity_coefficient * warmth * jnp.exp(log_coefficient)


def _annealed_k(config: SAEConfig, k, step, steps: int) -> jax.Array:
    progress = jnp.minimum(1.0, step / max(1, round(config.k_anneal_fraction * steps)))
    return jnp.round(config.k_start + (k - config.k_start) * progress).astype(jnp.int32)


def _annealed_p(config: SAEConfig, step, steps: int) -> jax.Array | float:
    if config.p_end == 1:
        return 1.0
    start = config.p_anneal_start * steps
    progress = jnp.clip((step - start) / max(1.0, steps - 1 - start), 0.0, 1.0)
    return 1 + (config.p_end - 1) * progress
