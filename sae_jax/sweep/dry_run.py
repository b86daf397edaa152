"""Tells what a sweep would do and cost, before any device is touched."""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence

from sae_jax import sae as saes
from sae_jax.activations import is_world
from sae_jax.config import Config, DataConfig
from sae_jax.errors import UserError, some
from sae_jax.lm.live import open_stream
from sae_jax.sae import SAEConfig
from sae_jax.sweep import design
from sae_jax.sweep import grid as grids
from sae_jax.sweep.directory import Run, counted, passes_of
from sae_jax.train import results, short_runs
from sae_jax.train.branch import Origin

_BYTES_PER_PARAMETER = 16  # float32: the parameter, its gradient, Adam's two moments
_BATCHES = 3  # on a device: the one in use as it came and in float32, and the next


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one run or several runs cost.

    Attributes:
      tokens: tokens that pass through the stream.
      bytes_read: bytes that are read of the store.
      flops: FLOPs by the papers' count, 12 n d a token.
      flops_executed: FLOPs that the steps execute.
    """

    tokens: int = 0
    bytes_read: int = 0
    flops: int = 0
    flops_executed: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        """Returns the sum of two costs."""
        fields = (field.name for field in dataclasses.fields(self))
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in fields})


def describe(
    runs: list[Run],
    passes: int = 1,
    shown: Collection[str] | None = None,
    starts: Mapping[str, int] | None = None,
) -> str:
    """Returns the passes, packs and runs of a sweep as lines of text, then what they cost together
    and one by one.

    Args:
      runs: the runs of the sweep.
      passes: how many passes each reading of the data is cut into.
      shown: the ids of the runs to list and count, at least one; None for all.
      starts: the steps at which runs go on from others that are done, by their ids.
    """
    todo, starts = passes_of(runs, passes), starts or {}
    names = {r.id: n for r, n in zip(runs, grids.names([r.swept for r in runs]), strict=True)}
    going = [run for run in runs if shown is None or run.id in shown]
    counts = {run.id for run in going}
    lines = []
    costs, works = [], []
    for work in todo:
        open_packs = {
            number: dataclasses.replace(pack, runs=left)
            for number, pack in enumerate(work.packs)
            if (left := tuple(run for run in pack.runs if results.run_id(run) in counts))
        }
        if open_packs:
            works.append(dataclasses.replace(work, packs=tuple(open_packs.values())))
            costs.append(pass_cost(works[-1], starts))
            lines += _pass_lines(works[-1], list(open_packs), runs, names, starts)
    if words := [*doubts(going), *few_passes(runs, passes)]:
        lines += ["", *words]
    alone = sum((run_cost(run.config, starts.get(run.id, 0)) for run in going), Cost())
    memory = max(map(memory_per_device, works))
    mesh = runs[0].config.mesh
    lines += [
        "",
        f"{'':18}{'tokens':>16}{'bytes read':>12}{'FLOPs 12nd':>12}{'executed':>12}",
        _cost_line(counted(len(going), "run") + " one by one", alone),
        _cost_line(f"in {counted(len(works), 'pass')}", sum(costs, Cost())),
        "",
        f"Memory of a device, an estimate: {_format_bytes(memory)} for parameters, gradients and "
        "Adam's moments of a",
        "pass's runs, its batches and the largest latents, on a mesh of "
        f"run={mesh.run} data={mesh.data} model={mesh.model} (-1 taken for 1).",
    ]
    return "\n".join(lines)


def few_passes(runs: list[Run], passes: int) -> list[str]:
    """Returns a sentence where there are fewer passes than were asked for, else nothing."""
    if (made := len(passes_of(runs, passes))) >= passes:
        return []
    return [
        f"--passes={passes} is more than can be made of {counted(len(runs), 'run')}: there "
        f"{'is' if made == 1 else 'are'} {counted(made, 'pass')}; runs of one trunk stay together"
    ]


def doubts(runs: list[Run]) -> list[str]:
    """Returns what runs of their length will not do, and what else of a checkpoint's run is not
    theirs, in words: a sentence for each field that asks.

    It is the first such run's, with the number of runs that it concerns.
    """
    by_field: dict[str, list[tuple[Run, str]]] = {}
    for run in runs:
        for field, sentence in (short_runs.doubts(run.config) | _unlike_origin(run)).items():
            by_field.setdefault(field, []).append((run, sentence))
    lines = []
    for found in by_field.values():
        (first, sentence), *others = found
        such = ""
        if any(other != sentence for _, other in others):
            such = f", such as {grids.describe(first.swept)}"
        lines.append(f"{len(found)} of {counted(len(runs), 'run')}{such}: {sentence}")
    return lines


def _unlike_origin(run: Run) -> dict[str, str]:
    """Returns a sentence about what a run changes of the one that it branches from, though the grid
    does not say so: a sweep's runs have the config of the sweep's file.
    """
    if not run.config.train.branch_from:
        return {}
    try:
        origin = _cached_origin(run.config.train.branch_from)
    except UserError:  # it is gone, which matters to none that has left it
        return {}
    changed = [
        line
        for line in origin.changed(run.config)
        if not line.startswith((*(f"{field}:" for field in run.swept), "train.tokens:"))
    ]
    if not changed:
        return {}
    return {
        "train.branch_from": f"they go on from {origin.name} with the config of the sweep's file, "
        f"not that run's: {some(changed, 6)}"
    }


def _pass_lines(
    work: design.Pass,
    numbers: Sequence[int],
    runs: list[Run],
    names: Mapping[str, str],
    starts: Mapping[str, int],
) -> list[str]:
    """Returns the lines of a pass, its packs, which have these numbers, and their runs."""
    by_id = {run.id: run for run in runs}
    everywhere = grids.shared([run.swept for run in runs])
    data = work.data
    lines = [
        f"{work.name}: {counted(len(work.runs), 'run')} in {counted(len(work.packs), 'pack')}, "
        f"{work.steps:,} steps of {data.batch_size:,} tokens of {data.store} {data.site}"
    ]
    for number, pack in zip(numbers, work.packs, strict=True):
        branch = ""
        if pack.trunk is not None:
            branch = f", branches off pack {pack.trunk} at step {pack.start:,}"
        elif start := _start(pack, starts):
            branch = f", from step {start:,} of what is done"
        members = [by_id[results.run_id(config)] for config in pack.runs]
        alike = grids.shared([run.swept for run in members])
        size = {"sae.d_sae": pack.runs[0].sae.d_sae, "train.tokens": pack.runs[0].train.tokens}
        lines.append(
            f"  pack {number}: {counted(len(members), 'run')} to step {pack.steps:,}{branch}: "
            f"{grids.describe(size | grids.without(alike, everywhere))}"
        )
        lines += [_run_line(run, names[run.id]) for run in members]
    return lines


def _start(pack: design.Pack, starts: Mapping[str, int]) -> int:
    """Returns the step at which a pack begins: all its runs must find a state to go on from."""
    if pack.trunk is not None:
        return pack.start
    return min(starts.get(results.run_id(run), 0) for run in pack.runs)


def _run_line(run: Run, name: str) -> str:
    """Returns the line of a run: its id and name, by which --rerun and --drop find it, and cost."""
    cost = run_cost(run.config)
    return f"    {run.id}  {name:40}  {cost.flops:.3g} FLOPs, {cost.flops_executed:.3g} executed"


def run_cost(config: Config, start: int = 0) -> Cost:
    """Returns the cost of a run from step `start` on, where it leaves a trunk."""
    tokens = results.planned(config)["tokens"] - start * config.data.batch_size
    return Cost(tokens, tokens * row_bytes(config.data), **results.flops(config, tokens))


def pass_cost(work: design.Pass, starts: Mapping[str, int] | None = None) -> Cost:
    """Returns the cost of all runs of a pass, which share its reading of the data.

    `starts` are the steps at which runs go on from others that are done.
    """
    begins = [_start(pack, starts or {}) for pack in work.packs]
    first = min(begins)
    tokens = max(run_cost(config, first).tokens for config in work.runs)
    costs = (
        run_cost(config, start)
        for pack, start in zip(work.packs, begins, strict=True)
        for config in pack.runs
    )
    return dataclasses.replace(
        sum(costs, Cost()), tokens=tokens, bytes_read=tokens * row_bytes(work.data)
    )


def row_bytes(data: DataConfig) -> int:
    """Returns the bytes that are read for a token; 0 for a synthetic world, which computes its
    rows.
    """
    if is_world(data.store):
        return 0
    sites = _cached_stream(data).sites
    metas = (sites.store.meta.sites[name] for name in sites.names)
    return sum(meta.width * meta.numpy_dtype.itemsize for meta in metas)


def memory_per_device(work: design.Pass) -> float:
    """Returns a rough estimate of the bytes that a pass takes of a device: all packs' states, the
    batches, and the largest pack's latents with their gradient.
    """
    config = work.runs[0]
    mesh = config.mesh
    run, data, model = (max(1, size) for size in (mesh.run, mesh.data, mesh.model))
    rows = config.data.batch_size / data
    shapes = [(-(-len(pack.runs) // run), pack.runs[0].sae) for pack in work.packs]
    states = sum(_BYTES_PER_PARAMETER * count * parameters(sae) for count, sae in shapes)
    latents = max(2 * 4 * rows * count * sae.d_sae for count, sae in shapes)
    width = max(sae.d_in + sae.d_out for _, sae in shapes)
    return (states + latents) / model + _BATCHES * 4 * rows * width


def parameters(sae: SAEConfig) -> int:
    """Returns the number of parameters of an SAE with a resolved config."""
    per_latent = sae.d_in + sae.d_out + len(saes.architecture(sae).fresh_latent(sae))
    skip = sae.d_in * sae.d_out if sae.kind == "skip_transcoder" else 0
    return sae.d_sae * per_latent + sae.d_out + skip


_cached_stream = functools.lru_cache(maxsize=4)(open_stream)
_cached_origin = functools.lru_cache(maxsize=64)(Origin.open)


def _cost_line(what: str, cost: Cost) -> str:
    """Returns a line of the table of costs."""
    return (
        f"{what:18}{cost.tokens:>16,}{_format_bytes(cost.bytes_read):>12}{cost.flops:12.3g}"
        f"{cost.flops_executed:12.3g}"
    )


def _format_bytes(count: float) -> str:
    """Returns a number of bytes with a decimal unit, in three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"
