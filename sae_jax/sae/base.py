"""The contract that every architecture obeys: one module, one loss, one way to fold."""

import abc
import dataclasses
import inspect
import itertools
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sae_jax import ops
from sae_jax.errors import UserError, nearest
from sae_jax.ops.sharding import (
    BATCH,
    CODE,
    DECODER,
    PER_LATENT,
    branch,
    in_any_run,
    matmul_f32,
    out_sharding,
)
from sae_jax.sae import files
from sae_jax.sae.arrays import Restore, float32
from sae_jax.sae.config import TRANSCODERS, SAEConfig
from sae_jax.sae.registry import register
from sae_jax.sae.resolve import is_resolved, resolve

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

    An architecture is a subclass that has a class `Config` of its own, a frozen dataclass that
    extends SAEConfig, and gives the abstract methods and whatever else of this it does otherwise.
    Defining it registers it under the name in its Config, wherever the class stands.
    """

    Config: ClassVar[type[SAEConfig]]
    PER_LATENT_SCALED: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters (d_sae,) that grow with the latent's unit."""
    RUNNING_MEANS: ClassVar[tuple[str, ...]] = ()
    """Parameters that are not trained: each is the running mean of `Losses.running`."""

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "Config" in vars(cls):
            register(cls)
            cls.__signature__ = _signature(cls.Config)

    def __init__(
        self,
        config: SAEConfig | None = None,
        *,
        rngs: nnx.Rngs | int = 0,
        scale: float | jax.Array = 1.0,
        target_scale: float | jax.Array | None = None,
        parameters: dict[str, jax.Array] | None = None,
        **fields,
    ):
        """Makes a fresh SAE from the fields of its config: `TopK(d_in=768, d_sae=24_576, k=32)`.

        Args:
          config: instead of fields, or with fields that replace some of its own.
          rngs: what fresh parameters are drawn from: nnx.Rngs, or a seed. b_dec is 0.
          scale, target_scale: what inputs and targets are multiplied by; numbers, or for a
            crosscoder arrays (d_in,). target_scale None: the same as scale.
          parameters: arrays to take instead of fresh ones, by name. See `from_parameters`.

        Raises UserError for a wrong field, for missing widths (d_in; d_out of a transcoder;
        site_widths of a crosscoder), and for parameters of other names or shapes."""
        self.config = config = _resolved(type(self), config, fields)
        self.scale = _static_or_data(scale)
        self.target_scale = self.scale if target_scale is None else _static_or_data(target_scale)
        self.made_fresh = parameters is None
        """Whether the constructor drew the parameters; see `is_fresh`."""
        if parameters is None:
            parameters = self.init_parameters(_key(rngs), config, jnp.zeros(config.d_out))
        else:
            _check_parameters(type(self), config, parameters)
        for name, value in parameters.items():
            setattr(self, name, nnx.Param(value))

    @classmethod
    def from_parameters(
        cls,
        config: SAEConfig,
        parameters: dict[str, jax.Array],
        scale: float | jax.Array = 1.0,
        target_scale: float | jax.Array | None = None,
    ) -> Self:
        """Returns the SAE of a config with the given float32 parameters, by name. Raises UserError
        if the names or shapes are not those that `init_parameters` makes."""
        return cls(config, parameters=parameters, scale=scale, target_scale=target_scale)

    def __repr__(self) -> str:
        """The constructor's call, with the fields that are not as they are by default."""
        config, derived = self.config, self.config.derived()
        derived |= {"architecture": config.architecture, "d_out": config.d_in}
        shown = {"d_in": config.d_in, "d_sae": config.d_sae}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if repr(value) not in (repr(field.default), repr(derived.get(field.name))):
                shown[field.name] = value
        texts = [f"{name}={value!r}" for name, value in shown.items()]
        scales = {"scale": (self.scale, 1.0), "target_scale": (self.target_scale, self.scale)}
        for name, (value, default) in scales.items():
            if isinstance(value, float | int) and value != default:
                texts.append(f"{name}={value:.6g}")
        return f"{type(self).__name__}({', '.join(texts)})"

    __str__ = __repr__

    def is_fresh(self) -> bool:
        """Returns whether the SAE is as the constructor made it, so that no training has given its
        parameters a unit: its biases, and whatever else is one number for each latent, are those
        of a new latent."""
        fresh = {"b_dec": 0.0} | self.fresh_latent(self.config)
        parameters = self.parameters()
        return self.made_fresh and all(
            bool(jnp.all(parameters[name] == value)) for name, value in fresh.items()
        )

    # ----------------------------------------------------------------- use

    def encode(self, x) -> jax.Array:
        """Returns the latents (..., d_sae) of activations x (..., d_in) in the model's own units.

        x: of any float or integer type, from JAX, NumPy, torch or lists; computed in float32. A
        tensor of torch gives one back, without a gradient. Raises UserError for another width."""
        x, restore = self.inputs(x)
        return restore(self.activate(self.preactivations(x)))

    def decode(self, latents, x=None) -> jax.Array:
        """Returns the reconstruction (..., d_out), in the model's own units, of latents
        (..., d_sae). A skip transcoder needs the x (..., d_in) that it encoded, too.

        Takes and returns the same types as `encode`. Raises UserError for another width."""
        latents, restore = float32(latents, self.config.d_sae, "latents")
        if self.config.kind == "skip_transcoder":
            if x is None:
                raise UserError("a skip transcoder decodes from x too: decode(latents, x)")
            x, _ = self.inputs(x)
        return restore(self._decoded(latents, x))

    def __call__(self, x) -> jax.Array:
        """Returns the reconstruction (..., d_out) of activations x (..., d_in), both in the model's
        own units and of the types that `encode` takes."""
        x, restore = self.inputs(x)
        return restore(self._decoded(self.activate(self.preactivations(x)), x))

    def direction(self, latent) -> jax.Array:
        """Returns what the latent of this index adds to the reconstruction for each unit of its
        activation: its decoder row (d_out,), in the model's own units.

        latent: an index from 0 to d_sae - 1, or an array of them, which gives (..., d_out). Raises
        UserError for one that is out of range or no whole number."""
        if not isinstance(latent, jax.core.Tracer):
            latent = np.asarray(latent)
            if not np.issubdtype(latent.dtype, np.integer):
                raise UserError(f"latents are whole numbers, not {latent.dtype}")
            outside = latent[(latent < 0) | (latent >= self.config.d_sae)]
            if outside.size:
                raise UserError(
                    f"there is no latent {outside.flat[0]}; they are 0 to {self.config.d_sae - 1}"
                )
        return self.w_dec[...][latent] / self.target_scale

    def loss(
        self,
        x,
        y=None,
        *,
        coefficient: float | jax.Array | None = None,
        dead=None,
        k: int | None = None,
        training: bool = True,
    ) -> Losses:
        """Returns the training losses of activations x (..., d_in) and targets y (..., d_out), in
        the model's own units. `jax.grad(lambda sae: sae.loss(x).total)(sae)` differentiates it in
        the parameters; x and y are data, to which no gradient flows.

        Args:
          y: None: x. A transcoder needs it.
          coefficient: of the sparsity penalty. None: the config's.
          dead: (d_sae,) bool, the latents that the auxiliary loss revives. None: none.
          k: latents for each token. None: the config's.
          training: False: with latents as `encode` gives them, which in some architectures differ.

        `mse` and `total` are in squares of the units of y, `l1` in units of y. A crosscoder has
        units for each site: its mse is in them, as that of `sae(x)`; its total and l1 are in its
        own, those of the activations times `scale`. Raises UserError for another width, for a
        transcoder without y, and where there is no row."""
        x, y, restore = self._pair(x, y)
        if x.shape[0] == 0:
            raise UserError("a loss is a mean over rows of activations, and there are none")
        if dead is None:
            dead = jnp.zeros(self.config.d_sae, bool)
        inputs = LossInputs(
            dead=jnp.asarray(dead, bool),
            coefficient=self._coefficient(coefficient),
            k=k,
            training=training,
        )
        losses = self.training_loss(x * self.scale, y * self.target_scale, inputs)
        if self._has_sites:
            error = y - self._decoded(self.activate(self.preactivations(x)), x)
            losses = losses._replace(mse=jnp.mean(jnp.sum(jnp.square(error), axis=-1)))
        else:
            unit = self.target_scale
            losses = losses._replace(
                total=losses.total / unit**2, mse=losses.mse / unit**2, l1=losses.l1 / unit
            )
        return jax.tree.map(lambda a: restore(jnp.asarray(a)), losses)

    def row_losses(self, x, y=None, coefficient: float | jax.Array | None = None) -> jax.Array:
        """Returns the loss (rows,) of each row of x (..., d_in) and y (..., d_out), in the model's
        own units: the squared error of the reconstruction, and the coefficient (None: the
        config's) times the row's penalty where the architecture has one of single rows (the L1
        family). A crosscoder's penalty is in its own units. Takes what `loss` takes."""
        x, y, restore = self._pair(x, y)
        latents = self.activate(self.preactivations(x))
        errors = jnp.sum(jnp.square(y - self._decoded(latents, x)), axis=-1)
        unit = 1.0 if self._has_sites else self.target_scale
        penalties = self._coefficient(coefficient) * self.row_penalties(latents)
        return restore(errors + penalties / unit**2)

    def split(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns inputs x (..., d_in) and targets y (..., d_out) of rows as a stream gives them:
        the columns of all sites side by side, a transcoder's target last."""
        if self.config.kind in TRANSCODERS:
            return rows[..., : self.config.d_in], rows[..., self.config.d_in :]
        return rows, rows

    def preactivations(self, x: jax.Array) -> jax.Array:
        """Returns what `activate` takes, (..., d_sae), of float32 activations x (..., d_in) in the
        model's own units."""
        return self._encoded(x * self.scale)

    def save(self, path) -> None:
        """Writes the SAE to a new folder, in our own format (`sae.files`), to the last bit.
        `sae_jax.load(path)` reads it. Raises UserError if there is something at `path` already."""
        files.save(self, path)

    def inputs(self, x) -> tuple[jax.Array, Restore]:
        """Returns activations (..., d_in) of any type as a float32 array, and what turns results
        back into the type that came in (`sae.arrays.float32`)."""
        return float32(x, self.config.d_in, "activations")

    def _pair(self, x, y) -> tuple[jax.Array, jax.Array, Restore]:
        """Inputs (rows, d_in) and targets (rows, d_out) in the model's own units."""
        x, restore = self.inputs(x)
        if y is None and self.config.kind in TRANSCODERS:
            raise UserError(f"a {self.config.kind} needs its targets y as well: loss(x, y)")
        y = x if y is None else float32(y, self.config.d_out, "targets")[0]
        if x.shape[:-1] != y.shape[:-1]:
            raise UserError(f"x {x.shape} and y {y.shape} must have the same rows")
        return x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), restore

    def _decoded(self, latents: jax.Array, x: jax.Array | None) -> jax.Array:
        y_hat = matmul_f32(latents, self.w_dec[...]) + self.b_dec[...]
        if self.config.kind == "skip_transcoder":
            y_hat += matmul_f32(x * self.scale, self.w_skip[...])
        return y_hat / self.target_scale

    def _encoded(self, x: jax.Array) -> jax.Array:
        if self.config.apply_b_dec_to_input:
            x = x - self.b_dec[...]
        return matmul_f32(x, self.w_enc[...]) + self.b_enc[...]

    def _coefficient(self, given) -> float | jax.Array:
        return (self.config.sparsity_coefficient or 0.0) if given is None else given

    @property
    def _has_sites(self) -> bool:
        """Whether there are several sites, each in units of its own."""
        return self.config.kind == "crosscoder"

    @abc.abstractmethod
    def activate(self, preactivations: jax.Array) -> jax.Array:
        """Returns the latents (..., d_sae) of pre-activations (..., d_sae)."""

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
        return self.from_parameters(self.config, parameters | changed)

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
    def training_loss(self, x: jax.Array, y: jax.Array, inputs: LossInputs) -> Losses:
        """Returns the losses that a training step differentiates and logs.

        x (B, d_in), y (B, d_out): inputs and targets in the SAE's own units: those of the
        activations times `scale` and `target_scale`. The losses are in these units too. On a mesh
        arrays carry their sharding in their type, and the sharded axes are B and d_sae:
        `scaled_preactivations` and `scaled_reconstruction` are the two products that say how their
        results are sharded. A product of one's own over B or d_sae says it, too
        (`ops.sharding.matmul_f32(latents, w, BATCH)`)."""

    def scaled_row_losses(self, x: jax.Array, y: jax.Array, coefficient: jax.Array) -> jax.Array:
        """Returns `row_losses` (B,) of inputs x (B, d_in) and targets y (B, d_out) in the SAE's
        own units; `train/resample.py` picks inputs by it."""
        latents = self.activate(self._encoded(x))
        y_hat = self.output(matmul_f32(latents, self.w_dec[...], BATCH), x)
        errors = jnp.sum(jnp.square(y - y_hat), axis=1)
        return errors + coefficient * self.row_penalties(latents)

    def row_penalties(self, latents: jax.Array) -> jax.Array | float:
        """Returns the sparsity penalty (B,) of each row of latents (B, d_sae), without its
        coefficient, where that is of single rows; else 0."""
        return 0.0

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

    def encoder_product(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """Returns the pre-activations (B, d_sae) of what `encoder_input` returned, in
        `compute_dtype` and sharded over tokens and latents."""
        w_enc = self.w_enc[...].astype(self.dtype)
        return matmul_f32(x.astype(self.dtype), w_enc, CODE) + bias

    def scaled_preactivations(self, x: jax.Array) -> jax.Array:
        """Returns the pre-activations (B, d_sae) of inputs x (B, d_in) in the SAE's own units, as
        `training_loss` is given them."""
        return self.encoder_product(*self.encoder_input(x))

    def scaled_reconstruction(self, latents: jax.Array, x: jax.Array) -> jax.Array:
        """Returns the reconstruction (B, d_out) of latents (B, d_sae) and the inputs x (B, d_in)
        that they are of, in the SAE's own units, as `training_loss` is given its targets."""
        w_dec = self.w_dec[...].astype(self.dtype)
        return self.output(matmul_f32(latents.astype(self.dtype), w_dec, BATCH), x)

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


def _resolved(cls: type[SAE], config: SAEConfig | None, fields: dict) -> SAEConfig:
    """The config that a constructor's arguments describe, all of it filled in."""
    if config is None:
        config = cls.Config(**fields)
    elif getattr(config, "architecture", None) != cls.Config.architecture:
        raise UserError(f"{cls.__name__} takes a {cls.Config.__name__}, not {config!r}")
    elif fields:
        for name in fields:
            config.check_field(name)
        config = dataclasses.replace(config, **fields)
    elif is_resolved(config):
        return config  # its values may be traced, which nothing can check
    sites, target = (config.d_in,), None
    if config.kind == "crosscoder":
        sites = config.site_widths
        if sites is None:
            raise UserError(f"{cls.__name__} of a crosscoder needs site_widths=(width, width, ...)")
    elif config.d_in is None:
        raise UserError(f"{cls.__name__} needs d_in, the width of its inputs")
    if config.kind in TRANSCODERS:
        target = config.d_out
        if target is None:
            raise UserError(f"{cls.__name__} of a transcoder needs d_out, the width of its targets")
    return resolve(config, sites, target)


def _key(rngs: nnx.Rngs | int) -> jax.Array:
    if isinstance(rngs, nnx.Rngs):
        return rngs.params()
    if isinstance(rngs, bool) or not isinstance(rngs, int | np.integer):
        raise UserError(f"rngs must be nnx.Rngs or a seed, not {rngs!r}")
    return jax.random.key(rngs)


def _check_parameters(cls: type[SAE], config: SAEConfig, parameters: dict) -> None:
    def fresh():
        return cls.init_parameters(jax.random.key(0), config, jnp.zeros(config.d_out))

    expected = jax.eval_shape(fresh)
    what = f"{cls.__name__} of kind {config.kind}"
    if missing := sorted(expected.keys() - parameters.keys()):
        raise UserError(f"a {what} has a parameter {missing[0]}, which was not given")
    if extra := sorted(parameters.keys() - expected.keys()):
        raise UserError(f"a {what} has no parameter {extra[0]}; {nearest(extra[0], expected)}")
    for name, like in expected.items():
        if (shape := np.shape(parameters[name])) != like.shape:
            turned = ", transposed" if shape == like.shape[::-1] else ""
            raise UserError(
                f"{name} of a {what} has shape {shape}{turned}; it must be {like.shape}"
            )


def _signature(config_class: type[SAEConfig]) -> inspect.Signature:
    """What a notebook completes and shows: the fields by keyword."""
    parameter, only = inspect.Parameter, inspect.Parameter.KEYWORD_ONLY
    fields = [
        parameter(field.name, only, default=field.default, annotation=field.type)
        for field in dataclasses.fields(config_class)
        if field.name != "architecture"
    ]
    config = parameter("config", parameter.POSITIONAL_OR_KEYWORD, default=None)
    others = {"rngs": 0, "scale": 1.0, "target_scale": None}
    more = [parameter(name, only, default=default) for name, default in others.items()]
    return inspect.Signature([config, *fields, *more])


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
