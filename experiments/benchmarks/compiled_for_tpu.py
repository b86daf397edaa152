"""What would a training step cost on a TPU, and which operations cost most? No TPU is needed.

    pip install "sae-jax[tpu]"
    python experiments/benchmarks/compiled_for_tpu.py --d=4096 --n=131072 --k=64 --batch=16384

The step is compiled for one chip (or --devices, which share the dictionary) of a slice, and its
program read. XLA writes on each operation how many cycles it expects it to take, but not on our
kernels: of these the longer of FLOPs and bytes over the chip's peaks counts. A loop of which the
program does not say how often it runs counts once. The sum is an estimate that no chip has
confirmed. Compiling takes minutes.
"""

import argparse
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


def compile_step(args) -> str:
    """Returns the text of the compiled step."""
    kind = registry.by_name(args.architecture).Config
    sae = {"d_in": args.d, "d_sae": args.n, "compute_dtype": args.dtype}
    if args.architecture in ("topk", "batchtopk"):
        sae |= {"k": args.k, "aux_coefficient": args.aux}
    config = Config(
        sae=kind(**sae),
        data=DataConfig(batch_size=args.batch),
        mesh=MeshConfig(run=1, data=1, model=args.devices),
        train=TrainConfig(tokens=1000 * args.batch),
    )
    config = resolve(config, (args.d,))
    mesh = make_mesh(config, chips.find(args.topology).devices[: args.devices])
    with jax.set_mesh(mesh):
        trainer = Trainer(config, steps=1000, variance=1.0)
        shape = args.batch, args.d
        rows = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, BATCH))
        return trainer.step.lower(trainer.abstract(), rows).compile().as_text()


def seconds_of(execution: Execution, chip: chips.Chip) -> float:
    """Returns the seconds of one execution of an operation."""
    rest = execution.instruction.rest
    if cycles := re.search(r'"estimated_cycles":"?(\d+)', rest):
        return int(cycles.group(1)) / _CYCLES
    moved = execution.traffic.memory_bytes / chip.memory_rate
    flops = re.search(r"_of_(\d+)_flops", rest)
    return max(moved, int(flops.group(1)) / chip.bfloat16 if flops else 0.0)


def main(args) -> None:
    text = compile_step(args)
    if args.out:
        with open(args.out, "w") as file:
            file.write(text)
    chip = chips.CHIPS[args.topology.split(":")[0]]
    costs = []
    for execution in Program(text).executions:
        times = execution.times or 1
        costs.append((seconds_of(execution, chip) * times, times, execution))
    print(f"{sum(cost[0] for cost in costs) * 1e3:.1f} ms")
    print("      ms  times  operation")
    for seconds, times, execution in sorted(costs, key=lambda c: -c[0])[: args.top]:
        instruction = execution.instruction
        named = re.search(r'op_name="([^"]*)"', instruction.rest)
        print(
            f"{seconds * 1e3:8.2f}{times:7}  {instruction.name} {instruction.type[:40]} "
            f"{named.group(1)[-60:] if named else ''}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--topology", default="v5p:2x2x1", help="a slice, as plan's --topology")
    parser.add_argument("--architecture", default="topk")
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--n", type=int, default=131_072)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16_384)
    parser.add_argument("--aux", type=float, default=0.0, help="coefficient of AuxK's loss")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--devices", type=int, default=1, help="shards of the dictionary")
    parser.add_argument("--top", type=int, default=20, help="operations to print")
    parser.add_argument("--out", help="a file for the program's text")
    main(parser.parse_args())
