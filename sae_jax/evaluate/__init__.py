"""How good an SAE is: alone on activations, and inside its language model."""

from sae_jax.evaluate.metrics import RowMetrics, activation_scale, measure_rows
from sae_jax.evaluate.recovery import Recovery, RecoveryMeter, measure_recovery
from sae_jax.evaluate.report import Evaluation, evaluate, latents_file, load, save
from sae_jax.evaluate.sources import (
    HeldOutRows,
    LanguageModel,
    ModelRows,
    check_model,
    load_model,
    read_tokens,
)
from sae_jax.evaluate.spliced import measure_spliced
from sae_jax.evaluate.worlds import WorldRows

__all__ = [
    "Evaluation",
    "HeldOutRows",
    "LanguageModel",
    "ModelRows",
    "Recovery",
    "RecoveryMeter",
    "RowMetrics",
    "WorldRows",
    "activation_scale",
    "check_model",
    "evaluate",
    "latents_file",
    "load",
    "load_model",
    "measure_recovery",
    "measure_rows",
    "measure_spliced",
    "read_tokens",
    "save",
]
