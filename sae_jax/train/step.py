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
from sae_jax.ops.mesh import PER_LATENT, out_sharding
from sae_jax.sae.base import Losses
from sae_jax.train import optimizer

_NEVER = -1


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run is, between two steps. The data's place is the step."""

    parameters: dict[str, jax.Array]  # float32
    optimizer: optax.OptState
    idle_tokens: jax.Array  # (d_sae,) int32: tokens since the latent last fired
    scale: jax.Array  # float32: the inputs' normalisation
    step: jax.Array  # int32: steps done
    nonfinite_step: jax.Array  # int32: the first step whose loss or gradient was not finite, or -1


class Trainer:
    """What a step needs beyond state and batch: the resolved config, the number of steps, and
    the variance of the activations, summed over d, that FVU is measured against."""

    def __init__(self, config: Config, steps: int, variance: float):
        self.config = config
        self._variance = variance
        self._steps = steps
        self._architecture = saes.architecture(config.sae)
        self._learning_rate = optimizer.schedule(config.optimizer, steps)
        self._optimizer = optimizer.make(config.optimizer, steps, config.sae.unit_norm_decoder)
        self.step: Callable = jax.jit(self._step, donate_argnums=0)
        self.evaluate: Callable = jax.jit(self._evaluate)

    def init(self, b_dec: jax.Array, scale: float) -> TrainState:
        """A fresh state under the ambient mesh, every array created in its sharding. b_dec
        (d_in,) in the units of the activations."""
        return jax.jit(self._init)(b_dec, jnp.float32(scale))

    def abstract(self) -> TrainState:
        """The shapes, types and shardings of a state, without its arrays."""
        mesh = jax.sharding.get_mesh()

        def placed(a):
            spec = a.sharding.spec if a.sharding else PartitionSpec()  # a scalar has none
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

        floats = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((self.config.sae.d_in,), ())]
        return jax.tree.map(placed, jax.eval_shape(self._init, *floats))

    def _init(self, b_dec, scale):
        key = jax.random.key(self.config.train.seed)
        parameters = self._architecture.init_parameters(key, self.config.sae, b_dec * scale)
        return TrainState(
            parameters=parameters,
            optimizer=self._optimizer.init(parameters),
            idle_tokens=jnp.zeros(
                self.config.sae.d_sae, jnp.int32, out_sharding=out_sharding(PER_LATENT)
            ),
            scale=scale,
            step=jnp.zeros((), jnp.int32),
            nonfinite_step=jnp.full((), _NEVER, jnp.int32),
        )

    def _losses(self, parameters, scale, x, dead, coefficient) -> Losses:
        sae = self._architecture(self.config.sae, parameters)
        return sae.loss(x.astype(jnp.float32) * scale, dead, coefficient)

    def _coefficient(self, step):
        """The sparsity coefficient of a step: linear from 0 over the warm-up."""
        config = self.config.sae
        if config.sparsity_coefficient is None:
            return jnp.zeros(())
        warmup = max(1, round(config.sparsity_warmup_fraction * self._steps))
        return config.sparsity_coefficient * jnp.minimum(1.0, (step + 1) / warmup)

    def _step(self, state: TrainState, x: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update from a batch x (B, d_in). A step whose loss or gradient is not finite is
        undone where such steps are to be skipped; otherwise the run ends at the next look at the
        metrics, and its state with it."""
        dead = state.idle_tokens >= self.config.sae.dead_after_tokens
        coefficient = self._coefficient(state.step)

        def total(parameters):
            losses = self._losses(parameters, state.scale, x, dead, coefficient)
            return losses.total, losses

        (_, losses), gradients = jax.value_and_grad(total, has_aux=True)(state.parameters)
        gradient_norm = optax.tree.norm(gradients)
        updates, optimizer_state = self._optimizer.update(
            gradients, state.optimizer, state.parameters
        )
        idle = jnp.where(losses.fired, 0, jnp.minimum(state.idle_tokens, 2**30) + x.shape[0])
        finite = jnp.isfinite(losses.total) & jnp.isfinite(gradient_norm)
        first_time = ~finite & (state.nonfinite_step == _NEVER)
        new = TrainState(
            parameters=optax.apply_updates(state.parameters, updates),
            optimizer=optimizer_state,
            idle_tokens=idle,
            scale=state.scale,
            step=state.step + 1,
            nonfinite_step=jnp.where(first_time, state.step, state.nonfinite_step),
        )
        if self.config.train.on_nonfinite == "skip":
            counters = {"step": new.step, "nonfinite_step": new.nonfinite_step}
            unchanged = dataclasses.replace(state, **counters)
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, unchanged)
        mse = losses.mse / state.scale**2
        metrics = {
            "loss": losses.total,
            "mse": mse,
            "fvu": mse / self._variance,
            "l0": losses.l0,
            "l1": losses.l1 / state.scale,
            "dead_fraction": jnp.mean(dead.astype(jnp.float32)),
            "grad_norm": gradient_norm,
            "lr": self._learning_rate(state.step),
            "sparsity_coefficient": coefficient,
            "nonfinite_step": new.nonfinite_step,
        }
        return new, metrics

    def _evaluate(self, state: TrainState, x: jax.Array) -> dict[str, jax.Array]:
        """Means over a batch of held-out rows, at the full sparsity coefficient."""
        nothing_dead = jnp.zeros(self.config.sae.d_sae, bool, out_sharding=out_sharding(PER_LATENT))
        coefficient = jnp.asarray(self.config.sae.sparsity_coefficient or 0.0)
        losses = self._losses(state.parameters, state.scale, x, nothing_dead, coefficient)
        return {
            "eval_loss": losses.total,
            "eval_fvu": losses.mse / state.scale**2 / self._variance,
            "eval_l0": losses.l0,
        }
