"""The state of a training run, and the step that updates it."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from sae_jax import sae as saes
from sae_jax.config import Config
from sae_jax.ops import tpu_memory
from sae_jax.ops.sharding import PER_LATENT, out_sharding, zero_gather, zero_shard
from sae_jax.python_files import attribute_of
from sae_jax.sae import SAE, Losses, LossInputs
from sae_jax.train import controls, optimizer
from sae_jax.train.schedule_steps import ScheduleSteps, dead_after_tokens

_NEVER = -1
_LARGEST = 2**31 - 1  # int32

ExtraLoss = Callable[[SAE, jax.Array, jax.Array], jax.Array]
"""A function extra_loss(sae, x, y) that returns a scalar to add to the training loss.

x (B, d_in) are inputs and y (B, d_out) targets, in the SAE's own units. The scalar is
differentiated with respect to the SAE's parameters. It can be added to the loss of any
architecture, one of the user's own too.

On a mesh arrays carry their sharding in their type. Batches are sharded over `data`, and what has
an axis of d_sae over `model`. A product that sums over d_sae must name the sharding of its result:
`matmul_f32(latents, sae.w_dec[...], BATCH)` of `ops.sharding`, or
`jnp.matmul(..., out_sharding=out_sharding(BATCH))`. So must an index into w_dec. Sums over a whole
array need nothing. `sae.training_loss` and `sae.activate` show how."""


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a run needs to go on after a step. Its place in the data follows from `step`.

    Attributes:
      parameters: the SAE's parameters by name, float32. With mesh.zero they are sharded over `data`
        too.
      optimizer: the state of the optax chain, whose moments are sharded as the parameters.
      idle_tokens: for each latent how long ago it last fired, (d_sae,) int32: in tokens, or in
        steps where int32 does not hold `sae.dead_after_tokens`.
      scale: what inputs are multiplied by, a float32 scalar; for a crosscoder (d_in,).
      target_scale: the same for targets.
      log_coefficient: the logarithm of what multiplies the sparsity coefficient, float32.
      last_l0: L0 of the last step, float32. The controller of a target L0 needs it.
      step: how many steps are done, int32.
      nonfinite_step: the first step, from 0, whose loss or gradient was not finite, else -1; int32.
    """

    parameters: dict[str, jax.Array]
    optimizer: tuple
    idle_tokens: jax.Array
    scale: jax.Array
    target_scale: jax.Array
    log_coefficient: jax.Array
    last_l0: jax.Array
    step: jax.Array
    nonfinite_step: jax.Array


