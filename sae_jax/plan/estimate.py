"""Estimates what a training step takes of each device of a mesh.

`estimate` compiles the step for the mesh, which takes seconds to minutes. `screen` traces it, which
takes a second, and is for telling which of many meshes are worth compiling.
"""

import dataclasses
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from sae_jax import sae as saes
from sae_jax.config import Config, MeshConfig
from sae_jax.errors import UserError
from sae_jax.ops.active import by_all_latents
from sae_jax.ops.sharding import BATCH, as_for_accelerators
from sae_jax.plan.chips import Topology
from sae_jax.plan.hlo import Collective, Program
from sae_jax.plan.operations import (
    Operation,
    bytes_of,
    collectives_of,
    flops_of,
    operations_of,
    with_dtypes_of,
)
from sae_jax.plan.traced import read
from sae_jax.train import optimizer
from sae_jax.train.mesh import make_mesh
from sae_jax.train.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one training step takes of one device.

    Attributes:
      config: the resolved config of the run.
      topology: the devices that the step was compiled for.
      mesh: the sizes of the mesh's axes by name.
      bytes: bytes of memory by what they are for.
      total: the most bytes that are in use at a time.
      flops: FLOPs of matrix products by dtype; None where the compiler found no room.
      operations: what the step executes.
      compiled: whether a compiler has seen the step, or only the tracer.
    """

    config: Config
    topology: Topology
    mesh: dict[str, int]
    bytes: dict[str, int]
    total: int
    flops: Counter | None = None
    operations: tuple[Operation, ...] = ()
    compiled: bool = True

    @property
    def fits(self) -> bool:
        """Whether the step fits in memory. On a TPU that is the compiler's verdict."""
        if self.compiled and (self.flops is None or self.topology.is_tpu):
            return self.flops is not None
        return self.total <= self.topology.capacity

    @property
    def memory_bytes(self) -> int:
        """The bytes read from and written to memory."""
        return bytes_of(self.operations)

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """The collectives that the step executes."""
        return collectives_of(self.operations)

    @property
    def seconds(self) -> dict[str, float] | None:
        """The seconds of a step's parts at the published peaks; None where these are unknown.

        Each is what the products, the traffic through memory, and the network take by themselves.
        """
        chip = self.topology.chip
        if chip is None or self.flops is None:
            return None
        return {
            "products": sum(n / getattr(chip, dtype) for dtype, n in self.flops.items()),
            "memory": self.memory_bytes / chip.memory_rate,
            "network": sum(c.sent / self.topology.link_rate(c.group) for c in self.collectives),
        }

    @property
    def step_seconds(self) -> float | None:
        """The seconds of a step at the published peaks, those of one operation after the other;
        None where peaks are unknown.
        """
        if self.topology.chip is None or self.flops is None:
            return None
        return sum(o.seconds(self.topology) for o in self.operations)

    @property
    def compiler_seconds(self) -> float | None:
        """The seconds of a step by the compiler, and by the peaks for operations of which it has no
        estimate; None where it has none at all.
        """
        if all(o.own_seconds is None for o in self.operations):
            return None
        return sum(o.compiler_seconds(self.topology) for o in self.operations)

    @property
    def token_seconds(self) -> float | None:
        """The seconds of a step for each token of its batch; None where peaks are unknown."""
        return self.step_seconds and self.step_seconds / self.config.data.batch_size

    def axes(self, collective: Collective) -> tuple[str, ...]:
        """Returns the mesh axes that a collective runs over."""
        sizes = tuple(self.mesh.values())
        places = [_mesh_coordinates(member, sizes) for member in collective.group]
        return tuple(
            name for name, along in zip(self.mesh, zip(*places, strict=True), strict=True)
            if len(set(along)) > 1
        )  # fmt: skip


