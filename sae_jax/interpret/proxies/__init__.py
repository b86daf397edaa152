"""Proxies: rules of our own for concepts, by which it is measured how specific a latent is."""

from sae_jax.interpret.proxies.bank import GROUPS, Bank, Proxy
from sae_jax.interpret.proxies.indicators import PATTERNS, Indicators, indicators
from sae_jax.interpret.proxies.labels import DocumentLabels, document_labels

__all__ = [
    "GROUPS",
    "PATTERNS",
    "Bank",
    "DocumentLabels",
    "Indicators",
    "Proxy",
    "document_labels",
    "indicators",
]
