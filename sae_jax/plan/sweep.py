"""Tells what a whole sweep takes: hours of devices, bytes, memory, passes.

The step of each shape of run is traced; those that most of the time goes to are compiled, and the
others' times are multiplied with what the compiler's are to the tracer's.
"""

import dataclasses
from collections.abc import Sequence

from sae_jax import config as configs
from sae_jax.config import Config, MeshConfig
from sae_jax.errors import UserError
from sae_jax.plan.chips import Topology
from sae_jax.plan.estimate import (
    Estimate,
    candidates,
    estimate,
    least_state_bytes,
    row_width,
    screen,
)
from sae_jax.plan.table import ROW_BYTES, cost_words
from sae_jax.progress_bar import progress
from sae_jax.sweep import design, directory, dry_run
from sae_jax.sweep import grid as grids
from sae_jax.train.mesh import make_mesh
from sae_jax.train.pack import set_fields
from sae_jax.train.results import flops


@dataclasses.dataclass(frozen=True)
class Shape:
    """The runs of a sweep whose steps are the same program.

    Attributes:
      estimate: what a step of one of them takes of a device.
      runs: how many there are.
      steps: their steps from where they leave their trunks, pack by pack; the runs of a pack on one
        group of devices are taken one after the other.
      scale: what the traced time is multiplied with.
    """

    estimate: Estimate
    runs: int
    steps: int
    scale: float = 1.0

    @property
    def seconds(self) -> float:
        """The seconds of all steps."""
        return self.steps * self.estimate.step_seconds * self.scale


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What a sweep takes on a topology.

    Attributes:
      topology: the devices of one worker.
      mesh: the mesh.
      passes: how many passes there are.
      packs: how many packs they have.
      shapes: the shapes, the dearest first.
      tokens: the tokens that all passes read.
      bytes_read: the bytes of them.
      memory: the most bytes that a pass takes of a device, an estimate.
    """

    topology: Topology
    mesh: MeshConfig
    passes: int
    packs: int
    shapes: tuple[Shape, ...]
    tokens: int
    bytes_read: int
    memory: int

    @property
    def hours(self) -> float:
        """The hours that one worker takes for all passes, at the published peaks."""
        return sum(shape.seconds for shape in self.shapes) / 3600

    @property
    def device_hours(self) -> float:
        """The hours of devices, however many workers there are."""
        return self.hours * len(self.topology.devices)

    @property
    def fits(self) -> bool:
        """Whether a pass fits in the devices' memory."""
        return self.memory <= self.topology.capacity


def load(spec: str, overrides: dict[str, str], resolve) -> list[Config]:
    """Returns the resolved configs of a sweep file's runs.

    Args:
      spec: "FILE.py" or "FILE.py:ARG", as for `sweep.directory.load`.
      overrides: values of the base config's fields, as text.
      resolve: a function that resolves a config without a store.

    Raises UserError for a mistake in the file, the grid or a run's config.
    """
    base = configs.override(configs.load_file(spec), overrides)
    if base.data.store:
        return [run.config for run in directory.load(spec, overrides)]
    grid = configs.call_in_file(
        spec, "get_sweep", "a sweep file has get_sweep(), which returns a grid (sweep/grid.py)"
    )
    return [resolve(grids.apply(base, assignment)) for assignment in grid]


def plan(
    runs: Sequence[Config],
    topology: Topology,
    mesh: MeshConfig | None,
    passes: int = 1,
    most: int = 4,
) -> SweepPlan | None:
    """Returns what the runs of a sweep take on a topology; None where no mesh holds them.

    Args:
      runs: the resolved configs.
      topology: the devices of one worker, of a kind whose peaks are known.
      mesh: the mesh. None: the one with the least traced time of which a pass fits in memory. It is
        looked for with the shape that computes most.
      passes: as for `sweep.design.make_passes`.
      most: the most shapes to compile.

    Raises UserError for a mesh that does not have the topology's devices or divide the runs.
    """
    work = design.make_passes(runs, passes)
    if mesh is not None:
        mesh = _resolved_mesh(runs[0], mesh, topology)
        return _confirmed(_traced(work, topology, mesh), work, most)
    tried = [
        _traced(work, topology, candidate, dearest_alone=True)
        for candidate in progress(_meshes(work, topology), "tracing every mesh", unit="program")
    ]
    order = sorted(tried, key=lambda plan: plan.hours)
    too_large = None  # by what the compiler says
    for found in progress(order, "tracing all shapes on the best meshes", unit="program"):
        whole = _traced(work, topology, found.mesh)
        if whole.fits:
            confirmed = _confirmed(whole, work, most)
            if confirmed.fits:
                return confirmed
            too_large = too_large or confirmed
    return too_large


