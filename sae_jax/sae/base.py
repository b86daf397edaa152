"""The contract that every architecture obeys: one module, one loss, one way to fold."""

import abc
import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sae_jax.config import SAEConfig, UserError, choose
from sae_jax.ops.mesh import DECODER, PER_LATENT, out_sharding, product


class Losses(NamedTuple):
    """What one training step needs of a batch. Scalars are means over the batch's tokens, in
    the SAE's own units (E||x||^2 = d_in after normalisation)."""

    total: jax.Array  # what is differentiated
    mse: jax.Array  # ||x - x_hat||^2, summed over d
    l0: jax.Array  # latents above zero
    l1: jax.Array  # sum of latent * decoder norm
    fired: jax.Array  # (d_sae,) bool: fired on any token


class SAE(nnx.Module):
    """A sparse autoencoder: latents = f(scale * x @ w_enc + b_enc) (with scale * x - b_dec for
    scale * x where `apply_b_dec_to_input`), x_hat = (latents @ w_dec + b_dec) / scale.

    Parameters (float32): w_enc (d_in, d_sae), w_dec (d_sae, d_in), b_enc (d_sae,),
    b_dec (d_in,). `scale` is the normalisation of the inputs that training used.

    An architecture gives `DEFAULTS` (the SAEConfig fields that it uses, with their defaults),
    the abstract methods, and whatever else of this it does otherwise.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: SAEConfig, parameters: dict[str, jax.Array], scale: float = 1.0):
        self.config = config
        self.scale = scale
        for name, value in parameters.items():
            setattr(self, name, nnx.Param(value))

    # ----------------------------------------------------------------- use

    def encode(self, x: jax.Array) -> jax.Array:
        """Latents (..., d_sae) of activations x (..., d_in) in the model's own units."""
        return self.activate(self.preactivations(x))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Reconstruction (..., d_in), in the model's own units, of latents (..., d_sae)."""
        return (product(latents, self.w_dec[...]) + self.b_dec[...]) / self.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decode(self.encode(x))

    def preactivations(self, x: jax.Array) -> jax.Array:
        x = self._scaled(x)
        shift = self._input_shift()
        x = x if shift is None else x - shift
        return product(x, self.w_enc[...]) + self.b_enc[...]

    def _scaled(self, x: jax.Array) -> jax.Array:
        if x.shape[-1] != self.config.d_in:
            raise UserError(
                f"activations of width {x.shape[-1]} given to an SAE with d_in {self.config.d_in}"
            )
        return x * self.scale

    def _input_shift(self) -> jax.Array | None:
        """What is subtracted from scaled activations before the encoder's product."""
        return self.b_dec[...] if self.config.apply_b_dec_to_input else None

    @abc.abstractmethod
    def activate(self, preactivations: jax.Array) -> jax.Array:
        """Latents (..., d_sae) of pre-activations."""

    def fold(self) -> "SAE":
        """The same function with scale 1 and unit decoder rows: latents are then in the
        model's units, latent * decoder norm of this SAE. Valid where `activate` commutes with
        a positive rescaling of each latent."""
        norms = jnp.linalg.norm(self.w_dec[...], axis=1)
        safe = jnp.where(norms > 0, norms, 1.0)  # a latent without a direction stays as it is
        return type(self)(
            self.config,
            {
                "w_enc": self.w_enc[...] * safe,
                "b_enc": self.b_enc[...] * safe / self.scale,
                "w_dec": self.w_dec[...] / safe[:, None],
                "b_dec": self.b_dec[...] / self.scale,
            },
        )

    # ------------------------------------------------------------- training

    @classmethod
    def init_parameters(
        cls, key: jax.Array, config: SAEConfig, b_dec: jax.Array
    ) -> dict[str, jax.Array]:
        """Fresh parameters by name, sharded from the start where there is a mesh.

        Decoder rows in random directions, of norm 1 or `decoder_init_norm`; w_enc = w_dec.T;
        b_enc = 0 (Conerly et al. 2024). b_dec (d_in,) is in the SAE's own units.
        """
        shape = (config.d_sae, config.d_in)
        w_dec = jax.random.normal(key, shape, out_sharding=out_sharding(DECODER))
        norm = 1.0 if config.unit_norm_decoder else config.decoder_init_norm
        w_dec *= norm / jnp.linalg.norm(w_dec, axis=1, keepdims=True)
        return {
            "w_enc": w_dec.T,
            "b_enc": jnp.zeros(config.d_sae, out_sharding=out_sharding(PER_LATENT)),
            "w_dec": w_dec,
            "b_dec": b_dec,
        }

    @abc.abstractmethod
    def loss(self, x: jax.Array, dead: jax.Array, coefficient: jax.Array) -> Losses:
        """Losses of scaled activations x (B, d_in), given which latents are dead (d_sae,) and
        the sparsity coefficient of this step."""

    @classmethod
    @abc.abstractmethod
    def learning_rate(cls, d_sae: int) -> float:
        """The default peak learning rate for a dictionary of this size."""

    @classmethod
    @abc.abstractmethod
    def flops_per_token(cls, config: SAEConfig) -> int:
        """Floating-point operations that a training step executes for each token (a multiply
        and an add are two), without the optimiser's."""

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        """Raises UserError where resolved fields contradict each other."""

    def parameters(self) -> dict[str, jax.Array]:
        """The parameters as plain arrays by name."""
        params = {name: v for name, v in vars(self).items() if isinstance(v, nnx.Param)}
        return {name: value[...] for name, value in params.items()}


def squared_error(x: jax.Array, x_hat: jax.Array) -> jax.Array:
    """Mean over the batch of ||x - x_hat||^2."""
    return jnp.mean(jnp.sum(jnp.square(x - x_hat), axis=-1))


def resolve_fields(cls: type[SAE], config: SAEConfig, d_in: int) -> SAEConfig:
    """Fills the fields left at None; refuses those that `cls` does not use."""
    always = {f.name for f in dataclasses.fields(SAEConfig) if f.default is not None}
    changes: dict[str, Any] = {"d_in": d_in}
    for field in dataclasses.fields(SAEConfig):
        name, value = field.name, getattr(config, field.name)
        if name in always or name == "d_in":
            continue
        if name not in cls.DEFAULTS:
            if value is not None:
                raise UserError(
                    f"sae.{name} is set to {value!r}, but the architecture {config.architecture} "
                    f"has no such setting; it has: {', '.join(cls.DEFAULTS)}"
                )
        elif value is None:
            default = cls.DEFAULTS[name]
            changes[name] = default(d_in) if callable(default) else default
    resolved = dataclasses.replace(config, **changes)
    _check_common(resolved)
    cls.check(resolved)
    return resolved


def _check_common(config: SAEConfig) -> None:
    choose(config.normalize, ("sqrt_d", "none"), "sae.normalize")
    choose(config.compute_dtype, ("float32", "bfloat16"), "sae.compute_dtype")
    choose(config.b_dec_init, ("geometric_median", "mean", "zero"), "sae.b_dec_init")
    for name in ("d_sae", "d_in", "dead_after_tokens", "decoder_init_norm"):
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"sae.{name} must be above 0, not {value}")
