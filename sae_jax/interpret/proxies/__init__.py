"""Proxies: rules of our own for concepts, by which it is measured how specific a latent is."""

from sae_jax.interpret.proxies.indicators import PATTERNS, Indicators, indicators

__all__ = ["PATTERNS", "Indicators", "indicators"]
