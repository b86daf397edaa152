"""What would training steps cost on GPUs and TPUs that are not there?

    pip install "sae-jax[tpu,cuda]"
    python experiments/benchmarks/compiled_steps.py
    python experiments/benchmarks/compiled_steps.py --topology=h200:1x1 --architecture=topk --top=20

Each step is compiled as `sae-jax plan` does it, for one chip or for --devices that share the
dictionary, and its program read. "sum" is that over the operations of the longer of FLOPs and bytes
over the chip's peaks; "compiler" takes the compiler's own estimates where it has any: on a GPU of
its fusions, and not of products, collectives and kernels. No chip has confirmed either. "before" is
what the compiler estimated for the step before it was made for such chips (at the default shape,
without AuxK). A device whose compiler is not installed is left out. Compiling takes minutes.
"""

import argparse
import dataclasses
import itertools
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else the plugins ask for their devices

from sae_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from sae_jax.errors import UserError
from sae_jax.plan import chips, table
from sae_jax.plan.estimate import Estimate, estimate, resolve
from sae_jax.sae.registry import by_name

_SHAPE = {"d": 4096, "n": 131_072, "k": 64, "batch": 16_384}
_BEFORE = {  # ms and GB at this shape
    ("h200", "topk"): (109, 336),
    ("h200", "relu"): (123, 155),
    ("v5p", "topk"): (301, None),
    ("v5p", "relu"): (299, None),
    ("v6e", "relu"): (263, None),
}


def main(args) -> None:
    plain = {name: getattr(args, name) for name in _SHAPE} == _SHAPE
    plain &= args.devices == 1 and args.dtype == "bfloat16" and not args.aux
    print(f"d {args.d}, n {args.n}, k {args.k}, batch {args.batch}, {args.dtype}, AuxK {args.aux}")
    columns = ("sum ms", "compiler ms", "GB", "before ms", "GB")
    print(f"{'':16}" + "".join(f"{name:>13}" for name in columns))
    for name, architecture in itertools.product(args.topology, args.architecture):
        try:
            topology = chips.find(name, stand_in=False)
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        topology = dataclasses.replace(topology, devices=topology.devices[: args.devices])
        found = estimate(config_of(args, architecture), topology)
        before = _BEFORE.get((topology.kind, architecture), (None, None)) if plain else (None, None)
        figures = (
            1e3 * found.step_seconds,
            found.compiler_seconds and 1e3 * found.compiler_seconds,
            found.memory_bytes / 1e9,
            *before,
        )
        shown = "".join(f"{'' if f is None else format(f, '.1f'):>13}" for f in figures)
        print(f"{topology.kind:8}{architecture:8}{shown}", flush=True)
        if args.top:
            print_dearest(found, args.top)


def config_of(args, architecture: str) -> Config:
    kind = by_name(architecture).Config
    picks = {} if kind.k is None else {"k": args.k, "aux_coefficient": args.aux}
    config = Config(
        sae=kind(d_in=args.d, d_sae=args.n, compute_dtype=args.dtype, **picks),
        data=DataConfig(batch_size=args.batch),
        mesh=MeshConfig(run=1, data=1, model=args.devices),
        train=TrainConfig(tokens=1000 * args.batch),
    )
    return resolve(config, (args.d,))


def print_dearest(found: Estimate, top: int) -> None:
    """Prints the operations that take longest."""
    print("      ms        GB  times  operation")
    for o in table.dearest(found, top):
        ms, gigabytes = 1e3 * o.seconds(found.topology), o.bytes * o.times / 1e9
        print(f"{ms:8.2f}{gigabytes:10.2f}{o.times:7}  {o.words} (%{o.name})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--topology",
        nargs="+",
        default=["h200:1x1", "v5p:2x2x1", "v6e:2x2"],
        help="as plan's --topology",
    )
    parser.add_argument("--architecture", nargs="+", default=["topk", "relu"])
    for size, default in _SHAPE.items():
        parser.add_argument(f"--{size}", type=int, default=default)
    parser.add_argument("--aux", type=float, default=0.0, help="coefficient of AuxK's loss")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--devices", type=int, default=1, help="shards of the dictionary")
    parser.add_argument("--top", type=int, default=0, help="operations to print of each step")
    main(parser.parse_args())
