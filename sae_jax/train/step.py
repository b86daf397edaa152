"""The training state and the jitted step."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from sae_jax import sae as saes
from sae_jax.config import Config
from sae_jax.ops.sharding import PER_LATENT, out_sharding, zero_gather, zero_shard
from sae_jax.python_files import attribute_of
from sae_jax.sae import SAE, Losses, LossInputs
from sae_jax.train import controls, optimizer
from sae_jax.train.schedule_steps import ScheduleSteps

_NEVER = -1

ExtraLoss = Callable[[SAE, jax.Array, jax.Array], jax.Array]
"""A term that is added to the training loss: of the SAE, and of inputs (B, d_in) and targets
(B, d_out) in the SAE's own units, a scalar. It is differentiated in the SAE's parameters, and is
part of any architecture's loss, one of the user's own too.

On a mesh arrays carry their sharding in their type: batches are sharded over `data`, what has an
axis of d_sae over `model`. A product that sums over d_sae names where its result goes,
`matmul_f32(latents, sae.w_dec[...], BATCH)` of `ops.sharding`, or
`jnp.matmul(..., out_sharding=out_sharding(BATCH))`; so does an index into w_dec. Sums over a whole
array need nothing. `sae.training_loss` and `sae.activate` show how."""


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run is, between two steps. The data's place is the step."""

    parameters: dict[str, jax.Array]  # float32; with mesh.zero spread over `data`,
    optimizer: tuple  # the state of optax.chain; its moments are spread likewise
    idle_tokens: jax.Array  # (d_sae,) int32: tokens since the latent last fired
    scale: jax.Array  # float32: the inputs' normalisation; a crosscoder's (d_in,)
    target_scale: jax.Array  # float32: the targets'
    log_coefficient: jax.Array  # float32: ln of what multiplies the sparsity coefficient
    last_l0: jax.Array  # float32: of the step before, which a target L0 is steered by
    step: jax.Array  # int32: steps done
    nonfinite_step: jax.Array  # int32: the first step whose loss or gradient was not finite, or -1


class Trainer:
    """What a step needs beyond state and batch.

    Args:
      config: the resolved config.
      steps: of the whole run.
      variance: of the scaled targets, summed over d_out; FVU is measured against it.
      k, lengths: the run's own, where the config is its whole pack's.
      extra_loss: a term added to the training loss, logged as the metric `extra_loss`. None: what
        `sae.extra_loss` of the config names, if anything. The losses on held-out rows are without
        it.
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
        self.config = config
        self.steps = steps
        self._variance = variance
        self._k = k
        self._lengths = lengths or ScheduleSteps.from_config(config, steps)
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
        self.step: Callable = jax.jit(self.update, donate_argnums=0)
        self.evaluate: Callable = jax.jit(self.heldout_means)
        self.row_losses: Callable = jax.jit(self._row_losses)

    def init(self, b_dec: jax.Array, scale, target_scale=None) -> TrainState:
        """A fresh state under the ambient mesh, every array created in its sharding. b_dec
        (d_out,) in the units of the targets; the scales: numbers, or (d_in,) for a crosscoder."""
        target_scale = scale if target_scale is None else target_scale
        return jax.jit(self.init_traced)(b_dec, jnp.float32(scale), jnp.float32(target_scale))

    def abstract(self) -> TrainState:
        """The shapes, types and shardings of a state, without its arrays."""
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
        """`init`, to be traced."""
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
        """Parameters, or what there is one of for each, as the state keeps them."""
        return zero_shard(per_parameter) if self.config.mesh.zero else per_parameter

    def from_storage(self, state: TrainState) -> dict[str, jax.Array]:
        """The parameters as the operations take them."""
        return zero_gather(state.parameters) if self.config.mesh.zero else state.parameters

    def scaled(self, state: TrainState, rows) -> tuple[SAE, jax.Array, jax.Array]:
        """The SAE in its own units, and inputs and targets of rows (B, width) in them."""
        sae = self._sae(self.from_storage(state))
        x, y = sae.split(rows.astype(jnp.float32))
        return sae, x * state.scale, y * state.target_scale

    def _sae(self, parameters: dict[str, jax.Array]) -> SAE:
        return self._architecture.from_parameters(self.config.sae, parameters)

    def dead(self, state: TrainState) -> jax.Array:
        """(d_sae,) bool."""
        return state.idle_tokens >= self.config.sae.dead_after_tokens

    def update(self, state: TrainState, rows: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update from a batch (B, width). A step whose loss or gradient is not finite is
        undone where such steps are to be skipped; otherwise the run ends at the next look at the
        metrics, and its state with it."""
        sae, x, y = self.scaled(state, rows)
        dead = self.dead(state)
        now = self._controls(state, state.step, dead)

        def total(parameters):
            sae = self._sae(parameters)
            losses, extra = sae.training_loss(x, y, now), {}
            if self._extra_loss is not None:
                extra = {"extra_loss": self._extra_loss(sae, x, y)}
                losses = losses._replace(total=losses.total + extra["extra_loss"])
            return losses.total, (losses, extra)

        (_, (losses, extra)), gradients = jax.value_and_grad(total, has_aux=True)(sae.parameters())
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
        idle = jnp.minimum(state.idle_tokens, 2**30) + rows.shape[0]
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
            "sparsity_coefficient": now.coefficient,
            "nonfinite_step": new.nonfinite_step,
            **extra,
        }
        return new, metrics

    def _in_data_units(self, state: TrainState, losses: Losses) -> dict[str, jax.Array]:
        """mse and l1 in the units of the targets; of a crosscoder, whose sites have one each, in
        the SAE's own."""
        unit = jnp.ones(()) if state.target_scale.ndim else state.target_scale
        return {
            "mse": losses.mse / unit**2,
            "fvu": losses.mse / self._variance,
            "l1": losses.l1 / unit,
        }

    def heldout_means(self, state: TrainState, rows: jax.Array) -> dict[str, jax.Array]:
        """Means over a batch of held-out rows, as the SAE is used after training, at the last
        step's sparsity coefficient."""
        sae, x, y = self.scaled(state, rows)
        nothing_dead = jnp.zeros(self.config.sae.d_sae, bool, out_sharding=out_sharding(PER_LATENT))
        last = self._controls(state, self._lengths.steps, nothing_dead)
        losses = sae.training_loss(x, y, dataclasses.replace(last, training=False))
        return {
            "eval_loss": losses.total,
            "eval_fvu": losses.mse / self._variance,
            "eval_l0": losses.l0,
        }

    def _row_losses(self, state: TrainState, rows: jax.Array) -> jax.Array:
        """(B,) loss of each row of a batch."""
        sae, x, y = self.scaled(state, rows)
        now = self._controls(state, state.step, dead=jnp.zeros(()))
        return sae.scaled_row_losses(x, y, now.coefficient)

    def _controls(self, state: TrainState, step, dead: jax.Array) -> LossInputs:
        return controls.controls_at(
            self.config.sae, step, self._lengths, state.log_coefficient, dead, self._k
        )
