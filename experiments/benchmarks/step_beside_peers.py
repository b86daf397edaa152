"""Our training step beside the installed peers' own trainers, in turn.

    python experiments/benchmarks/step_beside_peers.py
    python experiments/benchmarks/step_beside_peers.py --architecture=relu --d_in=512 --d_sae=8192

The peers are sae-lens, dictionary-learning and eai-sparsify: pip install "sae-jax[peers]". Every
figure comes from one run, so that its ratios hold on a machine whose speed drifts. The command
`sae-jax` has glibc put large arrays on huge pages; set GLIBC_TUNABLES=glibc.malloc.hugetlb=1 to
have the same here.
"""

import pathlib
import sys

import jax
import peers
from absl import app, flags

from sae_jax.bench.step import bench_config, measure_step, table
from sae_jax.paths import save_json

_ARCHITECTURE = flags.DEFINE_enum(
    "architecture", "topk", ["topk", "batchtopk", "relu", "jumprelu"], "What is trained."
)
_BATCH = flags.DEFINE_integer("batch", 2048, "Tokens a step.")
_D_IN = flags.DEFINE_integer("d_in", 768, "Width of the activations.")
_D_SAE = flags.DEFINE_integer("d_sae", 24_576, "Dictionary size.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of our products' operands; peers have float32."
)
_K = flags.DEFINE_integer("k", 32, "Latents a token, for topk and batchtopk.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed steps of each contestant.")
_OUT = flags.DEFINE_string("out", None, "Write the figures there as JSON.")


def main(_) -> int:
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 means float32
    shape = (_BATCH.value, _D_IN.value, _D_SAE.value, _K.value)
    others = peers.find(_ARCHITECTURE.value, *shape)
    if not others:
        print('no peer is installed: pip install "sae-jax[peers]"', file=sys.stderr)
        return 2
    config = bench_config(_ARCHITECTURE.value, *shape, _DTYPE.value, 1)
    figures = measure_step(config, _ROUNDS.value, others)
    print(table(figures))
    if _OUT.value:
        save_json(figures, pathlib.Path(_OUT.value))
    return 0


if __name__ == "__main__":
    app.run(main)
