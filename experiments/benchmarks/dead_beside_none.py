"""What dead latents cost: our training step with some of them dead beside the same with none.

    python experiments/benchmarks/dead_beside_none.py
    python experiments/benchmarks/dead_beside_none.py --d_in=768 --d_sae=24576

Steps with each number of dead latents take turns, so that the ratios hold on a machine whose speed
drifts: every figure is a median over the rounds. With no more dead latents than aux_k AuxK should
cost at most a tenth of the step.
"""

import dataclasses
import pathlib
import time

import jax
import numpy as np
from absl import app, flags

from sae_jax.bench.step import bench_config
from sae_jax.config import Config
from sae_jax.ops.sharding import PER_LATENT
from sae_jax.paths import save_json
from sae_jax.sae import ARCHITECTURES
from sae_jax.train.mesh import BatchPlacement, make_mesh
from sae_jax.train.step import Trainer

_ARCHITECTURE = flags.DEFINE_enum("architecture", "topk", list(ARCHITECTURES), "What is trained.")
_AUX_K = flags.DEFINE_integer("aux_k", None, "Default: the config's own, a power of two near d/2.")
_BATCH = flags.DEFINE_integer("batch", 2048, "Tokens a step.")
_COMPUTE = flags.DEFINE_string("compute_dtype", "float32", "Type of the operands of products.")
_D_IN = flags.DEFINE_integer("d_in", 512, "Width of the activations.")
_D_SAE = flags.DEFINE_integer("d_sae", 2048, "Dictionary size.")
_DEAD = flags.DEFINE_list(
    "dead", ["0", "3", "100", "aux_k", "aux_k+1", "1000"], "Numbers of dead latents."
)
_K = flags.DEFINE_integer("k", 32, "Latents a token, where the architecture has a k.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Timed steps with each number of dead latents.")
_OUT = flags.DEFINE_string("out", None, "Write the figures there as JSON.")


def main(_) -> int:
    config = bench_config(
        _ARCHITECTURE.value,
        *(_BATCH.value, _D_IN.value, _D_SAE.value, _K.value),
        compute_dtype=_COMPUTE.value,
        model=1,
    )
    sae = dataclasses.replace(
        config.sae, aux_coefficient=1 / 32, aux_k=_AUX_K.value or config.sae.aux_k
    )
    config = dataclasses.replace(config, sae=sae)
    named = {"aux_k": sae.aux_k, "aux_k+1": sae.aux_k + 1}
    counts = [min(named.get(text) or int(text), sae.d_sae) for text in _DEAD.value]
    seconds = measure(config, counts, _ROUNDS.value)

    ratios = {n: float(np.median(seconds[n] / seconds[counts[0]])) for n in counts}
    medians = {n: float(np.median(seconds[n])) for n in counts}
    print(
        f"{sae.architecture} {sae.compute_dtype}, batch {_BATCH.value} d_in {sae.d_in} "
        f"d_sae {sae.d_sae} k {sae.k} aux_k {sae.aux_k}, {jax.devices()[0].device_kind}"
    )
    print(f"{'dead latents':>12}{'ms/step':>10}{f'of {counts[0]} dead':>12}")
    for n in counts:
        print(f"{n:12}{1e3 * medians[n]:10.1f}{ratios[n]:12.2f}")
    if _OUT.value:
        figures = {str(n): {"seconds": medians[n], "ratio": ratios[n]} for n in counts}
        save_json(figures, pathlib.Path(_OUT.value))
    return 0


def measure(config: Config, counts: list[int], rounds: int) -> dict[int, np.ndarray]:
    """Returns the seconds (rounds,) of steps, by how many latents are dead."""
    mesh = make_mesh(config)
    trainer = Trainer(config, steps=10**6, variance=float(config.sae.d_in))
    placement = BatchPlacement(mesh, config.data.batch_size)
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(config.data.batch_size, config.sae.d_in)).astype(np.float32)
    order = rng.permutation(config.sae.d_sae)
    seconds = {count: [] for count in counts}
    with jax.set_mesh(mesh):
        state = trainer.init(np.zeros(config.sae.d_in, np.float32), 1.0)
        for i in range(rounds + 2):  # the first two compile and touch the memory
            for count in counts:
                idle = np.where(order < count, 2 * 10**7, 0).astype(np.int32)
                idle = jax.device_put(idle, PER_LATENT)
                state = dataclasses.replace(state, idle_tokens=idle)
                rows = placement.place(batch)
                begin = time.perf_counter()
                state, metrics = trainer.step(state, rows)
                jax.block_until_ready((state, metrics))
                if i >= 2:
                    seconds[count].append(time.perf_counter() - begin)
    return {count: np.array(times) for count, times in seconds.items()}


if __name__ == "__main__":
    app.run(main)
