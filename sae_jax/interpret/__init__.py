"""Shows what latents respond to: examples, output tokens, and a page to look at."""

from sae_jax.interpret.ablation import ablation_effects, ablation_effects_of
from sae_jax.interpret.attribution import Attribution, Target, ablate, attribute
from sae_jax.interpret.collect import Cost, collect, describe_cost
from sae_jax.interpret.collection import Collection, Example
from sae_jax.interpret.effects import OutputTokens, output_tokens, used_tokens
from sae_jax.interpret.page import choose_latents, write_page
from sae_jax.interpret.placed import Placed

__all__ = [
    "Attribution",
    "Collection",
    "Cost",
    "Example",
    "OutputTokens",
    "Placed",
    "Target",
    "ablate",
    "ablation_effects",
    "ablation_effects_of",
    "attribute",
    "choose_latents",
    "collect",
    "describe_cost",
    "output_tokens",
    "used_tokens",
    "write_page",
]
