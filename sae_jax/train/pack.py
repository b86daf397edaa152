"""Runs of one shape trained as one program: every array of their state has a leading run axis.

What differs between the runs is an argument of the program; all else, and the arithmetic, is
`step.Trainer`'s. On the mesh's `run` axis each group of devices has runs of its own, and talks to
no other. A CPU computes its runs one after the other, in place: it has no spare units that a larger
operation would fill. Elsewhere they are one batched operation.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sae_jax.config import Config
from sae_jax.fields import types_of
from sae_jax.ops.sharding import BATCHED_RUNS, on_cpu
from sae_jax.train.schedule_steps import ScheduleSteps
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
    """Returns `config` with dotted fields replaced, unchecked: values may be traced, or None. A
    field that the architecture does not have is left out."""
    config = copy.copy(config)
    for field, value in values.items():
        section, name = field.split(".")
        part = copy.copy(getattr(config, section))
        if name in types_of(type(part)):
            object.__setattr__(part, name, value)  # past what checks a config when it is made
            object.__setattr__(config, section, part)
    return config


class PackTrainer:
    """`Trainer` for several configs that are the same but for `VARIED`, under the ambient mesh.

    States are TrainStates whose arrays have a leading axis of `slots`: the number of runs, filled
    up to a multiple of the mesh's run axis with copies of the last. `trainers`: of each run alone.
    """

    def __init__(self, configs: Sequence[Config], steps: int, variance: float):
        self.steps = steps
        self.trainers = [Trainer(config, steps, variance) for config in configs]
        configs = [*configs, *[configs[-1]] * (-len(configs) % _groups())]
        self.slots = len(configs)
        values = {field: [get_field(config, field) for config in configs] for field in VARIED}
        # What does not differ stays a constant of the program.
        values = {field: v for field, v in values.items() if len(set(v)) > 1}
        common = set_fields(configs[0], dict.fromkeys(values))
        if "sae.k" in values:
            common = set_fields(common, {"sae.k": max(values["sae.k"])})
        lengths = ScheduleSteps.from_config(configs[0], steps)
        if common.sae.anneals:
            self._key, own = ProgramKey(common, variance, lengths), None
        else:  # nor does it matter for the program how long the runs are
            self._key, own = ProgramKey(set_fields(common, _NO_LENGTHS), variance, None), lengths
        self._own = {
            "values": {field: _array(v) for field, v in values.items()},
            "lengths": jax.tree.map(lambda n: _array([n] * self.slots), own),
            "slot": _array(range(self.slots)),  # an axis to map over, whatever else there is
        }

    def init(self, b_dec: jax.Array, scale, target_scale) -> TrainState:
        """Fresh states; b_dec and scales as for `Trainer.init`, one for all runs."""
        return _init(self._key, self._own, b_dec, jnp.float32(scale), jnp.float32(target_scale))

    def blank(self) -> TrainState:
        """States of zeros, to put those of runs in."""
        one = self.trainers[0].abstract()

        def zeros(a):
            spec = P(*_run_axis(), *a.sharding.spec)
            return jnp.zeros((self.slots, *a.shape), a.dtype, out_sharding=spec)

        return jax.jit(lambda: jax.tree.map(zeros, one))()

    def step(self, states: TrainState, rows: jax.Array):
        """One update of every run from a batch (B, width): new states, in the memory of the old,
        and metrics (slots,)."""
        return _step(self._key, states, self._own, rows)

    def evaluate(self, states: TrainState, rows: jax.Array) -> dict[str, jax.Array]:
        """`Trainer.heldout_means` of every run: (slots,) each."""
        return _evaluate(self._key, states, self._own, rows)

    def get_run(self, states: TrainState, i: int) -> TrainState:
        """Returns the state of run `i`, as that of the run alone."""
        return get_run(states, i)

    def put_run(self, states: TrainState, i: int, state: TrainState) -> TrainState:
        """Returns `states` with that of run `i` replaced; the old ones' memory is used again."""
        return put_run(states, i, state)


class SingleTrainer:
    """A pack of one run, whose state has no run axis.

    It has the interface of `PackTrainer`, in which a single run takes longer: on two cores a step
    of top-k 8% (d 512, 4,096 latents) to 13% (d 768, 24,576 latents), since the state is copied
    into and out of the loop over runs.
    """

    def __init__(self, trainer: Trainer):
        self.steps = trainer.steps
        self.trainers = [trainer]
        self.init, self.step, self.evaluate = trainer.init, trainer.step, trainer.evaluate

    def blank(self) -> None:
        """Returns nothing: `put_run` needs no states to put the only one in."""

    def get_run(self, states: TrainState, i: int) -> TrainState:
        return states

    def put_run(self, states: TrainState | None, i: int, state: TrainState) -> TrainState:
        return state


# ------------------------------------------------------------------ the compiled programs


class ProgramKey(NamedTuple):
    """All that a program is compiled for. Of `config`, fields that runs differ in are None, and
    `sae.k` is the largest. Packs that agree in it share the program."""

    config: Config
    variance: float
    lengths: ScheduleSteps | None  # where they matter otherwise than as numbers in the step

    def trainer(self, own: dict) -> Trainer:
        """Of the run to which the traced values belong."""
        values = dict(own["values"])
        k, lengths = values.pop("sae.k", None), self.lengths or own["lengths"]
        config = set_fields(self.config, values)
        return Trainer(config, lengths.steps, self.variance, k, lengths)


_NO_LENGTHS = {
    "train.tokens": 0,
    "optimizer.warmup_fraction": 0.0,
    "optimizer.decay_fraction": 0.0,
    "sae.sparsity_warmup_fraction": None,
}


@functools.partial(jax.jit, static_argnums=0)
def _init(key: ProgramKey, own: dict, *shared) -> TrainState:
    def local(own, *shared):
        return _one_by_one(lambda own: key.trainer(own).init_traced(*shared), own)

    return _on_groups(local, 1)(_along_runs(own), *shared)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(key: ProgramKey, states: TrainState, own: dict, rows: jax.Array):
    def local(states, own, rows):
        return _in_place(lambda state, own: key.trainer(own).update(state, rows), states, own)

    states, metrics = _on_groups(local, 2)(states, _along_runs(own), rows)
    return states, _everywhere(metrics)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(key: ProgramKey, states: TrainState, own: dict, rows: jax.Array) -> dict:
    def local(states, own, rows):
        def means(pair):
            return key.trainer(pair[1]).heldout_means(pair[0], rows)

        return _one_by_one(means, (states, own))

    return _everywhere(_on_groups(local, 2)(states, _along_runs(own), rows))


def _array(values) -> np.ndarray:
    values = np.asarray(values)
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int32)


def _along_runs(own: dict) -> dict:
    return jax.tree.map(lambda a: jax.reshard(a, P(*_run_axis())), own)


def _everywhere(values):
    """Arrays (slots,) on every device, so that any process can read them."""
    return jax.tree.map(lambda a: jax.reshard(a, P(None)), values)


def _run_axis() -> tuple:
    """The spec of an array's run axis."""
    return ("run" if _groups() > 1 else None,)


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
    if on_cpu():
        return jax.lax.map(function, stacked)
    return jax.vmap(function, axis_name=BATCHED_RUNS)(stacked)


def _in_place(update: Callable, states: TrainState, values: dict):
    """`update(state, own values) -> (state, metrics)` of each run; the states' memory is used
    again."""
    if not on_cpu():
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
