"""Synthetic worlds: activations whose features are known, for use wherever a store is named."""

from sae_jax.activations.synthetic.kinds import KINDS, PREFIX
from sae_jax.activations.synthetic.stream import WorldStream
from sae_jax.activations.synthetic.world import World

__all__ = ["KINDS", "PREFIX", "World", "WorldStream"]
