"""Explains latents without a model: rules about tokens that tell where each is active."""

from sae_jax.interpret.explain.statistics.by_statistics import by_statistics

__all__ = ["by_statistics"]
