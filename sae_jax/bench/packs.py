"""Compares packs of runs with the same runs one by one: seconds a step, bytes read, total time."""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from sae_jax import config as configs
from sae_jax.bench import run_configs
from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.json_files import read_json
from sae_jax.lm.live import open_stream
from sae_jax.sweep.design import make_passes
from sae_jax.train import preparation
from sae_jax.train.mesh import BatchPlacement, make_mesh
from sae_jax.train.pack import PackTrainer, set_fields

_BATCHES = 4  # distinct ones in memory, taken in turn


def measure_pack_step(config: Config, runs: int, rounds: int) -> dict:
    """Times one step of a pack of `runs` runs, and of each of its runs alone, in turn.

    Every run has its own state, and batches come from the host's memory. Returns figures by name,
    medians over `rounds` rounds: `seconds`, and `pack_over_sum`, the time of the pack over the sum
    of the times of its runs.
    """
    shape = config.data.batch_size, config.sae.d_in
    batches = np.random.default_rng(0).normal(size=(_BATCHES, *shape)).astype(np.float32)
    packed = [
        set_fields(config, {"train.seed": i, "optimizer.learning_rate": 1e-4 * (i + 1)})
        for i in range(runs)
    ]
    mesh = make_mesh(config)
    placement = BatchPlacement(mesh, config.data.batch_size)
    variance = float(config.sae.d_in)
    b_dec = np.zeros(config.sae.d_in, np.float32)
    with jax.set_mesh(mesh):
        pack = PackTrainer(packed, 10**6, variance)
        states = pack.init(b_dec, 1.0, 1.0)
        alone = [(trainer, trainer.init(b_dec, 1.0)) for trainer in pack.trainers]
        seconds = {"pack": [], "alone": []}
        for i in range(rounds + 2):  # the first two compile and touch the memory
            batch = batches[i % _BATCHES]
            begin = time.perf_counter()
            states, metrics = pack.step(states, placement.place(batch))
            jax.block_until_ready((states, metrics))
            between = time.perf_counter()
            for j, (trainer, state) in enumerate(alone):
                state, metrics = trainer.step(state, placement.place(batch))
                jax.block_until_ready((state, metrics))
                alone[j] = (trainer, state)
            if i >= 2:
                seconds["pack"].append(between - begin)
                seconds["alone"].append(time.perf_counter() - between)
    ratios = np.array(seconds["pack"]) / np.array(seconds["alone"])
    return {
        "runs": runs,
        "shape": {"batch": shape[0], "d_in": shape[1], "d_sae": config.sae.d_sae},
        "device": jax.devices()[0].device_kind,
        "seconds": {name: float(np.median(times)) for name, times in seconds.items()},
        "pack_over_sum": float(np.median(ratios)),
    }


def measure_sweep(runs: list[Config]) -> dict:
    """Times a whole sweep in one process, then every run of it in a process of its own.

    Start-up, compilation, evaluation and checkpoints are included. Returns figures by name: for
    both ways `seconds` and `bytes_read` (after the package was imported), their ratios, and the
    largest relative difference of a run's eval_loss between the two. Raises UserError if the runs
    do not read the same data.
    """
    stream = open_stream(runs[0].data)
    runs = [preparation.resolve(run, stream) for run in runs]
    if len(make_passes(runs)) > 1:
        raise UserError("the runs read different data; a bench of packs takes runs of one pass")
    with tempfile.TemporaryDirectory() as directory:
        out = pathlib.Path(directory)
        lists = {"sweep": [runs], "alone": [[run] for run in runs]}
        figures = {name: _in_processes(parts, out / name) for name, parts in lists.items()}
        losses = {
            name: {
                path.parent.name: read_json(path)["eval_loss"]
                for path in (out / name).glob("*/result.json")
            }
            for name in lists
        }
    alone = losses["alone"]
    return figures | {
        "runs": len(runs),
        "times_less_wall": figures["alone"]["seconds"] / figures["sweep"]["seconds"],
        "times_less_read": figures["alone"]["bytes_read"] / figures["sweep"]["bytes_read"],
        "largest_loss_difference": max(
            abs(losses["sweep"][run] / loss - 1) for run, loss in alone.items()
        ),
    }


def _in_processes(parts: list[list[Config]], out: pathlib.Path) -> dict:
    out.mkdir()
    begin, count = time.perf_counter(), 0
    for runs in parts:
        text = json.dumps([configs.to_dict(run) for run in runs])
        command = [sys.executable, "-m", run_configs.__name__, str(out)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"a process of the bench failed:\n{done.stderr[-2000:]}")
        count += int(done.stdout.split()[-1])
    return {"seconds": time.perf_counter() - begin, "bytes_read": count}


def sweep_of(config: Config, store: str, site: str, runs: int, tokens: int) -> list[Config]:
    """Returns the configs of a sweep over a store, whose runs can be trained in one pass.

    They have the architecture of `config`, and half, once and twice its d_sae. There are `runs` of
    each size, which differ in sparsity, learning rate and seed.
    """
    unsized = dict.fromkeys(["sae.d_in", "sae.d_out", "sae.aux_k"])
    data = dataclasses.replace(config.data, store=store, site=site)
    base = dataclasses.replace(set_fields(config, unsized), data=data)
    made = []
    for d_sae, i in itertools.product((1, 2, 4), range(runs)):
        values = {
            "sae.d_sae": d_sae * config.sae.d_sae // 2,
            "optimizer.learning_rate": 1e-3 if i % 2 else 5e-4,
            "train.seed": i // 4,
            "train.tokens": tokens,
        }
        if config.sae.k is not None:
            values["sae.k"] = config.sae.k + i % 4
        else:
            values["sae.sparsity_coefficient"] = config.sae.sparsity_coefficient * (1 + i % 4) / 4
        made.append(set_fields(base, values))
    return made


def step_table(figures: dict) -> str:
    """Returns the figures of `measure_pack_step` as a line for people."""
    shape = " ".join(f"{name} {value}" for name, value in figures["shape"].items())
    pack, alone = (1e3 * figures["seconds"][name] for name in ("pack", "alone"))
    return (
        f"a step of {figures['runs']} runs, {shape}, {figures['device']}: packed {pack:.1f} ms, "
        f"one by one {alone:.1f} ms; ratio {figures['pack_over_sum']:.2f}"
    )


def sweep_table(figures: dict) -> str:
    """Returns the figures of `measure_sweep` as a table for people."""
    lines = [f"{figures['runs']} runs{'':14}{'seconds':>10}{'GB read':>10}"]
    for name, label in (("sweep", "one sweep"), ("alone", "a process each")):
        seconds, size = figures[name]["seconds"], figures[name]["bytes_read"] / 1e9
        lines.append(f"{label:21}{seconds:10.1f}{size:10.2f}")
    lines += [
        f"{'times less':21}{figures['times_less_wall']:10.1f}{figures['times_less_read']:10.1f}",
        f"largest relative difference of an eval_loss: {figures['largest_loss_difference']:.1e}",
    ]
    return "\n".join(lines)
