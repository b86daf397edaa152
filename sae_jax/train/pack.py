"""Packs: runs of one shape that are trained by one program.

What differs between the runs is an argument of the program. All else, and the arithmetic, is
`step.Trainer`'s.

The mesh's `run` axis cuts the devices into groups. Each group has runs of its own and does not
communicate with the others. The runs of a pack are computed in rounds, each of which has as many
runs of every group as a device computes at once, as one batched operation. A CPU computes one,
because it has no spare units that a larger operation would fill, and a GPU all that it has. A TPU
computes as many as its core's own memory holds: with more the compiler writes to the other memory
what it keeps there of a single run. Every array of a round's state has a leading run axis, unless
it is that of a single run: XLA would then copy the state in every step.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax.config import Config
from sae_jax.fields import types_of
from sae_jax.ops import tpu_memory
from sae_jax.ops.sharding import BATCHED_RUNS, on_cpu, on_tpu
from sae_jax.train.schedule_steps import ScheduleSteps
from sae_jax.train.step import Trainer, TrainState

# Fields in which the runs of a pack may differ. The program is compiled for the largest sae.k.
VARIED = (
    "optimizer.learning_rate",
    "optimizer.b1",
    "optimizer.b2",
    "sae.sparsity_coefficient",
    "sae.k",
    "train.seed",
)


def get_field(config: Config, field: str):
    """Returns the value of a dotted field, such as "sae.k"."""
    section, name = field.split(".")
    return getattr(getattr(config, section), name)


def set_fields(config: Config, values: dict) -> Config:
    """Returns `config` with dotted fields replaced, for example {"sae.k": 32}.

    Values are not checked, so they may be traced, or None. A field that the architecture does not
    have is left out.
    """
    config = copy.copy(config)
    for field, value in values.items():
        section, name = field.split(".")
        part = copy.copy(getattr(config, section))
        if name in types_of(type(part)):
            object.__setattr__(part, name, value)  # past what checks a config when it is made
            object.__setattr__(config, section, part)
    return config


States = tuple[TrainState, ...]
"""The states of the runs of a pack, one for each round."""


class PackTrainer:
    """Trains several runs together, whose configs differ in nothing but the fields in `VARIED`.

    Their states are a tuple of TrainStates, one for each round, whose arrays have a run axis unless
    a round has one run.

    Attributes:
      steps: the steps of a whole run.
      trainers: the `Trainer` of each run alone.
      slots: the number of runs, rounded up to a multiple of the mesh's run axis. The slots that are
        left over have copies of the last run.
    """

    def __init__(self, configs: Sequence[Config], steps: int, variance: float):
        """Prepares the programs under the ambient mesh.

        Args:
          configs: the resolved config of each run.
          steps: the steps of a whole run.
          variance: the variance of the scaled targets, summed over d_out, as for `Trainer`.
        """
        self.steps = steps
        self.trainers = [Trainer(config, steps, variance) for config in configs]
        configs = [*configs, *[configs[-1]] * (-len(configs) % _num_groups())]
        self.slots = len(configs)
        values = {field: [get_field(config, field) for config in configs] for field in VARIED}
        # What does not differ stays a constant of the program.
        values = {field: v for field, v in values.items() if len(set(v)) > 1}
        common = set_fields(configs[0], dict.fromkeys(values))
        if "sae.k" in values:
            common = set_fields(common, {"sae.k": max(values["sae.k"])})
        self._step = _jitted_step(tuple(tpu_memory.compiler_options().items()))
        self._at_once = _num_groups() * _runs_at_once(common, self.slots // _num_groups())
        self._axis = ("run" if _num_groups() > 1 else None,) if self._at_once > 1 else ()
        lengths = ScheduleSteps.from_config(configs[0], steps)
        if common.sae.anneals:
            self._key, traced_lengths = ProgramKey(common, variance, lengths), None
        else:  # packs of runs of any length share the program
            common = set_fields(common, _NO_LENGTHS)
            self._key, traced_lengths = ProgramKey(common, variance, None), lengths
        rounds = [slice(i, i + self._at_once) for i in range(0, self.slots, self._at_once)]
        self._per_run = [
            {
                "values": {field: self._of_round(v[runs]) for field, v in values.items()},
                "lengths": jax.tree.map(
                    lambda n: self._of_round([n] * self._at_once), traced_lengths
                ),
                "slot": self._of_round(range(self._at_once)),  # to map over, whatever else there is
            }
            for runs in rounds
        ]

    def init(self, b_dec: jax.Array, scale, target_scale) -> States:
        """Returns fresh states. b_dec and the scales are as for `Trainer.init`, for all runs."""
        shared = b_dec, jnp.float32(scale), jnp.float32(target_scale)
        return tuple(_init(self._key, per_run, *shared) for per_run in self._per_run)

    def abstract(self) -> States:
        """Returns states of jax.ShapeDtypeStructs: shapes, types and shardings without arrays."""
        mesh = jax.sharding.get_mesh()

        def of_round(a):
            sharding = NamedSharding(mesh, P(*self._axis, *a.sharding.spec))
            shape = (self._at_once, *a.shape) if self._axis else a.shape
            return jax.ShapeDtypeStruct(shape, a.dtype, sharding=sharding)

        return (jax.tree.map(of_round, self.trainers[0].abstract()),) * len(self._per_run)

    def blank(self) -> States:
        """Returns states of zeros, for `put_run` to put those of runs in."""

        def zeros(a):
            return jnp.zeros(a.shape, a.dtype, out_sharding=a.sharding.spec)

        of_rounds = self.abstract()
        make = jax.jit(lambda: jax.tree.map(zeros, of_rounds[0]))
        return tuple(make() for _ in of_rounds)

    def step(self, states: States, rows: jax.Array) -> tuple[States, dict[str, jax.Array]]:
        """Updates every run from a batch (B, width).

        Returns the new states, in the memory of the old ones, and metrics (slots,) by name.
        """
        done = [self.step_round(i, state, rows) for i, state in enumerate(states)]
        new, metrics = zip(*done, strict=True)
        return new, self._of_all(metrics)

    def step_round(self, i: int, state: TrainState, rows: jax.Array):
        """Updates the runs of round `i`. Returns their new state and their metrics by name."""
        return self._step(self._key, state, self._per_run[i], rows)

    def trace_round(self, i: int, state: TrainState, rows: jax.Array) -> jax.stages.Traced:
        """Returns `step_round` traced, for arrays or jax.ShapeDtypeStructs."""
        return self._step.trace(self._key, state, self._per_run[i], rows)

    def evaluate(self, states: States, rows: jax.Array) -> dict[str, jax.Array]:
        """Returns `Trainer.heldout_means` of every run, (slots,) by name."""
        of_rounds = zip(states, self._per_run, strict=True)
        return self._of_all([_evaluate(self._key, *of_round, rows) for of_round in of_rounds])

    def get_run(self, states: States, i: int) -> TrainState:
        """Returns the state of run `i`, without a run axis, on every group of devices.

        It may be a part of `states`, and is lost with them.
        """
        of_round, place = divmod(i, self._at_once)
        return _get_run(states[of_round], place) if self._axis else states[of_round]

    def put_run(self, states: States, i: int, state: TrainState) -> States:
        """Returns `states` with `state` for run `i`, of which it may become a part.

        The old ones are lost.
        """
        of_round, place = divmod(i, self._at_once)
        new = _put_run(states[of_round], place, state) if self._axis else state
        return (*states[:of_round], new, *states[of_round + 1 :])

    def _of_all(self, of_rounds: Sequence[dict]) -> dict[str, jax.Array]:
        """Returns the values of all rounds as arrays (slots,), by name."""
        if self._axis and len(of_rounds) == 1:
            return of_rounds[0]
        return _joined(of_rounds, bool(self._axis))

    def _of_round(self, values: Sequence) -> np.ndarray:
        """Returns numbers of the runs of a round, with a run axis if states have one."""
        values = np.asarray(values if self._axis else values[0])
        return values.astype(np.float32 if values.dtype.kind == "f" else np.int32)


class SingleTrainer:
    """A pack of one run, of a trainer that may have an extra loss, which no config names.

    It has the interface of `PackTrainer`. Its state has no run axis.
    """

    def __init__(self, trainer: Trainer):
        self.steps = trainer.steps
        self.trainers = [trainer]
        self.init, self.step, self.evaluate = trainer.init, trainer.step, trainer.evaluate

    def blank(self) -> None:
        """Returns None: `put_run` needs no states to put the only run's in."""

    def get_run(self, states: TrainState, i: int) -> TrainState:
        """Returns `states`, which is the state of the only run."""
        return states

    def put_run(self, states: TrainState | None, i: int, state: TrainState) -> TrainState:
        """Returns `state`, which becomes that of the only run."""
        return state


