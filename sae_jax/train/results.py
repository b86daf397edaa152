"""The lines of metrics.jsonl and the content of result.json, by the names of their fields."""

import hashlib
import json
import math

import jax
import jax.numpy as jnp

from sae_jax import config as configs
from sae_jax import sae as saes
from sae_jax.config import Config
from sae_jax.train.step import Trainer, TrainState


def run_id(config: Config) -> str:
    """Hash of the resolved config without hardware."""
    text = json.dumps(configs.identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def planned(config: Config) -> dict:
    """What of a run's result its resolved config decides."""
    tokens = config.train.tokens // config.data.batch_size * config.data.batch_size
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
    }


def flops(config: Config, tokens: int) -> dict[str, int]:
    """Both accountings of a run's compute: `flops` 12 n d a token (6 n (d_in + d_out)), the
    field's axis for every architecture, and `flops_executed`, what the step really does (recipes
    of Gao et al.)."""
    executed = saes.architecture(config.sae).flops_per_token(config.sae)
    return {
        "flops": 6 * config.sae.d_sae * (config.sae.d_in + config.sae.d_out) * tokens,
        "flops_executed": executed * tokens,
    }


def metrics_line(
    config: Config, step: int, values: dict[str, float], steps_per_second: float | None
) -> dict:
    """A line of metrics.jsonl after `step` steps. Values that are not finite become null."""
    tokens = step * config.data.batch_size
    return {
        "step": step,
        "tokens": tokens,
        **flops(config, tokens),
        **{name: v if math.isfinite(v) else None for name, v in values.items()},
        "tokens_per_second": steps_per_second and steps_per_second * config.data.batch_size,
    }


def make_result(
    trainer: Trainer, state: TrainState, means: dict[str, float | None], seconds: float
) -> dict:
    """The content of result.json of a run that ended in `state`. means: on held-out rows."""
    dead = trainer.dead(state)
    return {
        **planned(trainer.config),
        "sparsity_coefficient": _last_coefficient(trainer.config, state),
        **means,
        "dead_fraction": float(jnp.mean(dead.astype(jnp.float32))),
        "wall_seconds": seconds,
        "devices": jax.sharding.get_mesh().size,
    }


def _last_coefficient(config: Config, state: TrainState) -> float | None:
    """The configured sparsity coefficient, or what it was adapted to."""
    coefficient = config.sae.sparsity_coefficient
    return coefficient and coefficient * math.exp(float(state.log_coefficient))
