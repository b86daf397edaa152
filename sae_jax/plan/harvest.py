"""Tells what a harvest takes before it is begun: time, bytes, objects, and whether the disk holds
them.

The model's weights are not read. The time is that of its matrix products at the published peak.
"""

import dataclasses
import math
import shutil
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sae_jax import lm, paths
from sae_jax.activations.files import Array
from sae_jax.activations.meta import DTYPES, FORMAT_VERSION, SiteMeta, StoreMeta
from sae_jax.activations.sites import split_names
from sae_jax.activations.writer import layout
from sae_jax.errors import UserError, choose
from sae_jax.lm.harvest import DEFAULT_CONTEXT, TOKENS_PER_DEVICE, our_name
from sae_jax.place_errors import explained
from sae_jax.plan.chips import Topology
from sae_jax.plan.table import cost_words

_LIVE_COPIES = 8  # of the residual stream and the MLP's width, at a time, in a layer


@dataclasses.dataclass(frozen=True)
class HarvestPlan:
    """What a harvest takes.

    Attributes:
      topology: the devices.
      out: the store's directory.
      contexts: how many contexts are written.
      context_length: the tokens of each.
      bytes: bytes of the store.
      objects: how many files or objects it is when finished, besides meta.json.
      writes: how many writes it takes, the notes of each shard and both meta.json included.
      chunks: how many chunks of activations a pass over all its sites reads.
      flops: FLOPs of the matrix products.
      model_dtype: the type in which the model computes.
      mesh_model: how many devices share the model; None where no number is enough.
      device_bytes: bytes of a device, about: weights and the activations of a batch.
      free: bytes that are free at `out`; None in an object store.
    """

    topology: Topology
    out: str
    contexts: int
    context_length: int
    bytes: int
    objects: int
    writes: int
    chunks: int
    flops: float
    model_dtype: str
    mesh_model: int | None
    device_bytes: int
    free: int | None

    @property
    def tokens(self) -> int:
        """The tokens that are harvested."""
        return self.contexts * self.context_length

    @property
    def seconds(self) -> float | None:
        """The least seconds, at the published peaks; None where these are unknown."""
        chip = self.topology.chip
        return chip and self.flops / getattr(chip, self.model_dtype) / len(self.topology.devices)

    @property
    def fits(self) -> bool:
        """Whether the disk holds the store, and the devices the model."""
        return (self.free is None or self.bytes <= self.free) and self.mesh_model is not None


def harvest(
    model: str,
    sites: Sequence[str],
    tokens: int,
    out: str,
    topology: Topology,
    *,
    context_length: int | None = None,
    dtype: str = "bfloat16",
    model_dtype: str = "float32",
) -> HarvestPlan:
    """Returns what `lm.harvest` would take on a topology; the arguments are its.

    Raises UserError for an unknown model, site or dtype, a context that the model does not have,
    fewer tokens than one context, and a model that transformers runs, whose FLOPs are not known.
    """
    choose(dtype, DTYPES, "--dtype")
    choose(model_dtype, ("bfloat16", "float32"), "--model_dtype")
    if lm.is_torch(model):
        raise UserError(f"--model={model}: the FLOPs of a model that transformers runs are unknown")
    opened = lm.open_model(model, model_dtype)
    names = dict.fromkeys(map(our_name, split_names(sites)))
    widths = {site: opened.site_width(site) for site in names}
    if not widths:
        raise UserError("no sites to harvest; name some, such as --sites=resid_post.0")
    length = context_length or min(opened.max_context, DEFAULT_CONTEXT)
    if not 2 <= length <= opened.max_context:
        raise UserError(
            f"--context_length={length} is not between 2 and the model's {opened.max_context}"
        )
    contexts = tokens // length
    if not contexts:
        raise UserError(f"--tokens={tokens} are less than one context of {length}")
    meta = _meta(widths, dtype, contexts, length)
    arrays = meta.arrays().values()
    shards = sum(map(_shards, arrays))
    shared_by, device_bytes = _placed(opened.config, length, model_dtype, topology)
    return HarvestPlan(
        topology=topology,
        out=str(out),
        contexts=contexts,
        context_length=length,
        bytes=sum(array.num_bytes for array in arrays),
        objects=shards + len(arrays),
        writes=shards + len(arrays) + meta.num_shards + 2,
        chunks=meta.num_chunks * len(widths),
        flops=opened.flops_per_token(tuple(widths), length) * contexts * length,
        model_dtype=model_dtype,
        mesh_model=shared_by,
        device_bytes=device_bytes,
        free=_free(out),
    )


