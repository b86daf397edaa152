"""What more latents a token cost each device, by the number of shards of the dictionary.

    python experiments/benchmarks/sparse_work.py
    python experiments/benchmarks/sparse_work.py --d_in=768 --d_sae=24576 --k=32 --batch=2048

It traces the training step of a top-k SAE for 1 to 8 GPUs, and prints the bytes that each moves for
k latents a token beyond those for half as many: rows of the decoder, rows of gradients, and
candidates of the top k. Nothing is computed, so that it takes seconds at any size. With the CUDA
compiler (pip install "sae-jax[cuda]") it traces our kernels for GPUs, and without it what stands in
for them.
"""

import dataclasses
import sys

from absl import app, flags

from sae_jax.bench.step import bench_config
from sae_jax.plan import chips
from sae_jax.plan.estimate import screen

_BATCH = flags.DEFINE_integer("batch", 16_384, "Tokens a step.")
_D_IN = flags.DEFINE_integer("d_in", 4096, "Width of the activations.")
_D_SAE = flags.DEFINE_integer("d_sae", 131_072, "Dictionary size.")
_K = flags.DEFINE_integer("k", 64, "Latents a token.")
_SHARDS = (1, 2, 4, 8)


def main(_) -> int:
    every = chips.find(f"h100:1x{max(_SHARDS)}")
    if every.note:
        print(every.note, file=sys.stderr)
    print(f"{'shards':>6}{'GB a device':>14}{'of one device':>16}{'times its share':>18}")
    one = None
    for shards in _SHARDS:
        topology = dataclasses.replace(every, devices=every.devices[:shards])
        more, fewer = (_bytes(topology, shards, k) for k in (_K.value, _K.value // 2))
        cost = more - fewer
        one = one or cost
        print(f"{shards:6}{cost / 1e9:14.2f}{cost / one:16.3f}{shards * cost / one:18.2f}")
    return 0


def _bytes(topology: chips.Topology, shards: int, k: int) -> int:
    """Returns the bytes that each device of a topology moves in a step."""
    shape = _BATCH.value, _D_IN.value, _D_SAE.value, k
    return screen(bench_config("topk", *shape, "bfloat16", shards), topology).memory_bytes


if __name__ == "__main__":
    sys.exit(app.run(main))
