"""What would a training step move on a GPU, and which operations cost most? No GPU is needed.

    pip install "sae-jax[cuda]"
    python experiments/benchmarks/compiled_for_gpu.py --d=4096 --n=131072 --k=64 --batch=16384

The step is compiled for an H200 (or --chip=h100) and its program read, as `sae-jax plan` does it:
each operation takes the longer of its bytes over the memory's bandwidth and of its products' FLOPs
over the peak. The sum of these is an estimate that no chip has confirmed. --out keeps the program.
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else the plugin asks for a driver

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from sae_jax import sae as saes
from sae_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from sae_jax.ops.sharding import BATCH
from sae_jax.plan.absent_gpus import COMPILER_OPTIONS, absent_gpus
from sae_jax.plan.chips import describe
from sae_jax.plan.estimate import resolve
from sae_jax.plan.hlo import Program
from sae_jax.plan.operations import bytes_of, operations_of
from sae_jax.train.mesh import make_mesh
from sae_jax.train.step import Trainer


def compile_step(args) -> str:
    """Returns the text of the compiled step."""
    sae = {"d_in": args.d, "d_sae": args.n, "compute_dtype": args.dtype}
    if args.architecture in ("topk", "batchtopk"):
        sae |= {"k": args.k, "aux_coefficient": args.aux}
    config = Config(
        sae=saes.by_name(args.architecture).Config(**sae),
        data=DataConfig(batch_size=args.batch),
        mesh=MeshConfig(run=1, data=1, model=args.devices),
        train=TrainConfig(tokens=1000 * args.batch),
    )
    config = resolve(config, (args.d,))
    mesh = make_mesh(config, absent_gpus(args.chip, args.devices))
    with jax.set_mesh(mesh):
        trainer = Trainer(config, steps=1000, variance=1.0)
        shape = args.batch, args.d
        rows = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, BATCH))
        lowered = trainer.step.lower(trainer.abstract(), rows)
        return lowered.compile(compiler_options=COMPILER_OPTIONS).as_text()


def main(args) -> None:
    text = compile_step(args)
    if args.out:
        with open(args.out, "w") as file:
            file.write(text)
    topology = describe(f"{args.chip}:1x{args.devices}")
    work = [(o.seconds(topology), o) for o in operations_of(Program(text), clock=None)]
    moved = bytes_of(operation for _, operation in work)
    print(f"{sum(seconds for seconds, _ in work) * 1e3:.1f} ms, {moved / 1e9:.1f} GB")
    print("      ms        GB  times  operation")
    for seconds, operation in sorted(work, key=lambda each: -each[0])[: args.top]:
        print(
            f"{seconds * 1e3:8.2f}{operation.bytes * operation.times / 1e9:10.2f}"
            f"{operation.times:7}  {operation.words} (%{operation.name})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--chip", default="h200", choices=("h100", "h200"))
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
