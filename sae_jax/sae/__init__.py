"""Architectures by name. To add one: a file with a subclass of SAE, and its line here."""

from sae_jax.config import SAEConfig, UserError, choose
from sae_jax.sae.base import SAE, resolve_fields
from sae_jax.sae.relu import ReLU
from sae_jax.sae.topk import TopK

ARCHITECTURES: dict[str, type[SAE]] = {"relu": ReLU, "topk": TopK}


def architecture(config: SAEConfig) -> type[SAE]:
    return ARCHITECTURES[choose(config.architecture, ARCHITECTURES, "sae.architecture")]


def resolve(config: SAEConfig, d_in: int) -> SAEConfig:
    """`config` with d_in and the architecture's defaults filled in, and checked.

    Raises UserError for a width other than `d_in`, a field that the architecture does not
    use, and values that contradict each other."""
    if config.d_in not in (None, d_in):
        raise UserError(
            f"sae.d_in is {config.d_in}, but the activations are {d_in} wide; leave it out, or "
            "choose another store or site"
        )
    return resolve_fields(architecture(config), config, d_in)


__all__ = ["ARCHITECTURES", "SAE", "ReLU", "TopK", "architecture", "resolve"]
