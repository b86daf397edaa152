"""What would a training step cost on a TPU, and which operations cost most? No TPU is needed.

    pip install "sae-jax[tpu]"
    python experiments/benchmarks/compiled_for_tpu.py
    python experiments/benchmarks/compiled_for_tpu.py --topology v5p:2x2x1 --top=20

Each step is compiled for one chip (or --devices, which share the dictionary) of a slice, and its
program read. XLA writes on each operation how many cycles it expects it to take, but not on our
kernels: of these the longer of FLOPs and bytes over the chip's peaks counts. A loop of which the
program does not say how often it runs counts once. The sum is an estimate that no chip has
confirmed. Beside it stand the products alone at the chip's peak, and what was estimated before
there were kernels and options for TPUs. Compiling takes minutes.
"""

import argparse
import itertools
import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from sae_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from sae_jax.ops.sharding import BATCH
from sae_jax.plan import chips
from sae_jax.plan.estimate import resolve
from sae_jax.plan.hlo import Execution, Program
from sae_jax.sae import registry
from sae_jax.train.mesh import make_mesh
from sae_jax.train.step import Trainer

_CYCLES = 1.75e9  # a second, of a v5p and a v6e
_SPARSE = ("topk", "batchtopk")
_SHAPE = {"d": 4096, "n": 131_072, "k": 64, "batch": 16_384}
_BEFORE = {("v5p", "topk"): 301, ("v5p", "relu"): 299, ("v6e", "relu"): 263}  # ms at this shape


def compile_step(args, topology: str, architecture: str) -> str:
    """Returns the text of the compiled step."""
    kind = registry.by_name(architecture).Config
    sae = {"d_in": args.d, "d_sae": args.n, "compute_dtype": args.dtype}
    if architecture in _SPARSE:
        sae |= {"k": args.k, "aux_coefficient": args.aux}
    config = Config(
        sae=kind(**sae),
        data=DataConfig(batch_size=args.batch),
        mesh=MeshConfig(run=1, data=1, model=args.devices),
        train=TrainConfig(tokens=1000 * args.batch),
    )
    config = resolve(config, (args.d,))
    mesh = make_mesh(config, chips.find(topology).devices[: args.devices])
    with jax.set_mesh(mesh):
        trainer = Trainer(config, steps=1000, variance=1.0)
        shape = args.batch, args.d
        rows = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, BATCH))
        return trainer.step.lower(trainer.abstract(), rows).compile().as_text()


def seconds_of(execution: Execution, chip: chips.Chip) -> float:
    """Returns the seconds of one execution of an operation."""
    rest = execution.instruction.rest
    if "AllocateBuffer" in rest:
        return 0.0  # nothing is written to it
    if cycles := re.search(r'"estimated_cycles":"?(\d+)', rest):
        return int(cycles.group(1)) / _CYCLES
    moved = execution.traffic.memory_bytes / chip.memory_rate
    flops = re.search(r"_of_(\d+)_flops", rest)
    return max(moved, int(flops.group(1)) / chip.bfloat16 if flops else 0.0)


def print_dearest(costs: list[tuple[float, int, Execution]], top: int) -> None:
    """Prints the operations that take longest, of (seconds, times, operation)."""
    print("      ms  times  operation")
    for seconds, times, execution in sorted(costs, key=lambda c: -c[0])[:top]:
        instruction = execution.instruction
        named = re.search(r'op_name="([^"]*)"', instruction.rest)
        print(
            f"{seconds * 1e3:8.2f}{times:7}  {instruction.name} {instruction.type[:40]} "
            f"{named.group(1)[-60:] if named else ''}"
        )


def main(args) -> None:
    shape = {name: getattr(args, name) for name in _SHAPE}
    plain = shape == _SHAPE and args.devices == 1 and args.dtype == "bfloat16"
    print("chip  architecture  estimate ms  products ms  before ms")
    for topology, architecture in itertools.product(args.topology, args.architecture):
        text = compile_step(args, topology, architecture)
        if args.out:
            with open(args.out, "w") as file:
                file.write(text)
        name = topology.split(":")[0]
        chip = chips.CHIPS[name]
        executions = [(e.times or 1, e) for e in Program(text).executions]
        costs = [(seconds_of(e, chip) * times, times, e) for times, e in executions]
        products = (2 if architecture in _SPARSE else 10) * args.batch * args.d * args.n
        peak = chip.bfloat16 if args.dtype == "bfloat16" else chip.float32
        print(
            f"{name:6}{architecture:14}{sum(cost[0] for cost in costs) * 1e3:11.1f}"
            f"{products / args.devices / peak * 1e3:13.1f}"
            f"{_BEFORE.get((name, architecture), '') if plain else '':>11}",
            flush=True,
        )
        if args.top:
            print_dearest(costs, args.top)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--topology",
        nargs="+",
        default=["v5p:2x2x1", "v6e:2x2"],
        help="slices, as plan's --topology",
    )
    parser.add_argument("--architecture", nargs="+", default=["topk", "relu"])
    for size, default in _SHAPE.items():
        parser.add_argument(f"--{size}", type=int, default=default)
    parser.add_argument("--aux", type=float, default=0.0, help="coefficient of AuxK's loss")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--devices", type=int, default=1, help="shards of the dictionary")
    parser.add_argument("--top", type=int, default=0, help="operations to print of each step")
    parser.add_argument("--out", help="a file for the (last) program's text")
    main(parser.parse_args())
