"""The lines of metrics.jsonl and the content of result.json, by the names of their fields."""

import hashlib
import json
import math

import jax
import jax.numpy as jnp

from sae_jax import config as configs
from sae_jax import sae as saes
from sae_jax.config import Config
from sae_jax.train import controls, short_runs
from sae_jax.train.schedule_steps import count_steps, dead_after_tokens
from sae_jax.train.step import Trainer, TrainState

NEAR_TARGET = 0.05
"""How near its target, relative to it, an L0 has reached it."""


def run_id(config: Config) -> str:
    """Returns the run's id: a hash (16 hex digits) of its resolved config without hardware."""
    text = json.dumps(configs.identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def planned(config: Config) -> dict:
    """Returns the fields of result.json that the run's resolved config decides."""
    tokens = count_steps(config) * config.data.batch_size
    branch = {"branched_from": config.train.branch_from} if config.train.branch_from else {}
    return {
        "run_id": run_id(config),
        "architecture": config.sae.architecture,
        "kind": config.sae.kind,
        "d_in": config.sae.d_in,
        "d_sae": config.sae.d_sae,
        "k": config.sae.k,
        "sparsity_coefficient": config.sae.sparsity_coefficient,
        "target_l0": config.sae.target_l0,
        "seed": config.train.seed,
        "lr": config.optimizer.learning_rate,
        "tokens": tokens,
        **flops(config, tokens),
        **branch,
    }


def flops(config: Config, tokens: int) -> dict[str, int]:
    """Returns the floating-point operations of training on `tokens` tokens, counted in two ways.

    `flops` counts 6 d_sae (d_in + d_out) a token, 12 d_sae d_in for an autoencoder, as the
    literature does for every architecture. `flops_executed` counts what the step really does.
    """
    executed = saes.architecture(config.sae).flops_per_token(config.sae)
    return {
        "flops": 6 * config.sae.d_sae * (config.sae.d_in + config.sae.d_out) * tokens,
        "flops_executed": executed * tokens,
    }


def metrics_line(
    config: Config, step: int, values: dict[str, float], steps_per_second: float | None
) -> dict:
    """Returns a line of metrics.jsonl after `step` steps.

    Args:
      config: the resolved config.
      step: how many steps the run has done.
      values: the metrics of the step; those that are not finite become null, and dead_fraction
        too, as long as no latent can have been idle for `sae.dead_after_tokens`.
      steps_per_second: the speed, None where it is not known.
    """
    tokens = step * config.data.batch_size
    if tokens - config.data.batch_size < dead_after_tokens(config):  # those before the step
        values = values | {"dead_fraction": None}
    return {
        "step": step,
        "tokens": tokens,
        **flops(config, tokens),
        **{name: _finite(value) for name, value in values.items()},
        "tokens_per_second": steps_per_second and steps_per_second * config.data.batch_size,
    }


def make_result(
    trainer: Trainer, state: TrainState, means: dict[str, float | None], seconds: float
) -> dict:
    """Returns the content of result.json of a run that ended in `state`.

    Args:
      trainer: that of the run.
      state: its last state.
      means: the metrics on held-out rows, None where nothing is held out. Those that are not finite
        become null, since JSON has no such number.
      seconds: how long this program has trained it.
    """
    config, dead = trainer.config, trainer.dead(state)
    plan = planned(config)
    means = {name: _finite(value) for name, value in means.items()}
    known = plan["tokens"] >= dead_after_tokens(config)
    result = {
        **plan,
        "sparsity_coefficient": _last_coefficient(config, state),
        **means,
        **_target(config, state, means["eval_l0"]),
        "dead_fraction": float(jnp.mean(dead.astype(jnp.float32))) if known else None,
        "dead_after_tokens": dead_after_tokens(config),
        "wall_seconds": seconds,
        "devices": jax.sharding.get_mesh().size,
    }
    missed = missed_target(result)
    result["warnings"] = [*short_runs.doubts(config).values(), *([missed] if missed else [])]
    return result


def _target(config: Config, state: TrainState, eval_l0: float | None) -> dict[str, bool | None]:
    """Returns whether target_l0 was reached, and whether its coefficient is at a limit.

    Both are None where the config has no such thing. Without held-out rows the L0 is the last
    step's.
    """
    reached = limited = None
    if config.sae.target_l0 is not None:
        l0 = float(state.last_l0) if eval_l0 is None else eval_l0
        reached = abs(l0 / config.sae.target_l0 - 1) <= NEAR_TARGET
    if config.sae.adapts_to_target_l0:
        limited = controls.is_limited(float(state.log_coefficient))
    return {"target_reached": reached, "coefficient_at_limit": limited}


def missed_target(result: dict) -> str | None:
    """Returns a sentence about a target L0 that a run missed, or None where it did not.

    `result` is the content of its result.json.
    """
    if result.get("target_reached") is not False:
        return None
    l0 = result["eval_l0"]
    ended = "its last step's L0 is not" if l0 is None else f"the run ended at {l0:.3g}"
    if result["coefficient_at_limit"]:
        how = (
            f"its coefficient is at a limit, {result['sparsity_coefficient']:.3g}: begin with "
            "another sae.sparsity_coefficient, or raise optimizer.learning_rate"
        )
    else:
        how = "train longer, or raise optimizer.learning_rate"
    return f"sae.target_l0 is {result['target_l0']:g}, but {ended}; {how}"


def _finite(value: float | None) -> float | None:
    """Returns the value, or None for NaN or infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def _last_coefficient(config: Config, state: TrainState) -> float | None:
    """Returns the sparsity coefficient that the run ended with, None where it has none."""
    coefficient = config.sae.sparsity_coefficient
    return coefficient and coefficient * math.exp(float(state.log_coefficient))
