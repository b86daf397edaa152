"""Proxies: rules of our own for concepts, by which it is measured how specific a latent is."""

from sae_jax.interpret.proxies.bank import GROUPS, Bank, Proxy
from sae_jax.interpret.proxies.concepts import SPECIFIC, Concept, Specificity
from sae_jax.interpret.proxies.indicators import PATTERNS, Indicators, indicators
from sae_jax.interpret.proxies.labels import DocumentLabels, document_labels
from sae_jax.interpret.proxies.specificity import specificity
from sae_jax.interpret.proxies.specificity_report import write_specificity

__all__ = [
    "GROUPS",
    "PATTERNS",
    "SPECIFIC",
    "Bank",
    "Concept",
    "DocumentLabels",
    "Indicators",
    "Proxy",
    "Specificity",
    "document_labels",
    "indicators",
    "specificity",
    "write_specificity",
]
