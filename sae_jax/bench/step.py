"""Measures the training step: tokens/s, beside the machine's own rate of matrix products."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import sae as saes
from sae_jax.config import Config
from sae_jax.sae.registry import by_name
from sae_jax.train.mesh import BatchPlacement, make_mesh
from sae_jax.train.step import Trainer

_BATCHES = 4  # distinct ones in memory, taken in turn


class Contestant(NamedTuple):
    """What takes steps that are timed.

    Attributes:
      place: puts a batch (batch, d_in) float32 on the device. It is not timed: training does it in
        the background.
      step: takes a step with what `place` returned, and returns when it is done.
    """

    place: Callable[[np.ndarray], Any]
    step: Callable[[Any], None]


def measure_step(config: Config, rounds: int, others: dict[str, Contestant] | None = None) -> dict:
    """Times training steps on random normal activations in the device's memory.

    Args:
      config: the resolved config of our step.
      rounds: how many rounds are timed. In each every contestant runs one step, in turn, so that a
        drift of the machine affects all alike.
      others: what to time beside our step, by name.

    Returns figures by name, medians over the rounds:

    - `seconds` and `tokens_per_second`, by contestant.
    - `times_faster_than`, the ratio of our speed to that of each of the others.
    - `matmul_flops_per_second` of the encoder's product (batch x d_in by d_in x d_sae).
    - `fraction_of_floor`, the seconds that the step's floating-point operations take at that rate,
      over ours. A dense step has 12 d_sae d_in of them a token. Of a step that picks k latents only
      the encoder's forward pass counts, 2 d_sae d_in.
    """
    batch, d_in, d_sae = config.data.batch_size, config.sae.d_in, config.sae.d_sae
    batches = np.random.default_rng(0).normal(size=(_BATCHES, batch, d_in)).astype(np.float32)
    contestants = {
        "sae_jax": _ours(config),
        "matmul": _matmul(batch, d_in, d_sae, config),
        **(others or {}),
    }

    placed = {name: [c.place(batch) for batch in batches] for name, c in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 2):  # the first two compile and touch the memory
        for name, contestant in contestants.items():
            begin = time.perf_counter()
            contestant.step(placed[name][i % _BATCHES])
            if i >= 2:
                seconds[name].append(time.perf_counter() - begin)

    median = {name: float(np.median(times)) for name, times in seconds.items()}
    rate = 2 * batch * d_in * d_sae / median["matmul"]
    per_token = 12 if config.sae.k is None else 2
    ours = np.array(seconds["sae_jax"])
    return {
        "architecture": config.sae.architecture,
        "shape": {"batch": batch, "d_in": d_in, "d_sae": d_sae, "k": config.sae.k},
        "compute_dtype": config.sae.compute_dtype,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "rounds": rounds,
        "seconds": median,
        "tokens_per_second": {n: batch / s for n, s in median.items() if n != "matmul"},
        "matmul_flops_per_second": rate,
        "fraction_of_floor": per_token * batch * d_in * d_sae / rate / median["sae_jax"],
        "times_faster_than": {
            name: float(np.median(np.array(times) / ours))
            for name, times in seconds.items()
            if name not in ("sae_jax", "matmul")
        },
    }


def table(figures: dict) -> str:
    """Returns the figures of `measure_step` as a table for people."""
    shape = " ".join(f"{name} {value}" for name, value in figures["shape"].items() if value)
    lines = [
        f"{figures['architecture']} {figures['compute_dtype']}, {shape}, {figures['device']}",
        f"{'':28}{'ms/step':>10}{'tokens/s':>12}{'ours is':>10}",
    ]
    for name, rate in figures["tokens_per_second"].items():
        ratio = figures["times_faster_than"].get(name)
        faster = f"{ratio:9.2f}x" if ratio else ""
        lines.append(f"{name:28}{1e3 * figures['seconds'][name]:10.1f}{rate:12.0f}{faster:>10}")
    rate = figures["matmul_flops_per_second"] / 1e9
    lines.append(
        f"matmul of the encoder in the same run: {rate:.0f} GFLOP/s; "
        f"the step is at {figures['fraction_of_floor']:.0%} of the floor"
    )
    return "\n".join(lines)


def bench_config(
    architecture: str, batch: int, d_in: int, d_sae: int, k: int, compute_dtype: str, model: int
) -> Config:
    """Returns a resolved config of this shape, without a store.

    Args:
      architecture: the name of the architecture.
      batch: tokens of a step.
      d_in: the width of activations.
      d_sae: the number of latents.
      k: latents that are active, where the architecture has a k.
      compute_dtype: the type of the operands of the big products.
      model: devices along the mesh's model axis.
    """
    config = Config()
    section = by_name(architecture).Config
    picks = {} if section.k is None else {"k": k}
    # No latent of a bench is dead: its steps are those of a run whose latents live.
    sae = section(d_sae=d_sae, compute_dtype=compute_dtype, dead_after_tokens=10**7, **picks)
    return dataclasses.replace(
        config,
        sae=saes.resolve(sae, d_in),
        data=dataclasses.replace(config.data, batch_size=batch),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-4),
        mesh=dataclasses.replace(config.mesh, model=model),
    )


def _ours(config: Config) -> Contestant:
    mesh = make_mesh(config)
    trainer = Trainer(config, steps=10**6, variance=float(config.sae.d_in))
    placement = BatchPlacement(mesh, config.data.batch_size)
    with jax.set_mesh(mesh):
        state = trainer.init(np.zeros(config.sae.d_in, np.float32), 1.0)

    def step(rows):
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = trainer.step(state, rows)
            jax.block_until_ready((state, metrics))

    return Contestant(placement.place, step)


def _matmul(batch: int, d_in: int, d_sae: int, config: Config) -> Contestant:
    """Returns the encoder's product alone, by XLA, with our step's operand type."""
    dtype = jnp.dtype(config.sae.compute_dtype)
    w = jax.random.normal(jax.random.key(0), (d_in, d_sae), dtype)

    @jax.jit
    def product(x, w):
        return jnp.matmul(x.astype(dtype), w, preferred_element_type=jnp.float32)

    return Contestant(jnp.asarray, lambda x: product(x, w).block_until_ready())
