"""The contract that every architecture obeys.

An architecture is one module with one training loss and one way to fold its scales away.
"""

import abc
import dataclasses
import itertools
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sae_jax import ops
from sae_jax.errors import UserError
from sae_jax.ops.products import product
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
from sae_jax.sae.construction import (
    check_parameters,
    make_signature,
    random_key,
    resolve_arguments,
)
from sae_jax.sae.losses import (
    Losses,
    LossInputs,
    auxiliary_activation,
    auxiliary_code,
    squared_error,
)
from sae_jax.sae.registry import register

_ROUNDING = 1e-6  # of a norm in float32


class SAE(nnx.Module):
    """A sparse autoencoder, transcoder or crosscoder.

    With an activation function f, which each architecture has its own of, it computes

        latents = f((scale * x - b_dec) @ w_enc + b_enc)
        y_hat = (latents @ w_dec + b_dec) / target_scale

    b_dec is taken from the input only if `config.apply_b_dec_to_input` is set.

    `config.kind` says what x and y are. An autoencoder's y is x. A transcoder's y is another
    site's activation, such as an MLP's output given its input; a skip transcoder adds an affine
    skip, scale * x @ w_skip (Paulo et al. 2025). A crosscoder's x and y are the activations of
    several sites side by side, so that sites share latents and each has its columns of w_enc and
    w_dec (Lindsey et al. 2024).

    Parameters (float32): w_enc (d_in, d_sae), w_dec (d_sae, d_out), b_enc (d_sae,),
    b_dec (d_out,), w_skip (d_in, d_out) of a skip transcoder, and those that an architecture adds.
    `scale` and
    `target_scale` are the normalisation of the inputs and targets that training used: numbers,
    or for a crosscoder (d_in,) arrays that hold one number for each site.

    An architecture is a subclass that has a class `Config` of its own, a frozen dataclass that
    extends SAEConfig. It implements the abstract methods `activate`, `training_loss` and
    `learning_rate`, and overrides whatever else it does differently. Defining the class registers
    it under the name in its Config, in whatever file the class is.
    """

    Config: ClassVar[type[SAEConfig]]
    """The class of the architecture's config."""
    PER_LATENT_SCALED: ClassVar[tuple[str, ...]] = ("b_enc",)
    """The names of parameters (d_sae,) that are multiplied by c where a latent is rescaled by c."""
    RUNNING_MEANS: ClassVar[tuple[str, ...]] = ()
    """The names of parameters that are not trained. Each is the running mean of the values of this
    name in `Losses.running`."""

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "Config" in vars(cls):
            register(cls)
            cls.__signature__ = make_signature(cls.Config)

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

        Raises UserError for a wrong field, for missing widths (d_in; d_out of a transcoder;
        site_widths of a crosscoder), and for parameters of other names or shapes.

        Args:
          config: a config to use instead of fields. Fields given besides replace its own.
          rngs: an nnx.Rngs or a seed, from which fresh parameters are drawn. A fresh b_dec is 0.
          scale: the number that inputs are multiplied by, or for a crosscoder an array (d_in,).
          target_scale: the same for targets. None stands for `scale`.
          parameters: arrays by name to take instead of fresh ones. See `from_parameters`.
          **fields: the fields of the architecture's config.
        """
        self.config = config = resolve_arguments(type(self), config, fields)
        self.scale = _static_or_data(scale)
        self.target_scale = self.scale if target_scale is None else _static_or_data(target_scale)
        self.made_fresh = parameters is None
        """Whether the constructor drew the parameters, which `is_fresh` asks."""
        if parameters is None:
            parameters = self.init_parameters(random_key(rngs), config, jnp.zeros(config.d_out))
        else:
            check_parameters(type(self), config, parameters)
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
        """Returns an SAE that has the given parameters.

        Raises UserError if their names or shapes are not those that `init_parameters` makes.

        Args:
          config: the config, with its widths filled in.
          parameters: float32 arrays by name.
          scale: the number that inputs are multiplied by, or for a crosscoder an array (d_in,).
          target_scale: the same for targets. None stands for `scale`.
        """
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
        """Returns whether the SAE has not been trained since the constructor drew its parameters.

        It is fresh if b_dec is 0 and all parameters of shape (d_sae,) have the values of
        `fresh_latent`. The parameters of a fresh SAE are in no unit yet.
        """
        fresh = {"b_dec": 0.0} | self.fresh_latent(self.config)
        parameters = self.parameters()
        return self.made_fresh and all(
            bool(jnp.all(parameters[name] == value)) for name, value in fresh.items()
        )

    # ----------------------------------------------------------------- use

    def encode(self, x) -> jax.Array:
        """Returns the latents (..., d_sae) of activations x (..., d_in) in the model's own units.

        x is an array of JAX or NumPy, a tensor of torch, or nested lists, of any float or integer
        type. The latents are computed in float32. For a tensor of torch they are a tensor of torch
        on the same device, without a gradient. Raises UserError if x has another width.
        """
        x, restore = self.inputs(x)
        return restore(self.activate(self.preactivations(x)))

    def decode(self, latents, x=None) -> jax.Array:
        """Returns the reconstruction (..., d_out) of latents (..., d_sae).

        The reconstruction is in the model's own units. A skip transcoder also needs the x
        (..., d_in) that it encoded. The arguments and the result are of the types that `encode`
        takes and returns. Raises UserError if a width is wrong, or if a skip transcoder gets no x.
        """
        latents, restore = float32(latents, self.config.d_sae, "latents", "d_sae")
        if self.config.kind == "skip_transcoder":
            if x is None:
                raise UserError("a skip transcoder decodes from x too: decode(latents, x)")
            x, _ = self.inputs(x)
        return restore(self._decoded(latents, x))

    def __call__(self, x) -> jax.Array:
        """Returns the reconstruction (..., d_out) of activations x (..., d_in).

        Both are in the model's own units and of the types that `encode` takes and returns. Raises
        UserError if x has another width.
        """
        x, restore = self.inputs(x)
        return restore(self._decoded(self.activate(self.preactivations(x)), x))

    def direction(self, latent) -> jax.Array:
        """Returns a latent's decoder row (d_out,) in the model's own units.

        It is what the latent adds to the reconstruction for each unit of its activation. `latent`
        is an index from 0 to d_sae - 1, or an array (...) of indices, for which the rows are
        (..., d_out). Raises UserError if an index is out of range or not a whole number.
        """
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
        """Returns the training losses of activations x (..., d_in) and targets y (..., d_out).

        Inputs and targets are in the model's own units. The result's `total` and `mse` are in
        squares of the units of y, and its `l1` is in units of y. A crosscoder's `mse` is in the
        units of each of its sites, but its `total` and `l1` are in those of the activations times
        `scale`.

        `jax.grad(lambda sae: sae.loss(x).total)(sae)` gives the gradient in the parameters. No
        gradient flows to x and y.

        Raises UserError for a wrong width, for a transcoder without y, and if there are no rows.

        Args:
          x: the inputs, of any type that `encode` takes.
          y: the targets. None stands for x, except for a transcoder, which needs them.
          coefficient: the coefficient of the sparsity penalty. None stands for the config's.
          dead: (d_sae,) bool, the latents that the auxiliary loss revives. None stands for none.
          k: the number of latents for each token. None stands for the config's.
          training: whether latents are computed as in training. With False they are computed as
            `encode` computes them, which differs in some architectures.
        """
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
        """Returns the loss (rows,) of each row of x (..., d_in) and y (..., d_out).

        The loss of a row is the squared error of its reconstruction, in the model's own units. To
        it is added `coefficient` (by default the config's) times the row's penalty, if the
        architecture has a penalty of single rows, as the L1 family has. A crosscoder's penalty is
        in units of the activations times `scale`. Raises UserError where `loss` does for x and y.
        """
        x, y, restore = self._pair(x, y)
        latents = self.activate(self.preactivations(x))
        errors = jnp.sum(jnp.square(y - self._decoded(latents, x)), axis=-1)
        unit = 1.0 if self._has_sites else self.target_scale
        penalties = self._coefficient(coefficient) * self.row_penalties(latents)
        return restore(errors + penalties / unit**2)

    def split(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Splits the rows of a stream into inputs x (..., d_in) and targets y (..., d_out).

        A row holds the columns of all sites side by side, with a transcoder's target last. For
        other kinds both results are the rows themselves.
        """
        if self.config.kind in TRANSCODERS:
            return rows[..., : self.config.d_in], rows[..., self.config.d_in :]
        return rows, rows

    def preactivations(self, x: jax.Array) -> jax.Array:
        """Returns the pre-activations (..., d_sae) that `activate` takes.

        They are those of activations x (..., d_in), of any float type, in the model's own units.
        """
        return self._encoded(x.astype(jnp.float32) * self.scale)

    def save(self, path) -> None:
        """Writes the SAE to a new folder `path`, exactly, in sae_jax's own format (`sae.files`).

        `sae_jax.load(path)` reads it again. Raises UserError if something is at `path` already.
        """
        files.save(self, path)

    def inputs(self, x) -> tuple[jax.Array, Restore]:
        """Returns activations (..., d_in) of any type as a float32 array, and a function `Restore`.

        The function turns results back into the type of x (`sae.arrays.float32`). Raises UserError
        if x has another width.
        """
        return float32(x, self.config.d_in, "activations", "d_in")

    def _pair(self, x, y) -> tuple[jax.Array, jax.Array, Restore]:
        """Returns inputs (rows, d_in), targets (rows, d_out) and the `Restore` of the inputs."""
        x, restore = self.inputs(x)
        if y is None and self.config.kind in TRANSCODERS:
            raise UserError(f"a {self.config.kind} needs its targets y as well: loss(x, y)")
        y = x if y is None else float32(y, self.config.d_out, "targets", "d_out")[0]
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
        """Returns an SAE of the same function, with scales 1 and decoder rows of norm 1.

        Its latents are those of this SAE times their decoder norms, in the model's units. Folding
        is exact if `activate` commutes with a positive rescaling of each latent that also rescales
        the parameters in `PER_LATENT_SCALED`. An architecture where that is not so overrides it.
        """
        return self._rescaled(self._row_norms())

    def _row_norms(self) -> jax.Array:
        """Returns the norms (d_sae,) of the decoder's rows in the model's units.

        Norms of 0 count as 1. So do those that are 1 but for rounding, so that folding a folded SAE
        changes no bit.
        """
        norms = jnp.linalg.norm(self.w_dec[...] / self.target_scale, axis=1)
        return jnp.where((norms > 0) & (jnp.abs(norms - 1) > _ROUNDING), norms, 1.0)

    def _rescaled(self, factor: jax.Array) -> "SAE":
        """Returns an SAE of the same function with scales 1 and latents times `factor`.

        factor: a number for all latents, or an array (d_sae,).
        """
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
        """Returns fresh float32 parameters by name. On a mesh they are made in their shardings.

        Decoder rows have random directions and norm 1, or norm `decoder_init_norm` where the norm
        is not kept at 1. w_enc is the transpose of w_dec (Conerly et al. 2024), but a transcoder's
        has random directions of its own, since it reads another space. w_skip is 0. Parameters of
        shape (d_sae,) have the values of `fresh_latent`.

        Args:
          key: the key that random directions are drawn from.
          config: a config with its widths filled in.
          b_dec: (d_out,) the value of b_dec, in units of the targets times `target_scale`.
        """
        key_dec, key_enc = jax.random.split(key)
        norm = 1.0 if config.unit_norm_decoder else config.decoder_init_norm
        w_dec = norm * _unit_rows(key_dec, config.d_sae, config.d_out)
        tied = config.kind in ("autoencoder", "crosscoder")
        w_enc = w_dec if tied else norm * _unit_rows(key_enc, config.d_sae, config.d_in)
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
        """Returns the value of each parameter of shape (d_sae,) for a new or resampled latent."""
        return {"b_enc": 0.0}

    @abc.abstractmethod
    def training_loss(self, x: jax.Array, y: jax.Array, inputs: LossInputs) -> Losses:
        """Returns the losses that a training step differentiates and logs.

        The losses are in the SAE's own units, as x and y are. On a mesh arrays have their sharding
        in their type, and the sharded axes are B and d_sae. `scaled_preactivations` and
        `scaled_reconstruction` are the two products that say how their results are sharded. A
        product of one's own over B or d_sae says it too, as in
        `ops.sharding.matmul_f32(latents, w, BATCH)`.

        Args:
          x: (B, d_in) inputs: activations times `scale`.
          y: (B, d_out) targets: activations times `target_scale`.
          inputs: what else the loss depends on at this step.
        """

    def scaled_row_losses(self, x: jax.Array, y: jax.Array, coefficient: jax.Array) -> jax.Array:
        """Returns the loss (B,) of each row of x (B, d_in) and y (B, d_out) in the SAE's own units.

        It is the loss of `row_losses` for inputs times `scale` and targets times `target_scale`.
        `train/resample.py` picks the inputs that dead latents restart from by it.
        """
        latents = self.activate(self._encoded(x))
        y_hat = self.output(matmul_f32(latents, self.w_dec[...], BATCH), x)
        errors = jnp.sum(jnp.square(y - y_hat), axis=1)
        return errors + coefficient * self.row_penalties(latents)

    def row_penalties(self, latents: jax.Array) -> jax.Array | float:
        """Returns the sparsity penalty (B,) of each row of latents (B, d_sae).

        The penalty is not yet multiplied by its coefficient. It is 0 for architectures whose
        penalty is not a sum over rows.
        """
        return 0.0

    @classmethod
    @abc.abstractmethod
    def learning_rate(cls, d_sae: int) -> float:
        """Returns the default peak learning rate for a dictionary of `d_sae` latents."""

    @classmethod
    def flops_per_token(cls, config: SAEConfig) -> int:
        """Returns the floating-point operations that a training step executes for each token.

        A multiplication and an addition count as two. The operations of the optimiser and of the
        auxiliary loss are not counted.
        """
        # Encoder forward and weight gradient; decoder forward and both gradients. The inputs
        # are data, so the encoder has no input gradient.
        return (4 * config.d_in + 6 * config.d_out) * config.d_sae

    def parameters(self) -> dict[str, jax.Array]:
        """Returns the parameters as plain arrays by name."""
        params = {name: v for name, v in vars(self).items() if isinstance(v, nnx.Param)}
        return {name: value[...] for name, value in params.items()}

    # ------------------------------------------------------ what losses are made of

    @property
    def dtype(self):
        """The type of the operands of the products with matrices of parameters in training."""
        return jnp.dtype(self.config.compute_dtype)

    def encoder_input(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the inputs (B, d_in) and the bias (d_sae,) of the encoder's product.

        They are x - b_dec and b_enc, or x and b_enc where b_dec is not taken from the input. The
        gradient of b_dec flows through the bias: it is one product of w_enc with the summed
        gradient of the pre-activations, instead of one product for every token.
        """
        if not self.config.apply_b_dec_to_input:
            return x, self.b_enc[...]
        shift = self.b_dec[...]
        bias = _bias_of_shifted_inputs(self.b_enc[...], shift, self.w_enc[...])
        return x - jax.lax.stop_gradient(shift), bias

    def encoder_product(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """Returns the pre-activations (B, d_sae), sharded over tokens and latents.

        Args:
          x: (B, d_in) inputs as `encoder_input` returns them.
          bias: (d_sae,) the bias that it returns with them.
        """
        return product(x, self.w_enc[...], self.dtype, CODE) + bias

    def scaled_preactivations(self, x: jax.Array) -> jax.Array:
        """Returns the pre-activations (B, d_sae) of the inputs x (B, d_in) of `training_loss`,
        which are in the SAE's own units."""
        return self.encoder_product(*self.encoder_input(x))

    def scaled_reconstruction(self, latents: jax.Array, x: jax.Array) -> jax.Array:
        """Returns the reconstruction (B, d_out) that `training_loss` compares with its targets.

        Args:
          latents: (B, d_sae) latents of `scaled_preactivations`.
          x: (B, d_in) the inputs of `training_loss`, which a skip transcoder's skip reads.
        """
        return self.output(product(latents, self.w_dec[...], self.dtype, BATCH), x)

    def output(self, decoded: jax.Array, x: jax.Array) -> jax.Array:
        """Returns the reconstruction (B, d_out) of targets times `target_scale`.

        Args:
          decoded: (B, d_out) the product of latents and w_dec.
          x: (B, d_in) inputs times `scale`, which a skip transcoder's skip reads.
        """
        y_hat = decoded + self.b_dec[...]
        if self.config.kind == "skip_transcoder":
            y_hat += product(x, self.w_skip[...], self.dtype)
        return y_hat

    def decoder_norms(self) -> jax.Array:
        """Returns the weight (d_sae,) of each latent's activation in penalties.

        It is the norm of the latent's decoder row, which is 1 where it is kept at 1. For a
        crosscoder it is the sum over sites of the norms of the row's parts (Lindsey et al. 2024).
        """
        if self.config.unit_norm_decoder and self.config.site_widths is None:
            return jnp.ones_like(self.b_enc[...])
        return row_norms(self.w_dec[...], self.config.site_widths)

    def auxiliary_loss(self, x, bias, error, dead) -> jax.Array:
        """Returns the AuxK loss for dead latents, alpha E||e - e_hat||^2 (Gao et al. 2024, A.2).

        Here alpha is `aux_coefficient`, e is the error of the reconstruction, held fixed, and e_hat
        decodes the `aux_k` largest pre-activations of dead latents, without b_dec. The loss is 0,
        and costs nothing, where no latent is dead.

        Args:
          x: (B, d_in) the inputs that `encoder_input` returns.
          bias: (d_sae,) the bias that `encoder_input` returns.
          error: (B, d_out) targets minus reconstructions.
          dead: (d_sae,) bool, the dead latents.
        """
        if not self.config.aux_coefficient:
            return jnp.zeros(())
        few, many = ops.few_and_many(dead, self.config.aux_k)
        error_hat, *_ = self.decode_few_dead(x, bias, few)
        if many is not None:
            error_hat += self._decode_many_dead(x, bias, many)
        value = squared_error(jax.lax.stop_gradient(error), error_hat)
        return self.config.aux_coefficient * jnp.where(dead.any(), value, 0.0)

    def decode_few_dead(self, x, bias, dead) -> tuple[jax.Array, ...]:
        """Returns e_hat (B, d_out) of `auxiliary_loss`, whose arguments it takes, and w_enc, bias
        and w_dec for the rest of the loss (see `ops.decode_dead`).

        It is for the few dead latents of `ops.few_and_many`.
        """
        return ops.decode_dead(
            auxiliary_activation,
            *(x, self.w_enc[...], bias, self.w_dec[...], dead),
            self.config.aux_k,
            self.dtype,
        )

    def _decode_many_dead(self, x, bias, dead) -> jax.Array:
        """Returns the same for the many dead latents."""
        any_dead = dead.any()
        bias = jnp.where(dead | ~any_dead, bias, -jnp.inf)  # finite where it is not for use

        def decode():
            k, w_enc = self.config.aux_k, self.w_enc[...]
            code, _ = ops.encode_top_k(x, w_enc, bias, None, k, 0, self.dtype)
            return ops.sparse_decode(auxiliary_code(code), None, None, self.w_dec[...], self.dtype)[
                0
            ]

        nothing = jnp.zeros((x.shape[0], self.config.d_out), out_sharding=out_sharding(BATCH))
        error_hat = branch(in_any_run(any_dead), decode, lambda: nothing)
        return jnp.where(any_dead, error_hat, 0.0)


def row_norms(w: jax.Array, site_widths: tuple[int, ...] | None) -> jax.Array:
    """Returns for each row of w (rows, width) the sum over sites of the norms of its parts.

    `site_widths` add up to the width. None stands for one site of the whole width.
    """
    ends = list(itertools.accumulate(site_widths or (w.shape[1],)))
    return sum(jnp.linalg.norm(part, axis=1) for part in jnp.split(w, ends[:-1], axis=1))


def _unit_rows(key, count: int, width: int) -> jax.Array:
    """Returns random rows (count, width) of norm 1."""
    rows = jax.random.normal(key, (count, width), out_sharding=out_sharding(DECODER))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def _static_or_data(scale):
    """Returns a number as it is, and an array as a part of the module's state."""
    return scale if isinstance(scale, float | int) else nnx.data(jnp.asarray(scale))


@jax.custom_vjp
def _bias_of_shifted_inputs(b_enc, shift, w_enc):
    """Returns b_enc, and gives `shift` its gradient.

    The inputs are those from which `shift` (d_in,) has been taken without a gradient.
    """
    return b_enc


def _bias_forward(b_enc, shift, w_enc):
    return b_enc, w_enc


def _bias_backward(w_enc, d_bias):
    return d_bias, -matmul_f32(w_enc, d_bias, jax.P(None)), None


_bias_of_shifted_inputs.defvjp(_bias_forward, _bias_backward)
