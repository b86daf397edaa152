"""Harvest beside transformers: the same sites of the same batches, copied to the host."""

import importlib.metadata
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.activations import StoreWriter
from sae_jax.bench import torch_hooks
from sae_jax.lm.harvest import default_batch, matmul_rate, write_shards
from sae_jax.lm.model import in_batches


def measure_harvest(
    model_dir, texts, sites: tuple[str, ...], context_length: int, tokens: int, rounds: int = 7
) -> dict:
    """Tokens/s over `tokens` tokens, medians of `rounds` rounds in which each contestant runs in
    turn: our model, with the activations copied to float32 arrays of the host; transformers' with
    forward hooks that copy to such arrays too, without the layers after the last site and without
    logits; and ours with a bfloat16 store written and finished. Left out where torch or
    transformers are missing: the second.

    Also `processor_seconds`, which another load on the machine disturbs less; the median ratio to
    transformers of both; and the fraction of the FLOP floor, at the rate of a product timed in
    each round."""
    model = lm.Model(model_dir)
    batch = default_batch(context_length, model.mesh)
    packed = lm.pack(texts, model.tokenizer, context_length, tokens)
    tokens_NxT = packed[: max(1, len(packed) // batch) * batch]
    run, run_stored = (model.runner(sites, jnp.dtype(d)) for d in ("float32", "bfloat16"))
    widths = {site: model.site_width(site) for site in sites}
    ours = {site: np.empty((*tokens_NxT.shape, w), np.float32) for site, w in widths.items()}

    def to_host():
        for start, arrays in in_batches(run, tokens_NxT, batch):
            for site, array in arrays.items():
                ours[site][start : start + batch] = np.asarray(array)[: len(tokens_NxT) - start]

    contestants: dict[str, Callable[[], None]] = {"sae_jax": to_host}
    theirs = torch_hooks.forward_to_host(model, sites, tokens_NxT, batch)
    if theirs is not None:
        name = f"transformers {importlib.metadata.version('transformers')}"
        contestants[name], their_values = theirs
    flops = model.flops_per_token(sites, context_length)
    floor = flops / matmul_rate(model.mesh, model.dtype)
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
        rates.append(matmul_rate(model.mesh, model.dtype))

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
    if theirs is not None:
        for key, times in (("times_faster", wall), ("times_less_processor", processor)):
            figures[key] = float(np.median(np.array(times[name]) / np.array(times["sae_jax"])))
        figures["largest_difference"] = max(
            float(np.abs(ours[site] - their_values[site]).max()) for site in sites
        )
    return figures


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