def text(plan: HarvestPlan, price: float | None = None) -> str:
    """Returns a plan as lines of text; `price` is that of a device for an hour."""
    topology, seconds = plan.topology, plan.seconds
    chips = f"{len(topology.devices)} x {topology.chip.name if topology.chip else 'CPU'}"
    lines = [
        f"{plan.tokens:,} tokens ({plan.contexts:,} contexts of {plan.context_length}) on {chips}",
        f"Store: {plan.bytes / 1e9:,.2f} GB in {plan.objects:,} files, {plan.writes:,} writes; a "
        f"pass over it reads {plan.chunks:,} chunks",
    ]
    if plan.free is None:
        lines.append(f"{plan.out} is an object store: its room is not known")
    else:
        verdict = "fits" if plan.bytes <= plan.free else "DOES NOT FIT"
        lines.append(f"  {verdict}: {plan.free / 1e9:,.2f} GB are free at {plan.out}")
    if plan.mesh_model is None:
        lines.append(f"Model: no number of devices holds it, {plan.device_bytes / 1e9:.1f} GB each")
    else:
        lines.append(
            f"Model: about {plan.device_bytes / 1e9:.1f} GB of a device"
            + (f", --mesh_model={plan.mesh_model}" if plan.mesh_model > 1 else "")
        )
    if seconds is None:
        return "\n".join([*lines, "Time: unknown on a CPU; sae-jax bench --harvest measures it"])
    values = as_dict(plan, price)
    return "\n".join(
        [
            *lines,
            f"Time at the published peaks: {values['hours']:,.2f} h, "
            f"{plan.tokens / seconds:,.0f} tokens/s, {plan.bytes / seconds / 1e9:.2f} GB/s to "
            f"write; {values['device_hours']:,.1f} device-hours"
            + cost_words(values.get("cost"), price),
            "The peaks are a bound: a real harvest takes longer, at least as long as its writes.",
        ]
    )


def as_dict(plan: HarvestPlan, price: float | None = None) -> dict:
    """Returns a plan as JSON values; `price` is that of a device for an hour."""
    values = {
        "topology": plan.topology.name,
        "devices": len(plan.topology.devices),
        "fits": plan.fits,
        "tokens": plan.tokens,
        "contexts": plan.contexts,
        "context_length": plan.context_length,
        "bytes": plan.bytes,
        "free_bytes": plan.free,
        "objects": plan.objects,
        "writes": plan.writes,
        "chunks": plan.chunks,
        "flops": plan.flops,
        "mesh_model": plan.mesh_model,
        "device_bytes": plan.device_bytes,
    }
    if plan.seconds is None:
        return values
    hours = plan.seconds / 3600
    device_hours = hours * len(plan.topology.devices)
    values |= {"hours": hours, "device_hours": device_hours}
    return values if price is None else values | {"cost": device_hours * price}


def _meta(widths: dict[str, int], dtype: str, contexts: int, length: int) -> StoreMeta:
    """Returns the meta.json of the store, as its writer begins it."""
    sites = {name: SiteMeta(width, dtype) for name, width in widths.items()}
    widest = max(sites.values(), key=lambda site: site.width)
    chunk, shard = layout(widest, contexts, length)
    return StoreMeta(
        FORMAT_VERSION, False, length, contexts, chunk, shard, sites, tokens_sha256="there are some"
    )


def _shards(array: Array) -> int:
    """Returns how many files the rows of an array are in."""
    return -(-array.shape[0] // (array.chunk_rows * array.shard_chunks))


def _placed(
    config: lm.DecoderConfig, length: int, dtype: str, topology: Topology
) -> tuple[int | None, int]:
    """Returns how few devices share the model so that it fits, or None, and the bytes of each."""
    size, count = jnp.dtype(dtype).itemsize, len(topology.devices)
    leaves = jax.tree.leaves(lm.layout(config))
    rows = max(1, TOKENS_PER_DEVICE // length) * length
    needed = 0
    for shared_by in (n for n in range(1, count + 1) if count % n == 0):
        weights = sum(
            math.prod(leaf.shape) // (shared_by if leaf.model_axis(shared_by) is not None else 1)
            for leaf in leaves
        )
        heads = config.num_heads // math.gcd(shared_by, config.num_heads)
        widths = config.d_model + config.d_mlp // shared_by
        needed = size * (weights + rows * (_LIVE_COPIES * widths + 2 * heads * length))
        if needed <= topology.capacity:
            return shared_by, needed
    return None, needed


def _free(out: str) -> int | None:
    """Returns the bytes that are free where `out` is or would be; None in an object store."""
    if paths.is_remote(out):
        return None
    out = paths.local(out).absolute()
    with explained(out):
        if out.is_file():
            raise UserError(f"--out={out} is a file; give a directory for the store")
        place = next(path for path in (out, *out.parents) if path.is_dir())
        return shutil.disk_usage(place).free
