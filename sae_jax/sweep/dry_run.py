"""Tells what a sweep would do and cost, before any device is touched."""

import dataclasses
import functools

from sae_jax import sae as saes
from sae_jax.activations import is_world
from sae_jax.config import Config, DataConfig
from sae_jax.lm.live import open_stream
from sae_jax.sae import SAEConfig
from sae_jax.sweep import design
from sae_jax.sweep import grid as grids
from sae_jax.sweep.directory import Run, counted, passes_of
from sae_jax.train import results, short_runs

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


def describe(runs: list[Run], passes: int = 1) -> str:
    """Returns the passes, packs and runs of a sweep as lines of text, then what they cost together
    and one by one.
    """
    todo = passes_of(runs, passes)
    lines = []
    for work in todo:
        lines += _pass_lines(work, runs)
    together = sum((pass_cost(work) for work in todo), Cost())
    alone = sum((run_cost(run.config) for run in runs), Cost())
    memory = max(map(memory_per_device, todo))
    mesh = runs[0].config.mesh
    lines += [
        "",
        f"{'':18}{'tokens':>16}{'bytes read':>12}{'FLOPs 12nd':>12}{'executed':>12}",
        _cost_line(counted(len(runs), "run") + " one by one", alone),
        _cost_line(f"in {counted(len(todo), 'pass')}", together),
        "",
        f"Memory of a device, an estimate: {_format_bytes(memory)} for parameters, gradients and "
        "Adam's moments of a",
        "pass's runs, its batches and the largest latents, on a mesh of "
        f"run={mesh.run} data={mesh.data} model={mesh.model} (-1 taken for 1).",
    ]
    if words := doubts(runs):
        lines += ["", *words]
    return "\n".join(lines)


def doubts(runs: list[Run]) -> list[str]:
    """Returns what runs of their length will not do, in words: a sentence for each field that asks.

    It is the first such run's, with the number of runs that it concerns.
    """
    by_field: dict[str, list[str]] = {}
    for run in runs:
        for field, sentence in short_runs.doubts(run.config).items():
            by_field.setdefault(field, []).append(sentence)
    return [
        f"{len(found)} of {counted(len(runs), 'run')}: {found[0]}" for found in by_field.values()
    ]


def _pass_lines(work: design.Pass, runs: list[Run]) -> list[str]:
    """Returns the lines of a pass, its packs and their runs."""
    by_id = {run.id: run for run in runs}
    everywhere = grids.shared([run.swept for run in runs])
    data = work.data
    lines = [
        f"{work.name}: {counted(len(work.runs), 'run')} in {counted(len(work.packs), 'pack')}, "
        f"{work.steps:,} steps of {data.batch_size:,} tokens of {data.store} {data.site}"
    ]
    for number, pack in enumerate(work.packs):
        branch = ""
        if pack.trunk is not None:
            branch = f", branches off pack {pack.trunk} at step {pack.start:,}"
        members = [by_id[results.run_id(config)] for config in pack.runs]
        alike = grids.shared([run.swept for run in members])
        size = {"sae.d_sae": pack.runs[0].sae.d_sae, "train.tokens": pack.runs[0].train.tokens}
        lines.append(
            f"  pack {number}: {counted(len(members), 'run')} to step {pack.steps:,}{branch}: "
            f"{grids.describe(size | grids.without(alike, everywhere))}"
        )
        lines += [_run_line(run, grids.without(run.swept, alike)) for run in members]
    return lines


def _run_line(run: Run, own: grids.Assignment) -> str:
    """Returns the line of a run; `own` is what the grid sets for it other than for its pack."""
    cost = run_cost(run.config)
    words = grids.describe(own) if own else ""
    return f"    {run.id}  {words:40}  {cost.flops:.3g} FLOPs, {cost.flops_executed:.3g} executed"


def run_cost(config: Config, start: int = 0) -> Cost:
    """Returns the cost of a run from step `start` on, where it leaves a trunk."""
    tokens = results.planned(config)["tokens"] - start * config.data.batch_size
    return Cost(tokens, tokens * row_bytes(config.data), **results.flops(config, tokens))


def pass_cost(work: design.Pass) -> Cost:
    """Returns the cost of all runs of a pass, which share its reading of the data."""
    tokens = max(run_cost(config).tokens for config in work.runs)
    costs = (run_cost(config, pack.start) for pack in work.packs for config in pack.runs)
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
