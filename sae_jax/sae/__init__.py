"""Sparse autoencoders: each architecture is a config and a module in a file of its own.

An architecture is added to this package by a file with a config and a subclass of SAE, and by its
name in the imports below. One of your own needs no change here: defining the class, in any file,
registers it.
"""

from sae_jax.sae.base import SAE
from sae_jax.sae.batchtopk import BatchTopK, BatchTopKConfig
from sae_jax.sae.config import SAEConfig
from sae_jax.sae.gated import Gated, GatedConfig
from sae_jax.sae.jumprelu import JumpReLU, JumpReLUConfig
from sae_jax.sae.losses import Losses, LossInputs
from sae_jax.sae.matryoshka import Matryoshka, MatryoshkaConfig
from sae_jax.sae.registry import ARCHITECTURES, architecture, by_name, move_to_end
from sae_jax.sae.relu import ReLU, ReLUConfig
from sae_jax.sae.relu_l1_unit import ReLUL1Unit, ReLUL1UnitConfig
from sae_jax.sae.resolve import resolve
from sae_jax.sae.topk import TopK, TopKConfig

move_to_end(ReLU, ReLUL1Unit, TopK, BatchTopK, Matryoshka, JumpReLU, Gated)

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "BatchTopK",
    "BatchTopKConfig",
    "Gated",
    "GatedConfig",
    "JumpReLU",
    "JumpReLUConfig",
    "LossInputs",
    "Losses",
    "Matryoshka",
    "MatryoshkaConfig",
    "ReLU",
    "ReLUConfig",
    "ReLUL1Unit",
    "ReLUL1UnitConfig",
    "SAEConfig",
    "TopK",
    "TopKConfig",
    "architecture",
    "by_name",
    "resolve",
]
