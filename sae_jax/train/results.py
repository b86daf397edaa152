"""The lines of metrics.jsonl and the content of result.json, by the names of their fields."""

import hashlib
import json
import math

import jax
import jax.numpy as jnp

from sae_jax import config as configs
from sae_jax import sae as saes
from sae_jax.config import Config
from sae_jax.train.schedule_steps import count_steps
from sae_jax.train.step import Trainer, TrainState


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
      values: the metrics of the step; those that are not finite become null.
      steps_per_second: the speed, None where it is not known.
    """
    tokens = step * config.data.batch_size
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
    dead = trainer.dead(state)
    means = {n: v if v is not None and math.isfinite(v) else None for n, v in means.items()}
    return {
        **planned(trainer.config),
        "sparsity_coefficient": _last_coefficient(trainer.config, state),
        **{name: _finite(value) for name, value in means.items()},
        "dead_fraction": float(jnp.mean(dead.astype(jnp.float32))),
        "wall_seconds": seconds,
        "devices": jax.sharding.get_mesh().size,
    }


def _finite(value: float | None) -> float | None:
    """Returns the value, or None for NaN or infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def _last_coefficient(config: Config, state: TrainState) -> float | None:
    """Returns the sparsity coefficient that the run ended with, None where it has none."""
    coefficient = config.sae.sparsity_coefficient
    return coefficient and coefficient * math.exp(float(state.log_coefficient))
