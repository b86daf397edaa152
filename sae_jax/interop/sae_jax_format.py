"""Makes sae_jax's own exchange format (`sae.files`) one of the formats of this package."""

from collections.abc import Iterator, Mapping

from sae_jax.sae import ARCHITECTURES
from sae_jax.sae.config import KINDS
from sae_jax.sae.files import read, read_provenance, recognises, write


class _Everything(Mapping):
    """Maps every (architecture, kind) to "sae_jax", those of a user's own architectures too."""

    def __getitem__(self, what: tuple[str, str]) -> str:
        architecture, kind = what
        if architecture not in ARCHITECTURES or kind not in KINDS:
            raise KeyError(what)
        return "sae_jax"

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter((name, kind) for name in ARCHITECTURES for kind in KINDS)

    def __len__(self) -> int:
        return len(ARCHITECTURES) * len(KINDS)


EXPRESSES = _Everything()
WHY_NOT = ""
USAGE = """import numpy as np
import sae_jax

sae = sae_jax.load(path)
x = np.random.randn(4, $d_in).astype(np.float32)  # stands for activations at $site
latents = sae.encode(x)
x_hat = sae(x)
"""
FILES = ("sae.json", "sae.safetensors")

__all__ = [
    "EXPRESSES",
    "FILES",
    "USAGE",
    "WHY_NOT",
    "read",
    "read_provenance",
    "recognises",
    "write",
]
