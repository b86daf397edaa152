"""ReLU with the L1 penalty weighted by decoder norms (Conerly et al., April 2024)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sae_jax import ops
from sae_jax.errors import UserError
from sae_jax.sae.base import SAE
from sae_jax.sae.config import PenaltyConfig
from sae_jax.sae.losses import Losses, LossInputs, dictionary_means, squared_error

_SMALL = 1e-3  # added to latents before a power below 1, whose slope at 0 is infinite


@dataclasses.dataclass(frozen=True)
class ReLUConfig(PenaltyConfig):
    """The config of a ReLU SAE."""

    architecture: str = "relu"
    sparsity_coefficient: float = 5.0
    unit_norm_decoder: bool = False
    decoder_init_norm: float = 0.1
    p_end: float = 1.0
    """Exponent of the penalty at the end of training. Below 1 the exponent is annealed to it
    linearly from 1."""
    p_anneal_start: float = 0.2
    """Part of all steps after which the annealing of the exponent starts."""

    shifts_inputs = False

    def __post_init__(self):
        super().__post_init__()
        self.above_zero("p_end")
        self.fractions("p_anneal_start")
        if self.p_end > 1:
            raise UserError(f"sae.p_end must be above 0 and at most 1, not {self.p_end}")


class ReLU(SAE):
    """A ReLU SAE has an L1 penalty that is weighted by the decoder's norms, which are free.

        f = ReLU(x W_enc + b_enc)
        L = E[ ||y - y_hat||^2 + lambda sum_i f_i ||W_dec,i|| ]

    Source: "Update on how we train SAEs" (Circuits Updates, April 2024), the recipe of
    Scaling Monosemanticity (Templeton et al. 2024): lambda 5 with E||x||^2 = d, linear from 0
    over the first 5% of steps; gradient clipped to norm 1; lr linear to 0 over the last 20%.

    With p_end below 1 the penalty is sum_i (f_i ||W_dec,i||)^p, p annealed linearly from 1 to
    p_end, and lambda changes with p so that lambda times the penalty does not jump (Karvonen et
    al. 2024, "Measuring progress in dictionary learning", section 4.2).
    """

    Config = ReLUConfig

    def activate(self, preactivations: jax.Array) -> jax.Array:
        return jax.nn.relu(preactivations)

    def training_loss(self, x: jax.Array, y: jax.Array, inputs: LossInputs) -> Losses:
        x_in, bias = self.encoder_input(x)
        anneals = self.config.p_end < 1
        per_latent, norms = {"b_enc": bias}, self.decoder_norms()
        if anneals:  # scalars that blocks of the dictionary share
            ones = jnp.ones_like(bias)
            per_latent |= {"norm": norms, "p": inputs.p * ones, "next_p": inputs.next_p * ones}
        out = ops.dense_autoencode(
            functools.partial(_activate, anneals=anneals),
            x_in,
            self.w_enc[...],
            per_latent,
            self.w_dec[...],
            self.dtype,
            self.dtype,
            support=_acts,
        )
        y_hat = self.output(out.decoded[0], x)
        mse = squared_error(y, y_hat)
        means = dictionary_means(out.latent_sums, {"l1": norms}, x.shape[0])
        penalty, change = means["l1"], 0.0
        if anneals:
            penalty = means["penalty"]
            change = jax.lax.stop_gradient(jnp.log(penalty) - jnp.log(means["next_penalty"]))
            change = jnp.where(jnp.isfinite(change), change, 0.0)  # nothing fires: nothing to do
        auxiliary = self.auxiliary_loss(x_in, bias, y - y_hat, inputs.dead)
        return Losses(
            total=mse + inputs.coefficient * penalty + auxiliary,
            mse=mse,
            l0=means["fired"],
            l1=means["l1"],
            fired=out.latent_sums["fired"] > 0,
            log_coefficient=change,
        )

    def row_penalties(self, latents: jax.Array) -> jax.Array:
        return jnp.sum(latents * self.decoder_norms(), axis=1)

    @classmethod
    def learning_rate(cls, d_sae: int) -> float:
        return 5e-5


def _acts(product, per_latent) -> jax.Array:
    """Returns where a latent is above 0, or not a number."""
    return ~(product + per_latent["b_enc"] <= 0)


def _activate(product, per_latent, anneals: bool) -> ops.Activated:
    latents = jax.nn.relu(product + per_latent["b_enc"])
    fired = (latents > 0).astype(jnp.float32)
    sums = {"l1": latents.sum(axis=0), "fired": fired.sum(axis=0)}
    if anneals:
        lengths = latents * per_latent["norm"]
        for name, p in (("penalty", "p"), ("next_penalty", "next_p")):
            exponent = per_latent[p]
            powers = (lengths + _SMALL) ** exponent - _SMALL**exponent
            sums[name] = powers.sum(axis=0)
    return ops.Activated((latents,), sums, {})