def text(plan: SweepPlan, price: float | None = None) -> str:
    """Returns a plan as lines of text; `price` is that of a device for an hour."""
    topology, mesh = plan.topology, plan.mesh
    values = as_dict(plan, price)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    runs = directory.counted(values["runs"], "run")
    lines = [
        f"{runs} in {directory.counted(plan.packs, 'pack')} and "
        f"{directory.counted(plan.passes, 'pass')}, on {len(topology.devices)} x "
        f"{topology.chip.name}, mesh run {mesh.run} x data {mesh.data} x model {mesh.model}"
        + (", ZeRO" if mesh.zero else ""),
        "",
        f"  {'architecture':14}{'latents':>12}{'batch':>10}{'k':>6}{'runs':>6}{'steps':>12}"
        f"{'ms a step':>11}{'device-hours':>14}",
    ]
    for shape in plan.shapes:
        config = shape.estimate.config
        lines.append(
            f"  {config.sae.architecture:14}{config.sae.d_sae:12,}{config.data.batch_size:10,}"
            f"{config.sae.k or '':>6}{shape.runs:6}{shape.steps:12,}"
            f"{shape.seconds / shape.steps * 1e3:11.1f}"
            f"{shape.seconds / 3600 * len(topology.devices):14,.2f}"
            + ("" if shape.estimate.compiled else "  traced")
        )
    return "\n".join(
        [
            *lines,
            "",
            f"Reads {plan.tokens:,} tokens, {plan.bytes_read / 1e9:,.2f} GB, in "
            f"{directory.counted(plan.passes, 'pass')}: at the time below "
            f"{plan.bytes_read / 1e9 / (plan.hours * 3600):,.2f} GB/s",
            f"Memory of a device, about {plan.memory / 1e9:.1f} GB for a pass: {verdict}, of "
            f"{topology.capacity / 1e9:.1f} GB",
            f"Time at the published peaks: {plan.hours:,.2f} h of one worker after the other, "
            f"{plan.device_hours:,.2f} device-hours" + cost_words(values.get("cost"), price),
            "The peaks are a bound: a real sweep takes longer.",
        ]
    )


def as_dict(plan: SweepPlan, price: float | None = None) -> dict:
    """Returns a plan as JSON values; `price` is that of a device for an hour."""
    values = {
        "topology": plan.topology.name,
        "devices": len(plan.topology.devices),
        "mesh": dataclasses.asdict(plan.mesh),
        "fits": plan.fits,
        "runs": sum(shape.runs for shape in plan.shapes),
        "packs": plan.packs,
        "passes": plan.passes,
        "tokens": plan.tokens,
        "bytes_read": plan.bytes_read,
        "memory_bytes": plan.memory,
        "hours": plan.hours,
        "device_hours": plan.device_hours,
        "shapes": [
            {
                "architecture": shape.estimate.config.sae.architecture,
                "d_sae": shape.estimate.config.sae.d_sae,
                "k": shape.estimate.config.sae.k,
                "batch_size": shape.estimate.config.data.batch_size,
                "runs": shape.runs,
                "steps": shape.steps,
                "seconds": shape.seconds,
                "compiled": shape.estimate.compiled,
            }
            for shape in plan.shapes
        ],
    }
    return values if price is None else values | {"cost": plan.device_hours * price}


def _resolved_mesh(config: Config, mesh: MeshConfig, topology: Topology) -> MeshConfig:
    """Returns a mesh without a -1, over all of a topology."""
    made = make_mesh(dataclasses.replace(config, mesh=mesh), topology.devices)
    if made.size != len(topology.devices):
        raise UserError(
            f"the mesh has {made.size} devices, and {topology.name} has {len(topology.devices)}; "
            "give axes whose product that is"
        )
    return dataclasses.replace(mesh, **made.shape)


