"""Gated SAEs decide apart which latents fire and how strongly (Rajamanoharan et al. 2024)."""

import dataclasses

import jax
import jax.numpy as jnp

from sae_jax import ops
from sae_jax.errors import UserError
from sae_jax.sae.base import SAE
from sae_jax.sae.config import PenaltyConfig
from sae_jax.sae.losses import Losses, LossInputs, dictionary_means, squared_error


@dataclasses.dataclass(frozen=True)
class GatedConfig(PenaltyConfig):
    """The config of a Gated SAE."""

    architecture: str = "gated"
    b_dec_init: str = "geometric_median"

    def __post_init__(self):
        super().__post_init__()
        if not self.unit_norm_decoder:
            raise UserError(
                "sae.unit_norm_decoder=false lets a gated SAE's gates shrink for free; leave it out"
            )


class Gated(SAE):
    """A gated SAE decides by pi which latents fire, and by another bias and gain how strongly.

        pi = (x - b_dec) W_enc + b_enc
        f = 1[pi > 0] ReLU(exp(r_mag) (x - b_dec) W_enc + b_mag)
        L = E[ ||y - y_hat||^2 + lambda sum_i ReLU(pi_i) ||W_dec,i||
               + ||y - y_hat(ReLU(pi))||^2 ]

    In the last term the decoder is held fixed.

    Source: "Improving dictionary learning with gated sparse autoencoders" (arXiv:2404.16014),
    eqs. 5 to 8, where the decoder has unit norms. The gates get their gradient from the last two
    terms only; b_enc is the paper's b_gate and W_enc its W_gate.
    """

    Config = GatedConfig
    PER_LATENT_SCALED = ("b_enc", "b_mag")

    def activate(self, preactivations: jax.Array) -> jax.Array:
        magnitude = jnp.exp(self.r_mag[...]) * (preactivations - self.b_enc[...]) + self.b_mag[...]
        return jnp.where(preactivations > 0, jax.nn.relu(magnitude), 0.0)

    @classmethod
    def fresh_latent(cls, config: GatedConfig) -> dict[str, float]:
        return {"b_enc": 0.0, "b_mag": 0.0, "r_mag": 0.0}

    def training_loss(self, x: jax.Array, y: jax.Array, inputs: LossInputs) -> Losses:
        x_in, bias = self.encoder_input(x)
        # b_mag follows the shift of the inputs as b_enc does, scaled as the product is.
        shift = bias - self.b_enc[...]
        per_latent = {
            "b_enc": bias,
            "b_mag": self.b_mag[...] + jnp.exp(self.r_mag[...]) * shift,
            "r_mag": self.r_mag[...],
        }
        out = ops.dense_autoencode(
            _activate,
            x_in,
            self.w_enc[...],
            per_latent,
            self.w_dec[...],
            self.dtype,
            support=_acts,
        )
        y_hat = self.output(out.decoded[0], x)
        held = jax.lax.stop_gradient
        gate_y_hat = out.decoded[1] + held(self.output(jnp.zeros_like(y), x))
        mse = squared_error(y, y_hat)
        weights = dict.fromkeys(("l1", "gate_l1"), self.decoder_norms())
        means = dictionary_means(out.latent_sums, weights, x.shape[0])
        auxiliary = self.auxiliary_loss(x_in, bias, y - y_hat, inputs.dead)
        return Losses(
            total=mse
            + inputs.coefficient * means["gate_l1"]
            + squared_error(y, gate_y_hat)
            + auxiliary,
            mse=mse,
            l0=means["fired"],
            l1=means["l1"],
            fired=out.latent_sums["fired"] > 0,
        )

    @classmethod
    def learning_rate(cls, d_sae: int) -> float:
        return 3e-4

    @classmethod
    def flops_per_token(cls, config: GatedConfig) -> int:
        # The auxiliary reconstruction: forward, and the gradient of its latents.
        return super().flops_per_token(config) + 4 * config.d_out * config.d_sae


def _acts(product, per_latent) -> jax.Array:
    """Returns where a gate is open, or not a number."""
    return ~(product + per_latent["b_enc"] <= 0)


def _activate(product, per_latent) -> ops.Activated:
    gate = product + per_latent["b_enc"]
    magnitude = jnp.exp(per_latent["r_mag"]) * product + per_latent["b_mag"]
    latents = jnp.where(gate > 0, jax.nn.relu(magnitude), 0.0)
    open_gate = jax.nn.relu(gate)
    sums = {
        "l1": latents.sum(axis=0),
        "gate_l1": open_gate.sum(axis=0),
        "fired": (latents > 0).astype(jnp.float32).sum(axis=0),
    }
    return ops.Activated((latents, open_gate), sums, {})