# ------------------------------------------------------------------ the compiled programs


class ProgramKey(NamedTuple):
    """Everything that a program is compiled for. Packs that agree in it share the program.

    Attributes:
      config: the runs' config. Fields in which they differ are None, but `sae.k` is the largest.
      variance: as for `PackTrainer`.
      lengths: the runs' schedules, if the program depends on them; None if they are arguments.
    """

    config: Config
    variance: float
    lengths: ScheduleSteps | None

    def trainer(self, of_run: dict) -> Trainer:
        """Returns the trainer of a run, given its traced values and lengths."""
        values = dict(of_run["values"])
        k, lengths = values.pop("sae.k", None), self.lengths or of_run["lengths"]
        config = set_fields(self.config, values)
        return Trainer(config, lengths.steps, self.variance, k, lengths)


_NO_LENGTHS = {
    "train.tokens": 0,
    "optimizer.warmup_fraction": 0.0,
    "optimizer.decay_fraction": 0.0,
    "sae.sparsity_warmup_fraction": None,
}


@functools.partial(jax.jit, static_argnums=0)
def _init(key: ProgramKey, per_run: dict, *shared) -> TrainState:
    def init_group(per_run, *shared):
        return _for_each_run(lambda of_run: key.trainer(of_run).init_traced(*shared), per_run)

    return _on_groups(init_group, 1)(_shard_over_groups(per_run), *shared)


