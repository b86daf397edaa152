"""Runs of one shape trained as one program: every array of their state has a leading run axis.

What differs between the runs is an argument of the program; all else, and the arithmetic, is
`step.Trainer`'s. On the mesh's `run` axis each group of devices has runs of its own, and talks to
no other. A CPU computes its runs one after the other, in place: it has no spare units that a larger
operation would fill. Elsewhere they are one batched operation.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sae_jax.config import Config
from sae_jax.ops.mesh import BATCHED_RUNS
from sae_jax.train.step import Trainer, TrainState

# Fields in which the runs of a pack may differ. sae.k: up to the largest of the pack.
VARIED = (
    "optimizer.learning_rate",
    "optimizer.b1",
    "optimizer.b2",
    "sae.sparsity_coefficient",
    "sae.k",
    "train.seed",
)


def get_field(config: Config, field: str):
    """The value of a dotted field."""
    section, name = field.split(".")
    return getattr(getattr(config, section), name)


def set_fields(config: Config, values: dict) -> Config:
    """`config` with dotted fields replaced, unchecked."""
    for field, value in values.items():
        section, name = field.split(".")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


class PackTrainer:
    """`Trainer` for several configs that are the same but for `VARIED`, under the ambient mesh.

    States are TrainStates whose arrays have a leading axis of `slots`: the number of runs, filled
    up to a multiple of the mesh's run axis with copies of the last. `trainers`: of each run alone.
    """

    def __init__(self, configs: Sequence[Config], steps: int, variance: float):
        self.trainers = [Trainer(config, steps, variance) for config in configs]
        self._steps, self._variance = steps, variance
        self._groups = jax.sharding.get_mesh().shape["run"]
        spare = -len(configs) % self._groups
        configs = [*configs, *[configs[-1]] * spare]
        self.slots = len(configs)
        values = {field: [get_field(config, field) for config in configs] for field in VARIED}
        # Constants stay constants: the program is then that of the run alone.
        values = {field: v for field, v in values.items() if len(set(v)) > 1}
        self._config = configs[0]
        if "sae.k" in values:
            self._config = set_fields(self._config, {"sae.k": max(values["sae.k"])})
        self._values = {
            field: jnp.asarray(np.asarray(v, np.float32 if isinstance(v[0], float) else np.int32))
            for field, v in values.items()
        }
        self._axis = P("run") if self._groups > 1 else P(None)
        self.step: Callable = jax.jit(self._step, donate_argnums=0)
        self.evaluate: Callable = jax.jit(self._evaluate)

    def init(self, b_dec: jax.Array, scale, target_scale) -> TrainState:
        """Fresh states; b_dec and scales as for `Trainer.init`, one for all runs."""
        return jax.jit(self._init)(b_dec, jnp.float32(scale), jnp.float32(target_scale))

    def blank(self) -> TrainState:
        """States of zeros, to put those of runs in."""
        one = self.trainers[0].abstract()
        run = "run" if self._groups > 1 else None

        def zeros(a):
            spec = P(run, *a.sharding.spec)
            return jnp.zeros((self.slots, *a.shape), a.dtype, out_sharding=spec)

        return jax.jit(lambda: jax.tree.map(zeros, one))()

    def _init(self, *shared):
        def local(values, *shared):
            return _one_by_one(lambda own: self._trainer(own).fresh(*shared), values)

        return _on_groups(local, 1)(self._padded(), *shared)

    def _step(self, states: TrainState, rows: jax.Array):
        """One update of every run from a batch (B, width): states, and metrics (slots,)."""

        def local(states, values, rows):
            def update(state, own):
                return self._trainer(own).update(state, rows)

            return _in_place(update, states, values)

        states, metrics = _on_groups(local, 2)(states, self._padded(), rows)
        return states, self._everywhere(metrics)

    def _evaluate(self, states: TrainState, rows: jax.Array) -> dict[str, jax.Array]:
        """`Trainer.heldout_means` of every run: (slots,) each."""

        def local(states, values, rows):
            def means(pair):
                return self._trainer(pair[1]).heldout_means(pair[0], rows)

            return _one_by_one(means, (states, values))

        return self._everywhere(_on_groups(local, 2)(states, self._padded(), rows))

    def _trainer(self, own: dict[str, jax.Array]) -> Trainer:
        """The trainer of the run with these values, traced."""
        own = {field: value for field, value in own.items() if field != _SLOT}
        k = own.pop("sae.k", None)
        return Trainer(set_fields(self._config, own), self._steps, self._variance, k)

    def _padded(self) -> dict[str, jax.Array]:
        """The runs' values, along the run axis; the slot's number makes it an axis in any case."""
        values = self._values | {_SLOT: jnp.arange(self.slots)}
        return {field: jax.reshard(value, self._axis) for field, value in values.items()}

    def _everywhere(self, values):
        """Arrays (slots,) on every device, so that any process can read them."""
        return jax.tree.map(lambda a: jax.reshard(a, P(None)), values)


_SLOT = "slot"


@jax.jit
def get_run(states: TrainState, i) -> TrainState:
    """The state of run i of a pack, as that of the run alone; on every group of devices."""

    def local(states, i):
        j, mine = _local_slot(states, i)

        def pick(a):
            one = jax.lax.dynamic_index_in_dim(a, j, keepdims=False)
            if _groups() == 1:
                return one
            return jax.lax.psum(jnp.where(mine, one, jnp.zeros_like(one)), "run")

        return jax.tree.map(pick, states)

    return _on_groups(local, 1, out=P())(states, i)


@functools.partial(jax.jit, donate_argnums=0)
def put_run(states: TrainState, i, state: TrainState) -> TrainState:
    """`states` of a pack with that of run i replaced."""

    def local(states, i, state):
        j, mine = _local_slot(states, i)

        def put(a, one):
            old = jax.lax.dynamic_index_in_dim(a, j, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(a, jnp.where(mine, one, old), j, 0)

        return jax.tree.map(put, states, state)

    return _on_groups(local, 1)(states, i, state)


def _local_slot(states: TrainState, i):
    """Run i's slot among this group's, and whether it is there at all."""
    size = len(states.step)
    j = i - (jax.lax.axis_index("run") * size if _groups() > 1 else 0)
    return jnp.clip(j, 0, size - 1), (j >= 0) & (j < size)


def _groups() -> int:
    return jax.sharding.get_abstract_mesh().shape["run"]


def _on_groups(function: Callable, stacked: int, out: P | None = None) -> Callable:
    """`function` on each group of devices, given its own runs: the first `stacked` arguments are
    stacked, the others shared. out: of its results, by default stacked."""
    if _groups() == 1:
        return function

    def call(*arguments):
        specs = (P("run"),) * stacked + (P(),) * (len(arguments) - stacked)
        return jax.shard_map(
            function,
            in_specs=specs,
            out_specs=P("run") if out is None else out,
            axis_names={"run"},
            check_vma=False,
        )(*arguments)

    return call


def _one_by_one(function: Callable, stacked):
    """`function` of each run, its results stacked."""
    if _sequential():
        return jax.lax.map(function, stacked)
    return jax.vmap(function, axis_name=BATCHED_RUNS)(stacked)


def _in_place(update: Callable, states: TrainState, values: dict):
    """`update(state, own values) -> (state, metrics)` of each run; the states' memory is used
    again."""
    if not _sequential():
        return jax.vmap(update, axis_name=BATCHED_RUNS)(states, values)

    def take(tree, i):
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)

    def advance(i, carry):
        states, metrics = carry
        return jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0),
            carry,
            update(take(states, i), take(values, i)),
        )

    count = len(jax.tree.leaves(values)[0])
    _, shapes = jax.eval_shape(update, take(states, 0), take(values, 0))
    metrics = jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), shapes)
    return jax.lax.fori_loop(0, count, advance, (states, metrics))


def _sequential() -> bool:
    return jax.default_backend() == "cpu"
