"""Shows what latents respond to, says and tests what they mean, and steers by them."""

from sae_jax.interpret import explain, proxies
from sae_jax.interpret.ablation import ablation_effects, ablation_effects_of
from sae_jax.interpret.activity import Activity, record
from sae_jax.interpret.attribution import Attribution, Target, ablate, attribute
from sae_jax.interpret.collect import collect
from sae_jax.interpret.collection import Collection, Example
from sae_jax.interpret.cost import Cost, describe_cost
from sae_jax.interpret.effects import OutputTokens, output_tokens, used_tokens
from sae_jax.interpret.page import choose_latents, write_page
from sae_jax.interpret.placed import Placed
from sae_jax.interpret.pushes import direction_push, latent_push
from sae_jax.interpret.steering import Outcome, Steering, Writing

__all__ = [
    "Activity",
    "Attribution",
    "Collection",
    "Cost",
    "Example",
    "Outcome",
    "OutputTokens",
    "Placed",
    "Steering",
    "Target",
    "Writing",
    "ablate",
    "ablation_effects",
    "ablation_effects_of",
    "attribute",
    "choose_latents",
    "collect",
    "describe_cost",
    "direction_push",
    "explain",
    "latent_push",
    "output_tokens",
    "proxies",
    "record",
    "used_tokens",
    "write_page",
]
