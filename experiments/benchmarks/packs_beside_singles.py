"""What does a pack of small SAEs take of a device, beside its runs one by one? No GPU is needed.

    pip install "sae-jax[tpu,cuda]"
    python experiments/benchmarks/packs_beside_singles.py
    python experiments/benchmarks/packs_beside_singles.py --devices=cpu:1 --architectures=topk

A training step of the whole pack is compiled for each device, and so is the step of one run. Of
both it prints the bytes that go through memory, the FLOPs of products and the operations that are
started, and the pack's part of what all runs take one by one. On the CPU of this machine both are
timed besides. A device whose compiler is not installed is left out. It takes some minutes.
"""

import argparse
import os
import pathlib
import re
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else the plugins ask for their devices

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sae_jax.bench.packs import measure_pack_step
from sae_jax.bench.step import bench_config
from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.ops.active import by_all_latents
from sae_jax.ops.sharding import BATCH
from sae_jax.paths import save_json
from sae_jax.plan import chips
from sae_jax.plan.hlo import Execution, Program
from sae_jax.plan.operations import flops_of
from sae_jax.plan.traced import read
from sae_jax.train.mesh import make_mesh
from sae_jax.train.pack import PackTrainer, set_fields

_TAKEN = ("gigabytes", "gigaflops", "operations")


def main(args) -> None:
    print(f"{args.runs} runs, d {args.d}, n {args.n}, k {args.k}, batch {args.batch}")
    print(f"{'':24}{'GB of memory':>24}{'GFLOP':>24}{'operations':>24}")
    head = f"{'pack':>9}{'singles':>9}{'':6}"
    print(f"{'':24}{head * 3}")
    figures = {}
    for name in args.devices.split(","):
        try:
            topology = chips.find(name, stand_in=False)
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        for architecture in args.architectures.split(","):
            dtype = "float32" if topology.chip is None else "bfloat16"
            shape = args.batch, args.d, args.n, args.k
            config = bench_config(architecture, *shape, dtype, 1)
            both = compile_both(config, args.runs, topology)
            pack, singles = (dict(zip(_TAKEN, a.tolist(), strict=True)) for a in both)
            found = figures[f"{name} {architecture}"] = {"pack": pack, "singles": singles}
            columns = (f"{a:9.1f}{b:9.1f}{a / b:6.2f}" for a, b in zip(*both, strict=True))
            print(f"{name:12}{architecture:12}{''.join(columns)}", flush=True)
            if topology.chip is None and args.rounds:
                seconds = measure_pack_step(config, args.runs, args.rounds)
                found["measured"] = seconds
                pack_ms, single_ms = (1e3 * seconds["seconds"][way] for way in ("pack", "alone"))
                print(
                    f"{'':12}{architecture:12}measured: pack {pack_ms:.0f} ms, "
                    f"singles {single_ms:.0f} ms, ratio {seconds['pack_over_sum']:.3f}",
                    flush=True,
                )
    if args.out:
        save_json(figures, args.out)


def compile_both(config: Config, runs: int, topology: chips.Topology):
    """Returns what a step takes of a pack of runs, and what steps of all of its runs take.

    It is an array each: GB that go through memory, GFLOPs of products, and how many operations are
    started. A loop of which the program does not say how often it runs counts once, without
    operations.
    """
    packed = [
        set_fields(config, {"train.seed": i, "optimizer.learning_rate": 1e-4 * (i + 1)})
        for i in range(runs)
    ]
    mesh = make_mesh(config, topology.devices[:1])
    shape = config.data.batch_size, config.sae.d_in
    rows = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, BATCH))
    # A dense family's step counts with all latents, as it begins.
    options = topology.compiler_options
    with jax.set_mesh(mesh), by_all_latents():
        pack = PackTrainer(packed, 10**6, 1.0)
        alone, rounds = pack.trainers[0], pack.abstract()
        of_round = _taken(pack.trace_round(0, rounds[0], rows), mesh, options, runs)
        of_run = _taken(alone.step.trace(alone.abstract(), rows), mesh, options, runs)
    return of_round * len(rounds), of_run * runs


def _taken(traced, mesh, options: dict, runs: int) -> np.ndarray:
    """Returns what a traced step takes, as `compile_both`."""
    executions = Program(traced.lower().compile(compiler_options=options).as_text()).executions
    flops = flops_of(read(traced.jaxpr.jaxpr, mesh).operations).total()
    moved = sum(_bytes(e, runs) * (e.times or 1) for e in executions)
    return np.array([moved / 1e9, flops / 1e9, sum(e.times for e in executions)])


def _bytes(execution: Execution, runs: int) -> int:
    """Returns the bytes of one execution. A kernel of a batch of runs names those of one run."""
    moved, instruction = execution.bytes, execution.instruction
    is_batched = re.match(rf"\(?\w+\[{runs},", instruction.type)
    if is_batched and instruction.opcode == "custom-call" and "moves_" in instruction.rest:
        return moved * runs
    return moved


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--devices", default="cpu:1,h200:1x1,v5p:2x2x1", help="topologies, as for plan; cpu:1 first"
    )
    parser.add_argument("--architectures", default="topk,relu")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps on the CPU")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures there as JSON")
    main(parser.parse_args())
