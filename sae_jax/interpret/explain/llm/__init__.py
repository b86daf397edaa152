"""Asks language models behind an API what latents mean, and whether what was said holds."""

from sae_jax.interpret.explain.llm.client import Client
from sae_jax.interpret.explain.llm.explaining import explain
from sae_jax.interpret.explain.llm.scoring import planned, score
from sae_jax.interpret.explain.llm.source import LogitWeights, logit_weights

__all__ = ["Client", "LogitWeights", "explain", "logit_weights", "planned", "score"]