@functools.cache
def _jitted_step(compiler_options: tuple) -> Callable:
    """Returns `_step` jitted: one function for all packs, which share its programs."""
    options = dict(compiler_options)
    return jax.jit(_step, static_argnums=0, donate_argnums=1, compiler_options=options)


def _step(key: ProgramKey, states: TrainState, per_run: dict, rows: jax.Array):
    def step_group(states, per_run, rows):
        def update(state, of_run):
            return key.trainer(of_run).update(state, rows)

        return _for_each_run(update, states, per_run)

    states, metrics = _on_groups(step_group, 2)(states, _shard_over_groups(per_run), rows)
    return states, _replicated(metrics)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(key: ProgramKey, states: TrainState, per_run: dict, rows: jax.Array) -> dict:
    def evaluate_group(states, per_run, rows):
        def means(state, of_run):
            return key.trainer(of_run).heldout_means(state, rows)

        return _for_each_run(means, states, per_run)

    return _replicated(_on_groups(evaluate_group, 2)(states, _shard_over_groups(per_run), rows))


@functools.partial(jax.jit, static_argnums=1)
def _joined(of_rounds: Sequence[dict], have_run_axis: bool) -> dict[str, jax.Array]:
    """Returns `PackTrainer._of_all` of several rounds, or of runs without an axis."""
    join = jnp.concatenate if have_run_axis else jnp.stack
    return jax.tree.map(lambda *arrays: join(arrays), *of_rounds)


