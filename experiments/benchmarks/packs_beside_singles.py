"""What does a pack of small SAEs take of a device, beside its runs one by one? No GPU is needed.

    pip install "sae-jax[tpu,cuda]"
    python experiments/benchmarks/packs_beside_singles.py
    python experiments/benchmarks/packs_beside_singles.py --devices=cpu --architectures=topk

A training step of the whole pack is compiled for each device, and so is the step of one run. Of
both it prints the bytes that go through memory, the FLOPs of products and the operations that are
started, and the pack's part of what all runs take one by one. On the CPU of this machine both are
timed besides. A device whose compiler is not installed is left out. It takes some minutes.
"""

import argparse
import dataclasses
import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else the plugins ask for their devices

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from sae_jax.bench.packs import measure_pack_step
from sae_jax.bench.step import bench_config
from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.ops.sharding import BATCH
from sae_jax.plan import chips
from sae_jax.plan.absent_gpus import COMPILER_OPTIONS, absent_gpus
from sae_jax.plan.flops import matmul_flops
from sae_jax.plan.hlo import Execution, Program
from sae_jax.train.mesh import make_mesh
from sae_jax.train.pack import PackTrainer, set_fields


@dataclasses.dataclass(frozen=True)
class Taken:
    """What one step takes.

    Attributes:
      memory: bytes that it reads from and writes to memory.
      products: FLOPs of matrix products.
      operations: how many operations it starts.
    """

    memory: int
    products: int
    operations: int


def main(args) -> None:
    print(f"{args.runs} runs, d {args.d}, n {args.n}, k {args.k}, batch {args.batch}")
    print(f"{'':24}{'GB of memory':>22}{'GFLOP':>22}{'operations':>22}")
    head = f"{'pack':>8}{'singles':>8}{'':6}"
    print(f"{'':24}{head * 3}")
    for name in args.devices.split(","):
        try:
            devices, options = compiled_for(name)
        except UserError as error:
            print(f"{name}: {error}")
            continue
        for architecture in args.architectures.split(","):
            dtype = "float32" if name == "cpu" else "bfloat16"
            shape = args.batch, args.d, args.n, args.k
            config = bench_config(architecture, *shape, dtype, 1)
            pack, single = compile_both(config, args.runs, devices, options)
            print(f"{name:12}{architecture:12}", end="")
            for field, unit in (("memory", 1e9), ("products", 1e9), ("operations", 1)):
                a, b = getattr(pack, field) / unit, args.runs * getattr(single, field) / unit
                form = ".0f" if unit == 1 else ".1f"
                print(f"{a:8{form}}{b:8{form}}{a / b:6.2f}", end="")
            print(flush=True)
            if name == "cpu" and args.rounds:
                seconds = measure_pack_step(config, args.runs, args.rounds)
                pack_ms, single_ms = (1e3 * seconds["seconds"][k] for k in ("pack", "alone"))
                print(
                    f"{'':12}{architecture:12}measured: pack {pack_ms:.0f} ms, "
                    f"singles {single_ms:.0f} ms, ratio {seconds['pack_over_sum']:.3f}",
                    flush=True,
                )


def compiled_for(name: str) -> tuple[list, dict]:
    """Returns devices of a kind, and the options to compile for them with.

    Raises UserError where the compiler is not installed.
    """
    if name == "cpu":
        return jax.devices(), {}
    if name in ("h100", "h200"):
        return absent_gpus(name, 1), COMPILER_OPTIONS
    return chips.find(name).devices, {}


def compile_both(config: Config, runs: int, devices: list, options: dict) -> tuple[Taken, Taken]:
    """Returns what a step takes of a pack of runs, and what it takes of one run."""
    packed = [
        set_fields(config, {"train.seed": i, "optimizer.learning_rate": 1e-4 * (i + 1)})
        for i in range(runs)
    ]
    mesh = make_mesh(config, devices[:1])
    shape = config.data.batch_size, config.sae.d_in
    rows = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, BATCH))
    with jax.set_mesh(mesh):
        pack = PackTrainer(packed, 10**6, 1.0)
        (single, *_) = pack.trainers
        steps = (jax.jit(pack.step, donate_argnums=0), pack.abstract()), (
            single.step,
            single.abstract(),
        )
        return tuple(_taken(step.trace(state, rows), mesh, options, runs) for step, state in steps)


def _taken(traced, mesh, options: dict, runs: int) -> Taken:
    program = Program(traced.lower().compile(compiler_options=options).as_text())
    memory = sum(_bytes(e, runs) * (e.times or 1) for e in program.executions)
    return Taken(
        memory=memory,
        products=matmul_flops(traced.jaxpr.jaxpr, mesh).total(),
        operations=sum(e.times for e in program.executions),
    )


def _bytes(execution: Execution, runs: int) -> int:
    """Returns the bytes of one execution. A kernel of a batch of runs names those of one run."""
    moved = execution.traffic.memory_bytes
    batched = re.match(rf"\(?\w+\[{runs},", execution.instruction.type)
    return moved * runs if batched and "moves_" in execution.instruction.rest else moved


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--devices", default="cpu,h200,v5p:2x2x1", help="to compile for")
    parser.add_argument("--architectures", default="topk,relu")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps on the CPU")
    main(parser.parse_args())