def estimate(config: Config, topology: Topology) -> Estimate:
    """Compiles the training step of a resolved config for a topology and returns what it takes.

    No array is made. Raises UserError where the mesh is not of the topology's size.
    """
    known, traced, mesh = _trace(config, topology)
    with jax.set_mesh(mesh), _tracing_for(topology):
        try:
            compiled = traced.lower().compile(compiler_options=topology.compiler_options)
        except jax.errors.JaxRuntimeError as error:
            found = re.search(r"RESOURCE_EXHAUSTED.*?\(([\d.]+)G\)", str(error), re.DOTALL)
            if not found:
                raise
            return dataclasses.replace(known, total=round(float(found.group(1)) * 2**30))
    memory = compiled.memory_analysis()
    sizes = known.bytes | {
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    # What the state of the next step takes beyond the memory of this one's.
    beyond = memory.output_size_in_bytes - memory.alias_size_in_bytes
    clock = topology.chip.clock if topology.chip else None
    operations = operations_of(Program(compiled.as_text()), clock)
    work = read(traced.jaxpr.jaxpr, mesh)
    if topology.stands_in:
        operations = with_dtypes_of(work.operations, operations)
    return dataclasses.replace(
        known,
        bytes=sizes,
        total=sum(sizes.values()) + max(0, beyond),
        flops=flops_of(work.operations),
        operations=operations,
    )


def screen(config: Config, topology: Topology) -> Estimate:
    """Traces the training step of a resolved config for a topology and returns what it takes.

    Products and collectives are those that `estimate` finds; the traffic through memory and the
    temporaries are rougher. Raises UserError where the mesh is not of the topology's size.
    """
    known, traced, mesh = _trace(config, topology)
    work = read(traced.jaxpr.jaxpr, mesh)
    return dataclasses.replace(
        known,
        bytes=known.bytes | {"temporaries": work.temporary_bytes},
        total=known.total + work.temporary_bytes,
        flops=flops_of(work.operations),
        operations=work.operations,
        compiled=False,
    )


def _trace(config: Config, topology: Topology) -> tuple:
    """Returns what is known of a step before it is compiled, the traced step, and its mesh."""
    mesh = make_mesh(config, topology.devices)
    if mesh.size != len(topology.devices):
        raise UserError(
            f"the mesh has {mesh.size} devices, and {topology.name} has {len(topology.devices)}; "
            "give axes whose product that is"
        )
    trainer = Trainer(
        config, steps=max(1, config.train.tokens // config.data.batch_size), variance=1.0
    )
    with jax.set_mesh(mesh), _tracing_for(topology):
        state = trainer.abstract()
        rows = jax.ShapeDtypeStruct(
            (config.data.batch_size, row_width(config)),
            jnp.bfloat16,
            sharding=NamedSharding(mesh, BATCH),
        )
        traced = trainer.step.trace(state, rows)
    sizes = _state_bytes(state) | {"batch": _shard_bytes(rows)}
    known = Estimate(config, topology, dict(mesh.shape), sizes, sum(sizes.values()))
    return known, traced, mesh


def least_bytes(config: Config) -> int:
    """Returns the bytes of a device that no compiler can avoid.

    They are those of the state, of gradients, and what ZeRO gathers. The config's mesh has no -1.
    """
    mesh = config.mesh
    one = _matrix_bytes(config)
    return least_state_bytes(config) + one + (one if mesh.zero and mesh.data > 1 else 0)


def least_state_bytes(config: Config) -> int:
    """Returns the bytes of a device's part of the parameters and Adam's moments of them, but for
    vectors.
    """
    return 3 * _matrix_bytes(config) // (config.mesh.data if config.mesh.zero else 1)


def _matrix_bytes(config: Config) -> int:
    """Returns the bytes of a shard of the encoder and the decoder."""
    sae = config.sae
    return 4 * (sae.d_in + sae.d_out) * sae.d_sae // config.mesh.model


def candidates(config: Config, count: int) -> list[Config]:
    """Returns `config` on every mesh of `count` devices that divides its batch and its dictionary.

    Each mesh is there with and without ZeRO, and those with fewer shards of the dictionary come
    first.
    """
    found = []
    for model in (n for n in range(1, count + 1) if count % n == 0):
        data = count // model
        for zero in (False, True) if data > 1 else (False,):
            shards = model * data if zero else model
            if config.data.batch_size % data == 0 and config.sae.d_sae % shards == 0:
                mesh = MeshConfig(run=1, data=data, model=model, zero=zero)
                found.append(dataclasses.replace(config, mesh=mesh))
    return found


def resolve(config: Config, widths: tuple[int, ...], target: int | None = None) -> Config:
    """Returns `config` with what the architecture decides filled in.

    Args:
      config: the config of one run.
      widths: the widths of the sites that it reads.
      target: the width of the site that a transcoder reconstructs.

    Raises UserError for a batch without tokens and for wrong fields of the optimizer.
    """
    optimizer.check(config.optimizer)
    if config.data.batch_size < 1:
        raise UserError(f"data.batch_size must be 1 or more, not {config.data.batch_size}")
    rate = config.optimizer.learning_rate or 1e-4  # which one makes no difference here
    adam = dataclasses.replace(config.optimizer, learning_rate=rate)
    return dataclasses.replace(config, sae=saes.resolve(config.sae, widths, target), optimizer=adam)


def _tracing_for(topology: Topology):
    """Returns the context in which programs are traced as for the topology's devices.

    A dense family's step counts with all latents. That is how a run begins, and an upper bound of
    what it takes once few latents act in a batch.
    """
    return as_for_accelerators() if topology.stands_in else by_all_latents()


def row_width(config: Config) -> int:
    """Returns the columns of a batch: the input's, and a transcoder's target's."""
    sae = config.sae
    return sae.d_in + (sae.d_out if sae.kind in ("transcoder", "skip_transcoder") else 0)


def _state_bytes(state: TrainState) -> dict[str, int]:
    """Returns the bytes of a device's shards, by part of the state."""
    total = {"parameters": state.parameters, "optimizer": state.optimizer, "all": state}
    sizes = {name: sum(map(_shard_bytes, jax.tree.leaves(part))) for name, part in total.items()}
    rest = sizes.pop("all") - sum(sizes.values())
    return sizes | {"counters": rest}


def _shard_bytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _mesh_coordinates(member: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the coordinates in a mesh of its device number `member`."""
    place = []
    for size in reversed(sizes):
        member, along = divmod(member, size)
        place.append(along)
    return tuple(reversed(place))