def _runs_at_once(config: Config, runs: int) -> int:
    """Returns how many of a group's runs are computed at once, a divisor of their number."""
    if on_cpu():
        return 1
    if not on_tpu():
        return runs
    sae, mesh = config.sae, jax.sharding.get_abstract_mesh().shape
    tokens, latents = config.data.batch_size // mesh["data"], sae.d_sae // mesh["model"]
    parameters = (sae.d_in + sae.d_out) * latents
    picked_rows = tokens * (sae.k or 0) * max(sae.d_in, sae.d_out)
    size = 4 * (3 * parameters + tokens * latents + picked_rows)
    most = tpu_memory.capacity()
    return next(n for n in range(runs, 0, -1) if runs % n == 0 and (n == 1 or n * size <= most))


def _shard_over_groups(per_run: dict) -> dict:
    """Gives each group of devices the values of its own runs."""
    if _num_groups() == 1:
        return per_run
    return jax.tree.map(lambda a: jax.reshard(a, P("run")), per_run)


def _replicated(values):
    """Puts arrays on every device, so that any process can read them."""
    return jax.tree.map(lambda a: jax.reshard(a, P()), values)


@jax.jit
def _get_run(states: TrainState, i) -> TrainState:
    """Returns the state of run i of a round, without a run axis, on every group of devices."""

    def get_from_group(states, i):
        slot, is_here = _local_slot(states, i)

        def pick(a):
            of_run = jax.lax.dynamic_index_in_dim(a, slot, keepdims=False)
            if _num_groups() == 1:
                return of_run
            return jax.lax.psum(jnp.where(is_here, of_run, jnp.zeros_like(of_run)), "run")

        return jax.tree.map(pick, states)

    return _on_groups(get_from_group, 1, out=P())(states, i)


@functools.partial(jax.jit, donate_argnums=0)
def _put_run(states: TrainState, i, state: TrainState) -> TrainState:
    """Returns the states of a round with that of run i replaced, in the memory of the old ones."""

    def put_into_group(states, i, state):
        slot, is_here = _local_slot(states, i)

        def put(a, new):
            old = jax.lax.dynamic_index_in_dim(a, slot, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(a, jnp.where(is_here, new, old), slot, 0)

        return jax.tree.map(put, states, state)

    return _on_groups(put_into_group, 1)(states, i, state)


def _local_slot(states: TrainState, i):
    """Returns the slot of run i within this group of devices, and whether the group has the run."""
    size = len(states.step)
    slot = i - (jax.lax.axis_index("run") * size if _num_groups() > 1 else 0)
    return jnp.clip(slot, 0, size - 1), (slot >= 0) & (slot < size)


def _num_groups() -> int:
    """Returns the number of groups of devices, the length of the ambient mesh's run axis."""
    return jax.sharding.get_abstract_mesh().shape["run"]


def _on_groups(function: Callable, stacked: int, out: P | None = None) -> Callable:
    """Returns a function that calls `function` on each group of devices, with the group's own runs.

    The first `stacked` arguments have a run axis, the others are shared. `out` is the spec of the
    results, which have a run axis by default.
    """
    if _num_groups() == 1:
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


def _for_each_run(function: Callable, *arguments):
    """Calls `function` for each run that a device computes at once.

    Arguments and results are trees of arrays with a run axis, if those of a round have one. The
    last argument is what differs between the runs.
    """
    runs = np.shape(arguments[-1]["slot"])
    if not runs:
        return function(*arguments)
    if runs != (1,):
        return jax.vmap(function, axis_name=BATCHED_RUNS)(*arguments)
    of_run = jax.tree.map(lambda a: jax.lax.squeeze(a, [0]), arguments)
    return jax.tree.map(lambda a: jax.lax.expand_dims(a, [0]), function(*of_run))