def _meshes(work: list[design.Pass], topology: Topology) -> list[MeshConfig]:
    """Returns the meshes of a topology that divide every run and hold the states of every pass."""
    count = len(topology.devices)
    packs = [pack for each in work for pack in each.packs]
    most = max(len(pack.runs) for pack in packs)
    found = []
    for groups in (n for n in range(1, min(count, most) + 1) if count % n == 0):
        possible = [[c.mesh for c in candidates(p.runs[0], count // groups)] for p in packs]
        for mesh in possible[0]:
            states = max(_least_state_bytes(each, mesh, groups) for each in work)
            if all(mesh in others for others in possible) and states <= topology.capacity:
                found.append(dataclasses.replace(mesh, run=groups))
    return found


def _least_state_bytes(work: design.Pass, mesh: MeshConfig, groups: int) -> int:
    """Returns the bytes of a device that the states of all runs of a pass take at least."""
    return sum(
        -(-len(pack.runs) // groups)
        * least_state_bytes(dataclasses.replace(pack.runs[0], mesh=mesh))
        for pack in work.packs
    )


def _traced(
    work: list[design.Pass], topology: Topology, mesh: MeshConfig, dearest_alone: bool = False
) -> SweepPlan:
    """Returns a plan from traced steps.

    With `dearest_alone` only the shape that computes most is traced, and the others' times are by
    their FLOPs.
    """
    groups = mesh.run
    part = _group(topology, groups)
    alone = dataclasses.replace(mesh, run=1)
    steps, runs, configs_of_shapes = {}, {}, {}
    for pack in (pack for each in work for pack in each.packs):
        config = _largest(pack)
        key = _key(config)
        configs_of_shapes[key] = dataclasses.replace(config, mesh=alone)
        rounds = -(-len(pack.runs) // groups)
        steps[key] = steps.get(key, 0) + rounds * (pack.steps - pack.start)
        runs[key] = runs.get(key, 0) + len(pack.runs)
    cost = {key: _step_flops(config) for key, config in configs_of_shapes.items()}
    dearest = max(cost, key=lambda key: cost[key] * steps[key])
    traced = {}
    for key, config in configs_of_shapes.items():
        if not dearest_alone or key == dearest:
            traced[key] = screen(config, part)
    shapes = {
        key: Shape(
            traced.get(key, traced[dearest]),
            runs[key],
            steps[key],
            1.0 if key in traced else cost[key] / cost[dearest],
        )
        for key in configs_of_shapes
    }
    memory = 0 if dearest_alone else _memory(work, groups, traced)
    longest = [max(each.runs, key=lambda run: run.train.tokens) for each in work]
    tokens = [design.count_steps(run) * run.data.batch_size for run in longest]
    return SweepPlan(
        topology=topology,
        mesh=mesh,
        passes=len(work),
        packs=sum(len(each.packs) for each in work),
        shapes=tuple(sorted(shapes.values(), key=lambda shape: -shape.seconds)),
        tokens=sum(tokens),
        bytes_read=sum(n * _row_bytes(each) for n, each in zip(tokens, work, strict=True)),
        memory=memory,
    )


def _confirmed(plan: SweepPlan, work: list[design.Pass], most: int) -> SweepPlan:
    """Returns a plan whose dearest shapes are compiled."""
    groups = plan.mesh.run
    part = _group(plan.topology, groups)
    if groups > 1 and part.is_tpu:  # the TPU compiler compiles for whole slices
        return plan
    chosen = list(plan.shapes[:most])
    compiled = [
        _compiled(shape, part)
        for shape in progress(chosen, "compiling the dearest shapes", len(chosen), "program")
    ]
    before = sum(shape.seconds for shape in chosen)
    scale = sum(shape.seconds for shape in compiled) / before if chosen else 1.0
    rest = [dataclasses.replace(shape, scale=scale) for shape in plan.shapes[most:]]
    shapes = [*compiled, *rest]
    estimates = {_key(shape.estimate.config): shape.estimate for shape in shapes}
    return dataclasses.replace(
        plan,
        shapes=tuple(sorted(shapes, key=lambda shape: -shape.seconds)),
        memory=_memory(work, groups, estimates),
    )


def _compiled(shape: Shape, topology: Topology) -> Shape:
    """Returns a shape with its compiled step; with its traced one, and the memory that the compiler
    asks for, where it found no room.
    """
    traced = shape.estimate
    found = estimate(traced.config, topology)
    if found.flops is None:
        more = max(0, found.total - traced.total)
        sizes = traced.bytes | {"temporaries": traced.bytes["temporaries"] + more}
        found = dataclasses.replace(traced, bytes=sizes, total=traced.total + more)
    return dataclasses.replace(shape, estimate=found)


def _group(topology: Topology, groups: int) -> Topology:
    """Returns the devices of one of the groups that share the runs of a pack."""
    if groups == 1:
        return topology
    devices = topology.devices[: len(topology.devices) // groups]
    return dataclasses.replace(topology, devices=devices)


def _largest(pack: design.Pack) -> Config:
    """Returns the config that the program of a pack is compiled for: that of the largest k."""
    config = pack.runs[0]
    if config.sae.k is None:
        return config
    return set_fields(config, {"sae.k": max(run.sae.k for run in pack.runs)})


def _key(config: Config) -> tuple:
    """Returns what decides the cost of a step: not how large a number is that no array is of the
    size of, but whether there is one.
    """
    fields = dataclasses.asdict(config.sae)
    plain = {
        name: (value == 0, value < 1) if isinstance(value, float) else value
        for name, value in fields.items()
    }
    return tuple(plain.items()), config.data.batch_size


def _memory(work: list[design.Pass], groups: int, estimates: dict) -> int:
    """Returns the most bytes that a pass takes of a device: the states of all its runs, a batch,
    and the largest pack's temporaries.
    """

    def of_pass(each: design.Pass) -> int:
        states, temporaries, batch = 0, 0, 0
        for pack in each.packs:
            sizes = estimates[_key(_largest(pack))].bytes
            rounds = -(-len(pack.runs) // groups)
            states += rounds * sum(sizes[name] for name in ("parameters", "optimizer", "counters"))
            temporaries = max(temporaries, rounds * sizes["temporaries"])
            batch = sizes["batch"]
        return states + temporaries + batch

    return max(map(of_pass, work))


def _step_flops(config: Config) -> int:
    return flops(config, config.data.batch_size)["flops_executed"]


def _row_bytes(work: design.Pass) -> int:
    """Returns the bytes that a pass reads for a token: of the store, or of one in bfloat16."""
    if work.data.store:
        return dry_run.row_bytes(work.data)
    return ROW_BYTES * max(map(row_width, work.runs))
