"""Shows what latents respond to: examples, output tokens, and a page to look at."""

from sae_jax.interpret.collect import Cost, collect, describe_cost
from sae_jax.interpret.collection import Collection, Example
from sae_jax.interpret.effects import OutputTokens, output_tokens
from sae_jax.interpret.page import choose_latents, write_page

__all__ = [
    "Collection",
    "Cost",
    "Example",
    "OutputTokens",
    "choose_latents",
    "collect",
    "describe_cost",
    "output_tokens",
    "write_page",
]
