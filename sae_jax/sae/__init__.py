"""Architectures by name. To add one: a file with a subclass of SAE, and its line here."""

from sae_jax.config import SAEConfig
from sae_jax.errors import choose
from sae_jax.sae.base import SAE, Losses, LossInputs
from sae_jax.sae.batchtopk import BatchTopK
from sae_jax.sae.gated import Gated
from sae_jax.sae.jumprelu import JumpReLU
from sae_jax.sae.matryoshka import Matryoshka
from sae_jax.sae.relu import ReLU
from sae_jax.sae.relu_l1_unit import ReLUL1Unit
from sae_jax.sae.resolve import resolve_fields
from sae_jax.sae.topk import TopK

ARCHITECTURES: dict[str, type[SAE]] = {
    "relu": ReLU,
    "relu_l1_unit": ReLUL1Unit,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "matryoshka": Matryoshka,
    "jumprelu": JumpReLU,
    "gated": Gated,
}


def architecture(config: SAEConfig) -> type[SAE]:
    return ARCHITECTURES[choose(config.architecture, ARCHITECTURES, "sae.architecture")]


def resolve(
    config: SAEConfig, d_in: int | tuple[int, ...], target_width: int | None = None
) -> SAEConfig:
    """`config` with the widths and the architecture's defaults filled in, and checked.

    d_in: the width of the input site, or of each of a crosscoder's sites. target_width: of a
    transcoder's target. Raises UserError as `resolve_fields` says."""
    widths = d_in if isinstance(d_in, tuple) else (d_in,)
    return resolve_fields(architecture(config), config, widths, target_width)


__all__ = [
    "ARCHITECTURES",
    "SAE",
    "BatchTopK",
    "LossInputs",
    "Gated",
    "JumpReLU",
    "Losses",
    "Matryoshka",
    "ReLU",
    "ReLUL1Unit",
    "TopK",
    "architecture",
    "resolve",
]
