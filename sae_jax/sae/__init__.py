"""Sparse autoencoders: the architectures, each a module with its config in a file of its own.

To add one here: a file with a config and a subclass of SAE, and its line in the table below. One of
your own needs neither: defining the class, in any file, registers it.
"""

from sae_jax.sae.base import SAE, Losses, LossInputs
from sae_jax.sae.batchtopk import BatchTopK, BatchTopKConfig
from sae_jax.sae.config import SAEConfig
from sae_jax.sae.gated import Gated, GatedConfig
from sae_jax.sae.jumprelu import JumpReLU, JumpReLUConfig
from sae_jax.sae.matryoshka import Matryoshka, MatryoshkaConfig
from sae_jax.sae.registry import ARCHITECTURES, architecture, by_name, in_order
from sae_jax.sae.relu import ReLU, ReLUConfig
from sae_jax.sae.relu_l1_unit import ReLUL1Unit, ReLUL1UnitConfig
from sae_jax.sae.resolve import resolve
from sae_jax.sae.topk import TopK, TopKConfig

in_order(ReLU, ReLUL1Unit, TopK, BatchTopK, Matryoshka, JumpReLU, Gated)

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
