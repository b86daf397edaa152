"""Measures harvest: tokens/s of a model's activations, to the host and into a store."""

import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.activations import StoreWriter
from sae_jax.lm.harvest import default_batch, matmul_rate, write_shards


class Contestant(NamedTuple):
    """Another harvester to compare with.

    Attributes:
      name: what the table calls it.
      run: fills `arrays`.
      arrays: by site, activations (sequences, T, width), float32.
    """

    name: str
    run: Callable[[], None]
    arrays: dict[str, np.ndarray]


def measure_harvest(
    model_dir,
    texts,
    sites: tuple[str, ...],
    context_length: int,
    tokens: int,
    rounds: int = 7,
    make_other: Callable[[lm.JaxModel, tuple, np.ndarray, int], Contestant] | None = None,
) -> dict:
    """Measures how many tokens a second are harvested.

    The contestants are our model with activations copied to float32 arrays of the host, our model
    with a bfloat16 store written and finished, and another harvester if there is one.

    Args:
      model_dir: the directory of the language model.
      texts: the texts to run it on.
      sites: the sites to harvest.
      context_length: the tokens of a sequence.
      tokens: how many tokens to harvest.
      rounds: how many rounds are timed. In each every contestant runs once, in turn.
      make_other: returns the other harvester, given (model, sites, tokens (sequences, T), batch).

    Returns figures by name, medians over the rounds. Besides `seconds` and `tokens_per_second`
    there are `processor_seconds`, which another load on the machine disturbs less, and
    `fraction_of_floor`: the seconds that the model's floating-point operations take at the rate of
    a matrix product timed in each round, over the contestant's. With another harvester there are
    also the ratios of both times to ours, and the largest difference of an activation.
    """
    mesh = lm.local_mesh()
    model = lm.JaxModel(model_dir, mesh=mesh)
    batch = default_batch(context_length, mesh)
    packed = lm.pack(texts, model.tokenizer, context_length, tokens)
    tokens_NxT = packed[: max(1, len(packed) // batch) * batch]
    run, run_stored = (model.runner(sites, jnp.dtype(d)) for d in ("float32", "bfloat16"))
    widths = {site: model.site_width(site) for site in sites}
    ours = {site: np.empty((*tokens_NxT.shape, w), np.float32) for site, w in widths.items()}

    def to_host():
        for start, arrays in lm.in_batches(run, tokens_NxT, batch):
            for site, array in arrays.items():
                ours[site][start : start + batch] = np.asarray(array)[: len(tokens_NxT) - start]

    contestants: dict[str, Callable[[], None]] = {"sae_jax": to_host}
    other = make_other(model, sites, tokens_NxT, batch) if make_other else None
    if other:
        contestants[other.name] = other.run
    flops = model.flops_per_token(sites, context_length)
    floor = flops / matmul_rate(mesh, model.dtype)
    contestants["sae_jax to disk"] = lambda: _to_disk(
        model, run_stored, widths, tokens_NxT, batch, floor
    )

    wall: dict[str, list[float]] = {name: [] for name in contestants}
    processor: dict[str, list[float]] = {name: [] for name in contestants}
    rates = []
    for i in range(rounds + 1):  # the first compiles and touches the memory
        for name, contestant in contestants.items():
            begin, begin_processor = time.perf_counter(), time.process_time()
            contestant()
            if i:
                wall[name].append(time.perf_counter() - begin)
                processor[name].append(time.process_time() - begin_processor)
        rates.append(matmul_rate(mesh, model.dtype))

    size = tokens_NxT.size
    seconds = {name: float(np.median(times)) for name, times in wall.items()}
    figures = {
        "device": jax.devices()[0].device_kind,
        "sites": list(sites),
        "tokens": size,
        "context_length": context_length,
        "batch_size": batch,
        "rounds": rounds,
        "seconds": seconds,
        "processor_seconds": {name: float(np.median(times)) for name, times in processor.items()},
        "tokens_per_second": {name: size / s for name, s in seconds.items()},
        "gb_per_second": {
            name: size * sum(widths.values()) * (2 if "disk" in name else 4) / s / 1e9
            for name, s in seconds.items()
        },
        "matmul_flops_per_second": float(np.median(rates)),
        "fraction_of_floor": {
            name: size * flops / float(np.median(rates)) / s for name, s in seconds.items()
        },
    }
    if other:
        for key, times in (("times_faster", wall), ("times_less_processor", processor)):
            ratios = np.array(times[other.name]) / np.array(times["sae_jax"])
            figures[key] = float(np.median(ratios))
        figures["largest_difference"] = max(
            float(np.abs(ours[site] - other.arrays[site]).max()) for site in sites
        )
    return figures


def default_sites(model_dir) -> tuple[str, ...]:
    """Returns the names of five sites of the model's middle layer."""
    middle = lm.load_config(model_dir).num_layers // 2
    names = ("resid_pre", "attn_out", "mlp_act", "mlp_out", "resid_post")
    return tuple(f"{name}.{middle}" for name in names)


def table(figures: dict) -> str:
    """Returns the figures of `measure_harvest` as a table for people."""
    lines = [
        f"{figures['tokens']:,} tokens in contexts of {figures['context_length']}, batches of "
        f"{figures['batch_size']}, {len(figures['sites'])} sites, {figures['device']}",
        f"{'':28}{'tokens/s':>12}{'GB/s':>8}{'of floor':>10}{'processor s':>13}",
    ]
    for name, rate in figures["tokens_per_second"].items():
        lines.append(
            f"{name:28}{rate:12,.0f}{figures['gb_per_second'][name]:8.3f}"
            f"{figures['fraction_of_floor'][name]:10.0%}{figures['processor_seconds'][name]:13.2f}"
        )
    if "times_faster" in figures:
        lines.append(
            f"ours is {figures['times_faster']:.2f}x as fast, with "
            f"{1 / figures['times_less_processor']:.2f}x the processor time; largest difference "
            f"of an activation {figures['largest_difference']:.1e}"
        )
    return "\n".join(lines)


def _to_disk(model, run, widths, tokens_NxT, batch: int, floor: float) -> None:
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as directory:  # not in memory, as /tmp may be
        writer = StoreWriter.create_or_resume(
            pathlib.Path(directory) / "store",
            sites=widths,
            num_sequences=len(tokens_NxT),
            context_length=tokens_NxT.shape[1],
            tokens=tokens_NxT,
            special_tokens=model.tokenizer.special_tokens,
        )
        shards = writer.missing_shards()
        write_shards(writer, shards, tokens_NxT, batch, run, floor)
        writer.finish()
