"""Matryoshka has nested dictionaries that each reconstruct (Bussmann, Nabeshima et al. 2025)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax import ops
from sae_jax.errors import UserError
from sae_jax.sae.batchtopk import BatchTopK
from sae_jax.sae.config import KConfig

_ENDS = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)  # of d_sae: each group twice the one before


@dataclasses.dataclass(frozen=True)
class MatryoshkaConfig(KConfig):
    """The config of a Matryoshka SAE."""

    architecture: str = "matryoshka"
    prefix_widths: tuple[int, ...] | None = None
    """Growing numbers of latents that each reconstruct by themselves; the last is d_sae. None: in
    parts of d_sae 1/32, 3/32, 7/32, 15/32 and 1."""

    def __post_init__(self):
        super().__post_init__()
        if self.prefix_widths is None:
            return
        widths = self.prefix_widths
        growing = all(a < b for a, b in zip(widths, widths[1:], strict=False))
        if not growing or widths[:1] < (1,) or widths[-1:] != (self.d_sae,):
            raise UserError(
                f"sae.prefix_widths must grow and end at sae.d_sae, {self.d_sae}, not "
                f"{','.join(map(str, widths))}"
            )

    def derived(self) -> dict[str, Any]:
        widths = tuple(sorted({max(1, round(end * self.d_sae)) for end in _ENDS}))
        return super().derived() | {"prefix_widths": widths}


class Matryoshka(BatchTopK):
    """A Matryoshka SAE is a BatchTopK SAE whose first m latents must reconstruct by themselves.

    Its loss is the mean, over the numbers m in `prefix_widths`, of
    E[ ||y - y_hat from the first m latents||^2 ], plus the `auxiliary_loss` of the whole
    dictionary.

    Source: "Learning multi-level features with Matryoshka sparse autoencoders"
    (arXiv:2503.17547), section 3, whose widths are sums of parts 1/32, 1/16, 1/8, 1/4 and the
    rest. Latents are decoded once: each prefix is the one before it and a group of its own.
    """

    Config = MatryoshkaConfig

    def reconstructions(self, latents: jax.Array, x: jax.Array) -> jax.Array:
        """Returns the reconstruction of each prefix, (prefixes, B, d_out), from latents (B, d_sae).

        x (B, d_in) are the inputs, which a skip transcoder's skip reads.
        """
        ends = self.config.prefix_widths
        groups = ops.decode_groups(latents, self.w_dec[...], ends, self.dtype)
        return self.output(jnp.cumsum(groups, axis=0), x)
