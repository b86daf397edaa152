"""The contract that every architecture obeys: one module, one loss, one way to fold."""

import abc
import dataclasses
import itertools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sae_jax import ops
from sae_jax.config import SAEConfig
from sae_jax.errors import UserError
from sae_jax.ops.sharding import (
    BATCH,
    DECODER,
    PER_LATENT,
    branch,
    in_any_run,
    matmul_f32,
    out_sharding,
)

_AUXILIARY_SLOPE = 0.1
_ROUNDING = 1e-6  # of a norm in float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossInputs:
    """What a step decides and a loss is given."""

    dead: jax.Array  # (d_sae,) bool: latents that have not fired for `dead_after_tokens`
    coefficient: jax.Array | float = 0.0  # of sparsity, at this step
    k: jax.Array | int | None = None  # latents a token, at this step; None: config.k
    p: jax.Array | float = 1.0  # exponent of the L1 family's penalty, at this step
    next_p: jax.Array | float = 1.0  # and at the next
    # False: latents as the SAE gives them after training, when there is no batch.
    training: bool = dataclasses.field(default=True, metadata={"static": True})


class Losses(NamedTuple):
    """What one training step needs of a batch. Scalars are means over the batch's tokens, in
    the SAE's own units (those of the activations times `scale`)."""

    total: jax.Array  # what is differentiated
    mse: jax.Array  # ||y - y_hat||^2, summed over d_out
    l0: jax.Array  # latents above zero
    l1: jax.Array  # sum of latent * decoder norm
    fired: jax.Array  # (d_sae,) bool: fired on any token
    running: dict[str, jax.Array] = {}  # a batch's values of parameters that are running means
    log_coefficient: jax.Array | float = 0.0  # what ln(sparsity coefficient) is to change by