class Trainer:
    """Makes the states of a run, updates them and evaluates them.

    It has no state of its own: it knows the run's config, its schedules and its optimiser. The
    methods must be called under the run's mesh (`jax.set_mesh`).

    Attributes:
      config: the resolved config.
      steps: the steps of the whole run.
      evaluate: `heldout_means`, jitted.
      row_losses: returns the loss (B,) of each row of a batch, given (state, rows); jitted.
    """

    def __init__(
        self,
        config: Config,
        steps: int,
        variance: float,
        k: jax.Array | None = None,
        lengths: ScheduleSteps | None = None,
        extra_loss: ExtraLoss | None = None,
    ):
        """Prepares to train a run.

        Args:
          config: the resolved config.
          steps: the steps of the whole run.
          variance: the variance of the scaled targets, summed over d_out. FVU is relative to it.
          k: the run's own k, where the config's is the largest of a pack.
          lengths: the run's own schedules, where they are not those of the config.
          extra_loss: a term to add to the training loss, which is logged as the metric
            `extra_loss`. By default it is the one that `sae.extra_loss` of the config names, if
            any. The losses on held-out rows are without it.
        """
        self.config = config
        self.steps = steps
        self._variance = variance
        self._k = k
        self._lengths = lengths or ScheduleSteps.from_config(config, steps)
        self._idle_unit, self._dead_after = idleness(config)
        self._architecture = saes.architecture(config.sae)
        if extra_loss is None and config.sae.extra_loss:
            extra_loss = attribute_of(config.sae.extra_loss, "sae.extra_loss")
        self._extra_loss = extra_loss
        self._learning_rate = optimizer.schedule(config.optimizer, self._lengths)
        self._optimizer = optimizer.make(
            config.optimizer,
            self._lengths,
            config.sae.unit_norm_decoder,
            threshold_unit=config.sae.d_in**0.5 if config.sae.normalize == "sqrt_d" else 1.0,
        )
        self.evaluate: Callable = jax.jit(self.heldout_means)
        self.row_losses: Callable = jax.jit(self._row_losses)

    @functools.cached_property
    def step(self) -> Callable:
        """The jitted `update`. The old state's memory is used for the new one."""
        options = tpu_memory.compiler_options()
        return jax.jit(self.update, donate_argnums=0, compiler_options=options)

    def init(self, b_dec: jax.Array, scale, target_scale=None) -> TrainState:
        """Returns a fresh state, every array created in its sharding.

        Args:
          b_dec: the decoder's bias (d_out,) to begin with, in the units of the data.
          scale: what inputs are multiplied by: a number, or (d_in,) for a crosscoder.
          target_scale: the same for targets, by default `scale`.
        """
        target_scale = scale if target_scale is None else target_scale
        return jax.jit(self.init_traced)(b_dec, jnp.float32(scale), jnp.float32(target_scale))

    def abstract(self) -> TrainState:
        """Returns a state of jax.ShapeDtypeStructs: shapes, types and shardings without arrays."""
        mesh = jax.sharding.get_mesh()

        def placed(a):
            spec = a.sharding.spec if a.sharding else PartitionSpec()  # a scalar has none
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

        sae = self.config.sae
        scale = (sae.d_in,) if sae.kind == "crosscoder" else ()
        floats = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((sae.d_out,), scale, scale)]
        return jax.tree.map(placed, jax.eval_shape(self.init_traced, *floats))

    def init_traced(
        self, b_dec: jax.Array, scale: jax.Array, target_scale: jax.Array
    ) -> TrainState:
        """Does what `init` does, to be called in a traced function; the scales are arrays."""
        key = jax.random.key(self.config.train.seed)
        parameters = self.to_storage(
            self._architecture.init_parameters(key, self.config.sae, b_dec * target_scale)
        )
        return TrainState(
            parameters=parameters,
            optimizer=self._optimizer.init(parameters),
            idle_tokens=jnp.zeros(
                self.config.sae.d_sae, jnp.int32, out_sharding=out_sharding(PER_LATENT)
            ),
            scale=scale,
            target_scale=target_scale,
            log_coefficient=jnp.zeros(()),
            last_l0=jnp.zeros(()),
            step=jnp.zeros((), jnp.int32),
            nonfinite_step=jnp.full((), _NEVER, jnp.int32),
        )

    def to_storage(self, per_parameter: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns parameters, or arrays of their shapes, in the sharding that the state keeps."""
        return zero_shard(per_parameter) if self.config.mesh.zero else per_parameter

    def from_storage(self, state: TrainState) -> dict[str, jax.Array]:
        """Returns the state's parameters in the sharding that the SAE's operations take."""
        return zero_gather(state.parameters) if self.config.mesh.zero else state.parameters

    def scaled(self, state: TrainState, rows) -> tuple[SAE, jax.Array, jax.Array]:
        """Returns the SAE in its own units, and the inputs and targets of a batch in these units.

        `rows` (B, width) are in the units of the data.
        """
        sae = self._sae(self.from_storage(state))
        x, y = sae.split(rows.astype(jnp.float32))
        return sae, x * state.scale, y * state.target_scale

    def _sae(self, parameters: dict[str, jax.Array]) -> SAE:
        return self._architecture.from_parameters(self.config.sae, parameters)

    def dead(self, state: TrainState) -> jax.Array:
        """Returns which latents are dead, (d_sae,) bool.

        A latent is dead if it has not fired for `sae.dead_after_tokens` tokens.
        """
        return state.idle_tokens >= self._dead_after

    def update(self, state: TrainState, rows: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        """Returns the state after one step on a batch (B, width), and the step's metrics by name.

        Where the loss or the gradient is not finite and `train.on_nonfinite` is "skip", only the
        counters change. Otherwise the loop ends the run when it next reads the metrics.
        """
        sae, x, y = self.scaled(state, rows)
        dead = self.dead(state)
        inputs = self._loss_inputs(state, state.step, dead)

        def total_loss(parameters):
            sae = self._sae(parameters)
            losses, extra = sae.training_loss(x, y, inputs), {}
            if self._extra_loss is not None:
                extra = {"extra_loss": self._extra_loss(sae, x, y)}
                losses = losses._replace(total=losses.total + extra["extra_loss"])
            return losses.total, (losses, extra)

        loss_and_gradients = jax.value_and_grad(total_loss, has_aux=True)
        (_, (losses, extra)), gradients = loss_and_gradients(sae.parameters())
        gradients = self.to_storage(gradients)
        gradient_norm = optax.tree.norm(gradients)
        updates, optimizer_state = self._optimizer.update(
            gradients, state.optimizer, state.parameters
        )
        parameters = optax.apply_updates(state.parameters, updates)
        weight = controls.running_mean_weight(state.step, self._lengths.horizon)
        for name, value in self.to_storage(losses.running).items():
            before = state.parameters[name]
            parameters[name] = before + weight * (value - before)
        finite = jnp.isfinite(losses.total) & jnp.isfinite(gradient_norm)
        first_time = ~finite & (state.nonfinite_step == _NEVER)
        batch = rows.shape[0] // self._idle_unit
        idle = jnp.minimum(state.idle_tokens, _LARGEST - batch) + batch
        new = dataclasses.replace(
            state,
            parameters=parameters,
            optimizer=optimizer_state,
            idle_tokens=jnp.where(losses.fired, 0, idle),
            log_coefficient=controls.next_log_coefficient(
                self.config.sae,
                state.step,
                self._lengths,
                state.log_coefficient,
                state.last_l0,
                losses,
            ),
            last_l0=losses.l0.astype(jnp.float32),
            step=state.step + 1,
            nonfinite_step=jnp.where(first_time, state.step, state.nonfinite_step),
        )
        if self.config.train.on_nonfinite == "skip":
            counters = {"step": new.step, "nonfinite_step": new.nonfinite_step}
            unchanged = dataclasses.replace(state, **counters)
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, unchanged)
        metrics = {
            "loss": losses.total,
            **self._in_data_units(state, losses),
            "l0": losses.l0,
            "dead_fraction": jnp.mean(dead.astype(jnp.float32)),
            "grad_norm": gradient_norm,
            "lr": self._learning_rate(state.step),
            "sparsity_coefficient": inputs.coefficient,
            "nonfinite_step": new.nonfinite_step,
            **extra,
        }
        return new, metrics

    def _in_data_units(self, state: TrainState, losses: Losses) -> dict[str, jax.Array]:
        """Returns mse, fvu and l1, mse and l1 in the units of the data.

        A crosscoder's are in the SAE's own units, since each of its sites has a scale of its own.
        """
        unit = jnp.ones(()) if state.target_scale.ndim else state.target_scale
        return {
            "mse": losses.mse / unit**2,
            "fvu": losses.mse / self._variance,
            "l1": losses.l1 / unit,
        }

    def heldout_means(self, state: TrainState, rows: jax.Array) -> dict[str, jax.Array]:
        """Returns eval_loss, eval_fvu and eval_l0, by name: means over a batch (B, width).

        The SAE is used as after training, and the sparsity coefficient is the last step's. `fired`
        is there too: the latents (d_sae,) that fired on any row, on every device.
        """
        sae, x, y = self.scaled(state, rows)
        nothing_dead = jnp.zeros(self.config.sae.d_sae, bool, out_sharding=out_sharding(PER_LATENT))
        inputs = self._loss_inputs(state, self._lengths.steps, nothing_dead)
        losses = sae.training_loss(x, y, dataclasses.replace(inputs, training=False))
        return {
            "eval_loss": losses.total,
            "eval_fvu": losses.mse / self._variance,
            "eval_l0": losses.l0,
            "fired": jax.reshard(losses.fired, PartitionSpec(None)),
        }

    def _row_losses(self, state: TrainState, rows: jax.Array) -> jax.Array:
        """Returns the loss (B,) of each row of a batch."""
        sae, x, y = self.scaled(state, rows)
        inputs = self._loss_inputs(state, state.step, dead=jnp.zeros(()))
        return sae.scaled_row_losses(x, y, inputs.coefficient)

    def _loss_inputs(self, state: TrainState, step, dead: jax.Array) -> LossInputs:
        return controls.controls_at(
            self.config.sae, step, self._lengths, state.log_coefficient, dead, self._k
        )


def idleness(config: Config) -> tuple[int, int]:
    """Returns how many tokens `TrainState.idle_tokens` counts as one, and at how many it is dead.

    A run's batches have all the same size, so that steps are as exact as tokens.
    """
    tokens, batch = dead_after_tokens(config), config.data.batch_size
    unit = 1 if tokens <= _LARGEST - batch else batch
    return unit, min(-(-tokens // unit), _LARGEST)  # no run has so many steps
