"""JumpReLU has a threshold for each latent, trained through a straight-through gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax import ops
from sae_jax.errors import UserError, choose
from sae_jax.sae.base import SAE
from sae_jax.sae.config import PenaltyConfig
from sae_jax.sae.losses import Losses, LossInputs, dictionary_means, squared_error

SPARSITY_LOSSES = ("l0", "tanh", "gemma_scope_2", "jumprelu_paper")
_PER_TOKEN = ("gemma_scope_2", "jumprelu_paper")  # penalties of a token's own L0


@dataclasses.dataclass(frozen=True)
class JumpReLUConfig(PenaltyConfig):
    """The config of a JumpReLU SAE."""

    architecture: str = "jumprelu"
    sparsity_loss: str = "l0"
    """The sparsity penalty: l0, tanh, gemma_scope_2 (also called quadratic) or jumprelu_paper. The
    last two need target_l0, which they put into the penalty; then the coefficient is not scaled."""
    sparsity_warmup_fraction: float = 0.1
    initial_threshold: float = 0.01
    """Threshold of fresh latents."""
    bandwidth: float = 0.05
    """Width of the kernel of the straight-through gradient, in units of the pre-activations."""
    gradient_to: str = "threshold"
    """What the straight-through gradient flows to: threshold, or all parameters."""
    tanh_scale: float = 4.0
    """c of the tanh penalty, tanh(c * latent * decoder norm)."""
    preactivation_coefficient: float = 0.0
    """Coefficient lambda_P of the penalty for latents that do not fire."""

    def __post_init__(self):
        super().__post_init__()
        named = choose(self.sparsity_loss, (*SPARSITY_LOSSES, "quadratic"), "sae.sparsity_loss")
        if named == "quadratic":
            object.__setattr__(self, "sparsity_loss", "gemma_scope_2")
        choose(self.gradient_to, ("threshold", "all"), "sae.gradient_to")
        self.above_zero("bandwidth", "tanh_scale")
        self.not_below_zero("initial_threshold", "preactivation_coefficient")
        if self.sparsity_loss in _PER_TOKEN and self.target_l0 is None:
            raise UserError(f"sae.sparsity_loss={named} needs sae.target_l0")

    @classmethod
    def fields_in_file(cls, fields: dict[str, Any]) -> dict[str, Any]:
        # Files never say quadratic now. Earlier versions meant the loss of the paper by it.
        old = fields.get("sparsity_loss") == "quadratic"
        return fields | {"sparsity_loss": "jumprelu_paper"} if old else fields

    @property
    def adapts_to_target_l0(self) -> bool:
        return self.target_l0 is not None and self.sparsity_loss not in _PER_TOKEN


class JumpReLU(SAE):
    """A JumpReLU SAE keeps the pre-activations z that are above their latent's threshold theta.

        z = (x - b_dec) W_enc + b_enc
        f = ReLU(z) 1[z > theta]
        L = E[ ||y - y_hat||^2 + S ]

    `sparsity_loss` chooses the penalty S:

    l0              lambda ||f||_0 (Rajamanoharan et al. 2024, arXiv:2407.14435, eq. 9; Gemma
                    Scope)
    gemma_scope_2   lambda (2 / target_l0) (||f||_0 - target_l0)^2 (Gemma Scope 2's technical
                    paper, eq. 5; SAELens' "quadratic", by which name it can be chosen too)
    jumprelu_paper  lambda (||f||_0 / target_l0 - 1)^2 (the loss for a target L0 of Rajamanoharan
                    et al. 2024)
    tanh            lambda sum_i tanh(c f_i ||W_dec,i||) (Circuits Updates, January 2025)

    With any of them there is lambda_P sum_i ReLU(theta_i - z_i) ||W_dec,i|| too, for latents that
    do not fire, where lambda_P = `preactivation_coefficient` is not 0 (the same update).

    A step has no gradient. The straight-through gradient puts a rectangle of width epsilon =
    `bandwidth` in its place, with K(u) = 1 for |u| < 1/2, else 0 (eqs. 11 and 12):

        d f / d theta = -theta / epsilon K((z - theta) / epsilon)
        d 1[z > theta] / d theta = -1 / epsilon K((z - theta) / epsilon)

    With `gradient_to=threshold` (DeepMind) it flows to theta only. With `all` (Anthropic) its
    negative flows to z as well.

    theta is trained itself, in float32, and kept at 0 or above; Anthropic trains its logarithm.
    Others' thresholds may be below 0, and stand for 0 then: no latent is below 0.
    """

    Config = JumpReLUConfig
    PER_LATENT_SCALED = ("b_enc", "threshold")

    def activate(self, preactivations: jax.Array) -> jax.Array:
        return _where_above(preactivations, self.threshold[...], preactivations)

    @classmethod
    def fresh_latent(cls, config: JumpReLUConfig) -> dict[str, float]:
        return {"b_enc": 0.0, "threshold": config.initial_threshold}

    def training_loss(self, x: jax.Array, y: jax.Array, inputs: LossInputs) -> Losses:
        config = self.config
        x_in, bias = self.encoder_input(x)
        norms = self.decoder_norms()
        per_latent = {"b_enc": bias, "threshold": self.threshold[...], "norm": norms}
        acts = functools.partial(_acts, config=config)
        out = ops.dense_autoencode(
            functools.partial(_activate, config=config),
            x_in,
            self.w_enc[...],
            per_latent,
            self.w_dec[...],
            self.dtype,
            # The penalty for latents that do not fire is one for nearly all of them.
            support=None if config.preactivation_coefficient else acts,
        )
        y_hat = self.output(out.decoded[0], x)
        mse = squared_error(y, y_hat)
        means = dictionary_means(out.latent_sums, {"l1": norms}, x.shape[0])
        if config.sparsity_loss in _PER_TOKEN:
            sparsity = jnp.mean(jnp.square(out.token_sums["l0"] / config.target_l0 - 1))
            if config.sparsity_loss == "gemma_scope_2":
                sparsity *= 2 * config.target_l0
        else:
            sparsity = means["sparsity"]
        total = mse + inputs.coefficient * sparsity
        if config.preactivation_coefficient:
            total += config.preactivation_coefficient * means["below"]
        return Losses(
            total=total + self.auxiliary_loss(x_in, bias, y - y_hat, inputs.dead),
            mse=mse,
            l0=means["fired"],
            l1=means["l1"],
            fired=out.latent_sums["fired"] > 0,
        )

    @classmethod
    def learning_rate(cls, d_sae: int) -> float:
        return 2e-4


def _acts(product, per_latent, config: JumpReLUConfig) -> jax.Array:
    """Returns where a latent fires, is in the kernel's window, or is not a number."""
    z, theta = product + per_latent["b_enc"], per_latent["threshold"]
    in_window = _rectangle((z - theta) / config.bandwidth) > 0
    return in_window | ~(z <= jnp.maximum(theta, 0))


def _activate(product, per_latent, config: JumpReLUConfig) -> ops.Activated:
    z, theta, norm = product + per_latent["b_enc"], per_latent["threshold"], per_latent["norm"]
    to_all = config.gradient_to == "all"
    latents = jump_relu(z, theta, config.bandwidth, to_all)
    fired = (latents > 0).astype(jnp.float32)
    sums = {"l1": latents.sum(axis=0), "fired": fired.sum(axis=0)}
    token_sums = {}
    if config.sparsity_loss == "tanh":
        sums["sparsity"] = jnp.tanh(config.tanh_scale * latents * norm).sum(axis=0)
    else:
        above = step(z, theta, config.bandwidth, to_all)
        if config.sparsity_loss == "l0":
            sums["sparsity"] = above.sum(axis=0)
        else:
            token_sums["l0"] = above.sum(axis=1)
    if config.preactivation_coefficient:
        sums["below"] = (jax.nn.relu(theta - z) * norm).sum(axis=0)
    return ops.Activated((latents,), sums, token_sums)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def jump_relu(z, theta, bandwidth: float, to_all: bool):
    """Returns ReLU(z) 1[z > theta], with the straight-through gradient that `JumpReLU` describes.

    Args:
      z: (..., d_sae) pre-activations.
      theta: (d_sae,) thresholds.
      bandwidth: the width epsilon of the rectangle.
      to_all: whether the straight-through gradient flows to z too and not only to theta.
    """
    return _where_above(z, theta, z)


@jump_relu.defjvp
def _jump_relu_jvp(bandwidth, to_all, primals, tangents):
    (z, theta), (d_z, d_theta) = primals, tangents
    through = theta / bandwidth * _rectangle((z - theta) / bandwidth)
    out = _where_above(z, theta, d_z) - through * d_theta
    return jump_relu(z, theta, bandwidth, to_all), out + through * d_z if to_all else out


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def step(z, theta, bandwidth: float, to_all: bool):
    """Returns 1[f > 0] for the latents f, with the straight-through gradient of 1[z > theta].

    `JumpReLU` describes the gradient. The arguments are those of `jump_relu`.
    """
    return (z > jnp.maximum(theta, 0)).astype(z.dtype)


@step.defjvp
def _step_jvp(bandwidth, to_all, primals, tangents):
    (z, theta), (d_z, d_theta) = primals, tangents
    through = _rectangle((z - theta) / bandwidth) / bandwidth
    out = -through * d_theta
    return step(z, theta, bandwidth, to_all), out + through * d_z if to_all else out


def _where_above(z, theta, values):
    """Returns `values` where z is above its threshold and above 0, and 0 elsewhere."""
    return jnp.where(z > jnp.maximum(theta, 0), values, 0.0)


def _rectangle(u):
    return (jnp.abs(u) < 0.5).astype(u.dtype)
