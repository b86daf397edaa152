"""Adam, its schedules, and what keeps the decoder at unit norm, as optax transformations."""

import jax
import jax.numpy as jnp
import optax

from sae_jax.config import OptimizerConfig
from sae_jax.errors import UserError, choose
from sae_jax.train.schedule_steps import ScheduleSteps

SCHEDULES = ("constant", "cosine", "linear_tail", "warmup_stable_decay")


def check(config: OptimizerConfig) -> None:
    """Raises UserError, naming the field, if a value of the section is out of its range."""
    choose(config.schedule, SCHEDULES, "optimizer.schedule")
    positive = {
        "learning_rate": config.learning_rate,
        "eps": config.eps,
        "clip_norm": config.clip_norm,
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise UserError(f"optimizer.{name} must be above 0, not {value}")
    for name in ("b1", "b2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(
                f"optimizer.{name} must be from 0 to below 1, not {getattr(config, name)}"
            )
    if config.warmup_fraction < 0 or config.decay_fraction < 0:
        raise UserError("optimizer.warmup_fraction and decay_fraction must be 0 or more")
    if config.warmup_fraction + config.decay_fraction > 1:
        raise UserError(
            f"optimizer.warmup_fraction {config.warmup_fraction} and decay_fraction "
            f"{config.decay_fraction} are together more than the whole run"
        )


def schedule(config: OptimizerConfig, lengths: ScheduleSteps) -> optax.Schedule:
    """Returns the learning rate as a function of the step, from 0.

    It grows linearly to the peak in the warm-up. What follows depends on `config.schedule`:

        constant             the peak
        cosine               half a cosine to 0
        linear_tail          the peak, and linear to 0 over the last decay_fraction
        warmup_stable_decay  the peak, and 1 - sqrt to 0 over the last decay_fraction
                             (Hagele et al. 2024, "Scaling laws and compute-optimal training")
    """
    peak, steps, warmup = config.learning_rate, lengths.steps, lengths.warmup

    def rate(step):
        warmth = jnp.minimum(1.0, (step + 1) / jnp.maximum(1, warmup))
        left = jnp.clip((steps - step) / lengths.decay, 0.0, 1.0)  # 1 until the tail begins
        if config.schedule == "cosine":
            done = jnp.clip((step - warmup) / jnp.maximum(1, steps - warmup), 0.0, 1.0)
            decay = 0.5 * (1 + jnp.cos(jnp.pi * done))
        elif config.schedule == "linear_tail":
            decay = left
        elif config.schedule == "warmup_stable_decay":
            decay = 1 - jnp.sqrt(1 - left)
        else:
            decay = 1.0
        return peak * warmth * decay

    return rate


def make(
    config: OptimizerConfig,
    lengths: ScheduleSteps,
    unit_norm_decoder: bool,
    threshold_unit: float = 1.0,
) -> optax.GradientTransformation:
    """Returns the optimiser of parameters {name: array}, where `w_dec` has a row for each latent.

    Args:
      config: Adam's settings and the schedule.
      lengths: the run's schedules, in steps.
      unit_norm_decoder: whether the rows of the decoder are kept at norm 1.
      threshold_unit: the norm of the activations, by which JumpReLU's thresholds take longer steps.
    """
    parts = [optax.scale_by_adam(config.b1, config.b2, config.eps)]
    if config.clip_norm is not None:
        parts.insert(0, clip_by_global_norm(config.clip_norm))
    parts.append(optax.scale_by_learning_rate(schedule(config, lengths)))
    parts.append(scale_threshold_updates(threshold_unit))
    if unit_norm_decoder:
        parts = [remove_parallel_gradient(), *parts, renormalise_decoder()]
    return optax.chain(*parts)


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Scales gradients whose global norm is above `most` to that norm.

    It is `optax.clip_by_global_norm` to rounding. That divides each gradient by the norm and picks
    between the two, for which XLA writes one array more of each.
    """

    def update(gradients, parameters):
        scale = jnp.minimum(1.0, most / optax.tree.norm(gradients))
        return jax.tree.map(lambda g: g * scale, gradients)

    return optax.stateless(update)


def remove_parallel_gradient() -> optax.GradientTransformation:
    """Removes from the gradient of each row of `w_dec` its component along the row.

    The rows have norm 1. Renormalising would undo the component, but only after Adam's moments had
    taken it in (Bricken et al. 2023, "Towards Monosemanticity").
    """

    def update(gradients, parameters):
        rows, gradient = parameters["w_dec"], gradients["w_dec"]
        along = jnp.sum(gradient * rows, axis=1, keepdims=True)
        return gradients | {"w_dec": gradient - along * rows}

    return optax.stateless(update)


def renormalise_decoder() -> optax.GradientTransformation:
    """Makes the update of `w_dec` end on rows of norm 1. It is the last in a chain."""

    def update(updates, parameters):
        moved: jax.Array = parameters["w_dec"] + updates["w_dec"]
        unit = moved / jnp.linalg.norm(moved, axis=1, keepdims=True)
        return updates | {"w_dec": unit - parameters["w_dec"]}

    return optax.stateless(update)


def scale_threshold_updates(unit: float) -> optax.GradientTransformation:
    """Makes the update of `threshold`, where there is one, `unit` times as long.

    The update ends at 0 or above, because latents would be negative below it.

    Adam's steps have the length of the learning rate, whatever the size of a parameter.
    Pre-activations and thresholds are as large as activations. A learning rate that suits
    activations of norm 1 (Gemma Scope) would need sqrt(d) times as many steps where the norm is
    sqrt(d), which is more than a run has.
    """

    def update(updates, parameters):
        if "threshold" not in parameters:
            return updates
        moved = jnp.maximum(unit * updates["threshold"], -parameters["threshold"])
        return updates | {"threshold": moved}

    return optax.stateless(update)
