"""Steps of the dense families by the latents that act alone, beside steps by all latents.

    python experiments/benchmarks/sparse_beside_dense.py
    python experiments/benchmarks/sparse_beside_dense.py --architectures=relu --d_sae=8192

Each family takes steps with a fresh SAE, of which about half of the latents act on every token, and
with one whose biases leave `--l0` latents a token, as training does. The SAEs learn at a rate at
which this stays so. All steps are taken in turn, so that their ratios hold on a machine whose speed
drifts; beside them is the step of a top-k SAE with k = `--l0`.

The command `sae-jax` has glibc put large arrays on huge pages; set
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 to have the same here.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from sae_jax.bench.step import bench_config
from sae_jax.config import Config
from sae_jax.ops.active import by_all_latents
from sae_jax.paths import save_json
from sae_jax.train.mesh import BatchPlacement, make_mesh
from sae_jax.train.step import Trainer

_ARCHITECTURES = flags.DEFINE_list("architectures", ["relu", "jumprelu", "gated"], "The families.")
_L0 = flags.DEFINE_integer("l0", 64, "Latents that act on a token of a sparse SAE; k of top-k.")
_BATCH = flags.DEFINE_integer("batch", 2048, "Tokens a step.")
_D_IN = flags.DEFINE_integer("d_in", 768, "Width of the activations.")
_D_SAE = flags.DEFINE_integer("d_sae", 24_576, "Dictionary size.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps of each contestant.")
_OUT = flags.DEFINE_string("out", None, "Write the figures there as JSON.")

_KINDS = {  # whether the SAE is sparse, and whether active latents are looked for
    "fresh, all latents": (False, False),
    "fresh": (False, True),
    "sparse, all latents": (True, False),
    "sparse": (True, True),
}


def main(_) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 means float32
    shown = f"{_L0.value} latents a token, batch {_BATCH.value}, d_in {_D_IN.value}"
    print(f"{shown}, d_sae {_D_SAE.value}\n{'':44}{'ms/step':>10}{'of top-k':>10}")
    figures = {}
    for name in _ARCHITECTURES.value:
        seconds = measure(name)
        figures[name] = {
            kind: {"seconds": s, "times_top_k": s / seconds["topk"]} for kind, s in seconds.items()
        }
        for kind, row in figures[name].items():
            label = f"{name} {kind}"
            print(f"{label:44}{1e3 * row['seconds']:10.1f}{row['times_top_k']:9.2f}x", flush=True)
    if _OUT.value:
        save_json(figures, pathlib.Path(_OUT.value))


def measure(architecture: str) -> dict[str, float]:
    """Returns the median seconds of each kind of step, with its L0, and of a top-k step."""
    rng = np.random.default_rng(0)
    batches = rng.normal(size=(4, _BATCH.value, _D_IN.value)).astype(np.float32)
    steps = {"topk": make_step(config_of("topk"), False, True, batches[0])}
    for kind, choice in _KINDS.items():
        step = make_step(config_of(architecture), *choice, batches[0])
        steps[f"{kind}, L0 {step(batches[0]):.0f}"] = step
    seconds = {contestant: [] for contestant in steps}
    for i in range(_ROUNDS.value + 2):  # the first two compile and touch the memory
        for contestant, step in steps.items():
            begin = time.perf_counter()
            step(batches[i % len(batches)])
            seconds[contestant].append(time.perf_counter() - begin)
    return {contestant: float(np.median(times[2:])) for contestant, times in seconds.items()}


def config_of(architecture: str) -> Config:
    shape = (_BATCH.value, _D_IN.value, _D_SAE.value, _L0.value)
    config = bench_config(architecture, *shape, "float32", 1)
    slow = dataclasses.replace(config.optimizer, learning_rate=1e-12)
    return dataclasses.replace(config, optimizer=slow)


def make_step(config: Config, is_sparse: bool, finds: bool, x: np.ndarray) -> Callable:
    """Returns a training step that returns L0.

    finds: whether active latents are looked for; otherwise the step is by all latents.
    """
    mesh = make_mesh(config)
    trainer = Trainer(config, steps=10**6, variance=float(config.sae.d_in))
    placement = BatchPlacement(mesh, config.data.batch_size)
    with jax.set_mesh(mesh):
        state = trainer.init(np.zeros(config.sae.d_in, np.float32), 1.0)
        if is_sparse:
            products = x[:64] @ np.asarray(state.parameters["w_enc"])
            bias = -np.quantile(products, 1 - _L0.value / config.sae.d_sae).astype(np.float32)
            lowered = {
                name: jnp.full_like(state.parameters[name], bias)
                for name in ("b_enc", "b_mag")
                if name in state.parameters
            }
            state = dataclasses.replace(state, parameters=state.parameters | lowered)

    def step(x):
        nonlocal state
        # The step is traced at its first call.
        with jax.set_mesh(mesh), contextlib.nullcontext() if finds else by_all_latents():
            state, metrics = trainer.step(state, placement.place(x))
            return float(jax.block_until_ready((state, metrics))[1]["l0"])

    return step


if __name__ == "__main__":
    app.run(main)
