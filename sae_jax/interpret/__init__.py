"""Shows what latents respond to: examples, output tokens, and a page to look at."""

from sae_jax.interpret.ablation import ablation_effects
from sae_jax.interpret.effects import OutputTokens, output_tokens, used_tokens
from sae_jax.interpret.examples import Example, find_examples
from sae_jax.interpret.page import choose_latents, write_page

__all__ = [
    "Example",
    "OutputTokens",
    "ablation_effects",
    "choose_latents",
    "find_examples",
    "output_tokens",
    "used_tokens",
    "write_page",
]