class SAE(nnx.Module):
    """A sparse autoencoder, transcoder or crosscoder:

        latents = f((scale * x - b_dec) @ w_enc + b_enc)     - b_dec: `apply_b_dec_to_input`
        y_hat = (latents @ w_dec + b_dec) / target_scale

    `config.kind` says what x and y are. An autoencoder's y is x. A transcoder's y is another
    site's activation, such as an MLP's output given its input; a skip transcoder adds an affine
    skip, scale * x @ w_skip (Paulo et al. 2025). A crosscoder's x and y are the activations of
    several sites side by side, so that sites share latents and each has its columns of w_enc and
    w_dec (Lindsey et al. 2024).

    Parameters (float32): w_enc (d_in, d_sae), w_dec (d_sae, d_out), b_enc (d_sae,),
    b_dec (d_out,), w_skip (d_in, d_out), and what an architecture adds. `scale` and
    `target_scale` are the normalisation of the inputs and targets that training used: numbers,
    or for a crosscoder (d_in,) arrays that hold one number for each site.

    An architecture gives `DEFAULTS` (the SAEConfig fields that it uses, with their defaults),
    the abstract methods, and whatever else of this it does otherwise.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {}
    PER_LATENT_SCALED: ClassVar[tuple[str, ...]] = ("b_enc",)  # grow with the latent's unit
    RUNNING_MEANS: ClassVar[tuple[str, ...]] = ()  # parameters that are not trained

    def __init__(
        self,
        config: SAEConfig,
        parameters: dict[str, jax.Array],
        scale: float | jax.Array = 1.0,
        target_scale: float | jax.Array | None = None,
    ):
        self.config = config
        self.scale = _static_or_data(scale)
        self.target_scale = self.scale if target_scale is None else _static_or_data(target_scale)
        for name, value in parameters.items():
            setattr(self, name, nnx.Param(value))

    # ----------------------------------------------------------------- use

    def encode(self, x: jax.Array) -> jax.Array:
        """Latents (..., d_sae) of activations x (..., d_in) in the model's own units."""
        return self.activate(self.preactivations(x))

    def decode(self, latents: jax.Array, x: jax.Array | None = None) -> jax.Array:
        """Reconstruction (..., d_out), in the model's own units, of latents (..., d_sae). A skip
        transcoder needs the x (..., d_in) that it encoded."""
        y_hat = matmul_f32(latents, self.w_dec[...]) + self.b_dec[...]
        if self.config.kind == "skip_transcoder":
            if x is None:
                raise UserError("a skip transcoder decodes from x too: decode(latents, x)")
            y_hat += matmul_f32(self._scaled(x), self.w_skip[...])
        return y_hat / self.target_scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decode(self.encode(x), x)

    def split(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Inputs x (..., d_in) and targets y (..., d_out) of rows as a stream gives them: the
        columns of all sites side by side, a transcoder's target last."""
        if self.config.kind in ("transcoder", "skip_transcoder"):
            return rows[..., : self.config.d_in], rows[..., self.config.d_in :]
        return rows, rows

    def preactivations(self, x: jax.Array) -> jax.Array:
        x = self._scaled(x)
        if self.config.apply_b_dec_to_input:
            x = x - self.b_dec[...]
        return matmul_f32(x, self.w_enc[...]) + self.b_enc[...]

    def _scaled(self, x: jax.Array) -> jax.Array:
        if x.shape[-1] != self.config.d_in:
            raise UserError(
                f"activations of width {x.shape[-1]} given to an SAE with d_in {self.config.d_in}"
            )
        return x * self.scale

    @abc.abstractmethod
    def activate(self, preactivations: jax.Array) -> jax.Array:
        """Latents (..., d_sae) of pre-activations."""

    def fold(self) -> "SAE":
        """The same function with scales 1 and decoder rows of norm 1: latents are then in the
        model's units, latent * decoder norm of this SAE. Valid where `activate` commutes with
        a positive rescaling of each latent, given the parameters in `PER_LATENT_SCALED`."""
        return self._rescaled(self._row_norms())

    def _row_norms(self) -> jax.Array:
        """(d_sae,): of the decoder's rows in the model's units; 1 where they are 0, or 1 but for
        rounding, so that folding what is folded changes no bit."""
        norms = jnp.linalg.norm(self.w_dec[...] / self.target_scale, axis=1)
        return jnp.where((norms > 0) & (jnp.abs(norms - 1) > _ROUNDING), norms, 1.0)

    def _rescaled(self, factor: jax.Array) -> "SAE":
        """The same function with scales 1 and every latent times `factor`, () or (d_sae,)."""
        parameters = self.parameters()
        scale, target_scale = (jnp.asarray(s) for s in (self.scale, self.target_scale))
        factor = jnp.broadcast_to(factor, self.b_enc.shape)
        columns = scale[:, None] if scale.ndim else scale
        changed = {
            "w_enc": parameters["w_enc"] * columns * factor,
            "w_dec": parameters["w_dec"] / target_scale / factor[:, None],
            "b_dec": parameters["b_dec"] / target_scale,
            **{name: parameters[name] * factor for name in self.PER_LATENT_SCALED},
        }
        if "w_skip" in parameters:
            changed["w_skip"] = parameters["w_skip"] * columns / target_scale
        return type(self)(self.config, parameters | changed)

    # ------------------------------------------------------------- training

    @classmethod
    def init_parameters(
        cls, key: jax.Array, config: SAEConfig, b_dec: jax.Array
    ) -> dict[str, jax.Array]:
        """Fresh parameters by name, sharded from the start where there is a mesh.

        Decoder rows in random directions, of norm 1 or `decoder_init_norm`; w_enc = w_dec.T
        (Conerly et al. 2024), but a transcoder's w_enc has random directions of its own, since it
        reads another space; b_enc = 0; w_skip = 0. b_dec (d_out,) is in the SAE's own units.
        """
        key_dec, key_enc = jax.random.split(key)
        norm = 1.0 if config.unit_norm_decoder else config.decoder_init_norm
        w_dec = norm * _directions(key_dec, config.d_sae, config.d_out)
        tied = config.kind in ("autoencoder", "crosscoder")
        w_enc = w_dec if tied else norm * _directions(key_enc, config.d_sae, config.d_in)
        parameters = {"w_enc": w_enc.T, "w_dec": w_dec, "b_dec": b_dec}
        if config.kind == "skip_transcoder":
            parameters["w_skip"] = jnp.zeros((config.d_in, config.d_out))
        for name, value in cls.fresh_latent(config).items():
            parameters[name] = jnp.full(
                config.d_sae, value, jnp.float32, out_sharding=out_sharding(PER_LATENT)
            )
        return parameters

    @classmethod
    def fresh_latent(cls, config: SAEConfig) -> dict[str, float]:
        """What the parameters (d_sae,) are for a latent that is new or resampled."""
        return {"b_enc": 0.0}

    @abc.abstractmethod
    def loss(self, x: jax.Array, y: jax.Array, controls: LossInputs) -> Losses:
        """Losses of scaled inputs x (B, d_in) and targets y (B, d_out)."""

    def row_losses(self, x: jax.Array, y: jax.Array, coefficient: jax.Array) -> jax.Array:
        """(B,): the squared error of each row of scaled inputs x (B, d_in) and targets y
        (B, d_out), and its penalty where that is of single rows (the L1 family's);
        `train/resample.py` picks inputs by it."""
        y_hat = self.output(matmul_f32(self.encode(x), self.w_dec[...], BATCH), x)
        return jnp.sum(jnp.square(y - y_hat), axis=1)

    @classmethod
    @abc.abstractmethod
    def learning_rate(cls, d_sae: int) -> float:
        """The default peak learning rate for a dictionary of this size."""

    @classmethod
    def flops_per_token(cls, config: SAEConfig) -> int:
        """Floating-point operations that a training step executes for each token (a multiply
        and an add are two), without the optimiser's and the auxiliary loss's."""
        # Encoder forward and weight gradient; decoder forward and both gradients. The inputs
        # are data, so the encoder has no input gradient.
        return (4 * config.d_in + 6 * config.d_out) * config.d_sae

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        """Raises UserError where resolved fields contradict each other."""

    def parameters(self) -> dict[str, jax.Array]:
        """The parameters as plain arrays by name."""
        params = {name: v for name, v in vars(self).items() if isinstance(v, nnx.Param)}
        return {name: value[...] for name, value in params.items()}

    # ------------------------------------------------------ what losses are made of

    @property
    def dtype(self):
        """Of the operands of the big products."""
        return jnp.dtype(self.config.compute_dtype)

    def encoder_input(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x - b_dec, bias) for the encoder's product; x and b_enc where b_dec is not applied.

        The gradient of b_dec comes by way of the bias: from the summed gradient of the
        pre-activations, one product with w_enc, instead of one for every token.
        """
        if not self.config.apply_b_dec_to_input:
            return x, self.b_enc[...]
        shift = self.b_dec[...]
        bias = _bias_of_shifted_inputs(self.b_enc[...], shift, self.w_enc[...])
        return x - jax.lax.stop_gradient(shift), bias

    def output(self, decoded: jax.Array, x: jax.Array) -> jax.Array:
        """y_hat (B, d_out) from the decoder's product (B, d_out), in the SAE's own units."""
        y_hat = decoded + self.b_dec[...]
        if self.config.kind == "skip_transcoder":
            y_hat += matmul_f32(x, self.w_skip[...])
        return y_hat

    def decoder_norms(self) -> jax.Array:
        """(d_sae,): what a latent's activation is weighted with in penalties: the norm of its
        decoder row, 1 where that is kept at 1; for a crosscoder the sum of the norms of its parts
        for each site (Lindsey et al. 2024)."""
        if self.config.unit_norm_decoder and self.config.site_widths is None:
            return jnp.ones_like(self.b_enc[...])
        return row_norms(self.w_dec[...], self.config.site_widths)

    def auxiliary_loss(self, x, bias, error, dead) -> jax.Array:
        """alpha E||e - e_hat||^2, the AuxK loss for dead latents (Gao et al. 2024, A.2): e, the
        error of the reconstruction held fixed, and e_hat the decoding of the aux_k largest
        pre-activations of dead latents. 0 where none is dead, and then it costs nothing.

        x (B, d_in) and bias (d_sae,) as from `encoder_input`, error (B, d_out), dead (d_sae,)
        bool. e_hat has no b_dec: it would stand on both sides.
        """
        if not self.config.aux_coefficient:
            return jnp.zeros(())
        w_enc, w_dec, any_dead = self.w_enc[...], self.w_dec[...], dead.any()
        bias = jnp.where(dead | ~any_dead, bias, -jnp.inf)  # finite where it is not for use

        def loss():
            code, _ = ops.encode_top_k(x, w_enc, bias, None, self.config.aux_k, 0, self.dtype)
            error_hat, _ = ops.sparse_decode(auxiliary_code(code), None, None, w_dec)
            return squared_error(jax.lax.stop_gradient(error), error_hat)

        value = branch(in_any_run(any_dead), loss, lambda: jnp.zeros(()))
        return self.config.aux_coefficient * jnp.where(any_dead, value, 0.0)


def squared_error(y: jax.Array, y_hat: jax.Array) -> jax.Array:
    """Mean over the batch of ||y - y_hat||^2."""
    return jnp.mean(jnp.sum(jnp.square(y - y_hat), axis=-1))


def auxiliary_code(code: ops.Code) -> ops.Code:
    """AuxK's pick with a ReLU, as in the code of Gao et al.: without it dead latents fit the error
    together, as a dense linear code, and few come back as features. Its slope below 0 is 0.1 and
    not 0, so that dead latents whose pre-activations are all negative learn too."""
    return code._replace(values=jax.nn.leaky_relu(code.values, _AUXILIARY_SLOPE))


def row_norms(w: jax.Array, site_widths: tuple[int, ...] | None) -> jax.Array:
    """(rows,): the sum over sites of the norms of each row's parts, w being (rows, width) and
    `site_widths` adding up to that width; None: one site."""
    ends = list(itertools.accumulate(site_widths or (w.shape[1],)))
    return sum(jnp.linalg.norm(part, axis=1) for part in jnp.split(w, ends[:-1], axis=1))


def _directions(key, count: int, width: int) -> jax.Array:
    """(count, width): random rows of norm 1."""
    rows = jax.random.normal(key, (count, width), out_sharding=out_sharding(DECODER))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def _static_or_data(scale):
    """A number stays one; an array becomes a part of the module's state."""
    return scale if isinstance(scale, float | int) else nnx.data(jnp.asarray(scale))


@jax.custom_vjp
def _bias_of_shifted_inputs(b_enc, shift, w_enc):
    """b_enc; for inputs that `shift` (d_in,) has been taken from without a gradient."""
    return b_enc


def _bias_forward(b_enc, shift, w_enc):
    return b_enc, w_enc


def _bias_backward(w_enc, d_bias):
    return d_bias, -matmul_f32(w_enc, d_bias, jax.P(None)), None


_bias_of_shifted_inputs.defvjp(_bias_forward, _bias_backward)
