"""ReLU with the L1 penalty weighted by decoder norms (Conerly et al., April 2024)."""

import jax
import jax.numpy as jnp

from sae_jax import ops
from sae_jax.config import SAEConfig, UserError
from sae_jax.sae.base import SAE, Losses, squared_error


class ReLU(SAE):
    """f = ReLU(x W_enc + b_enc), no pre-encoder bias, decoder norms free;
    L = E[ ||x - x_hat||^2 + lambda sum_i f_i ||W_dec,i|| ].

    Source: "Update on how we train SAEs" (Circuits Updates, April 2024), the recipe of
    Scaling Monosemanticity (Templeton et al. 2024): lambda 5 with E||x||^2 = d, linear from 0
    over the first 5% of steps; gradient clipped to norm 1; lr linear to 0 over the last 20%.
    """

    DEFAULTS = {
        "sparsity_coefficient": 5.0,
        "sparsity_warmup_fraction": 0.05,
        "unit_norm_decoder": False,
        "decoder_init_norm": 0.1,
        "b_dec_init": "zero",
    }

    def activate(self, preactivations: jax.Array) -> jax.Array:
        return jax.nn.relu(preactivations)

    def loss(self, x: jax.Array, dead: jax.Array, coefficient: jax.Array) -> Losses:
        dtype = jnp.dtype(self.config.compute_dtype)
        weights = (self.w_enc[...], self.b_enc[...], self.w_dec[...])
        decoded, sums, fired_on = ops.relu_autoencode(x, *weights, dtype)
        mse = squared_error(x, decoded + self.b_dec[...])
        norms = jnp.linalg.norm(self.w_dec[...], axis=1)
        l1 = jnp.sum(sums * norms) / x.shape[0]
        l0 = jnp.sum(fired_on) / x.shape[0]
        return Losses(mse + coefficient * l1, mse, l0, l1, fired=fired_on > 0)

    @classmethod
    def learning_rate(cls, d_sae: int) -> float:
        return 5e-5

    @classmethod
    def flops_per_token(cls, config: SAEConfig) -> int:
        # Encoder forward and weight gradient; decoder forward and both gradients. The inputs
        # are data, so the encoder has no input gradient.
        return 10 * config.d_in * config.d_sae

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        if config.sparsity_coefficient < 0:
            raise UserError(
                f"sae.sparsity_coefficient must be 0 or more, not {config.sparsity_coefficient}"
            )
        if not 0 <= config.sparsity_warmup_fraction <= 1:
            raise UserError(
                "sae.sparsity_warmup_fraction is a part of all steps, from 0 to 1, not "
                f"{config.sparsity_warmup_fraction}"
            )
