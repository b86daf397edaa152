"""Shows what latents respond to: examples, output tokens, and a page to look at."""

from sae_jax.interpret.ablation import ablation_effects
from sae_jax.interpret.collect import Cost, collect, describe_cost
from sae_jax.interpret.collection import Collection, Example
from sae_jax.interpret.effects import OutputTokens, output_tokens, used_tokens
from sae_jax.interpret.page import choose_latents, write_page

__all__ = [
    "Collection",
    "Cost",
    "Example",
    "OutputTokens",
    "ablation_effects",
    "choose_latents",
    "collect",
    "describe_cost",
    "output_tokens",
    "used_tokens",
    "write_page",
]
