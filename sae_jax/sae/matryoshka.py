"""Matryoshka: nested dictionaries that each reconstruct (Bussmann, Nabeshima et al. 2025)."""

import jax
import jax.numpy as jnp

from sae_jax import ops
from sae_jax.config import SAEConfig
from sae_jax.errors import UserError
from sae_jax.sae.batchtopk import BatchTopK

_ENDS = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)  # of d_sae: each group twice the one before


def _default_widths(config: SAEConfig) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(end * config.d_sae)) for end in _ENDS}))


class Matryoshka(BatchTopK):
    """BatchTopK, with L = mean over the prefixes m of `prefix_widths` of
    E[ ||y - y_hat from the first m latents||^2 ], + `auxiliary_loss` of the whole.

    Source: "Learning multi-level features with Matryoshka sparse autoencoders"
    (arXiv:2503.17547), section 3, whose widths are sums of parts 1/32, 1/16, 1/8, 1/4 and the
    rest. One decoding gives all prefixes, since each is the one before and its own group.
    """

    DEFAULTS = BatchTopK.DEFAULTS | {"prefix_widths": _default_widths}

    def reconstructions(self, latents: jax.Array, x: jax.Array) -> jax.Array:
        """(prefixes, B, d_out)."""
        ends = self.config.prefix_widths
        groups = ops.decode_groups(latents, self.w_dec[...], ends, self.dtype)
        return self.output(jnp.cumsum(groups, axis=0), x)

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        widths = config.prefix_widths
        growing = all(a < b for a, b in zip(widths, widths[1:], strict=False))
        if not growing or widths[:1] < (1,) or widths[-1:] != (config.d_sae,):
            raise UserError(
                f"sae.prefix_widths must grow and end at sae.d_sae, {config.d_sae}, not "
                f"{','.join(map(str, widths))}"
            )
