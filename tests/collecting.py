"""Run by tests/test_collect.py in processes of its own: collects from a store.

    python collecting.py STORE OUT DEVICES DATA MODEL [ADDRESS COUNT INDEX]

The last three are of `jax.distributed`.
"""

import os
import sys

os.environ["NPROC"] = "16"

import jax  # noqa: E402

store, out, *numbers = sys.argv[1:]
devices, data, model = map(int, numbers[:3])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", devices)

import planted  # noqa: E402

from sae_jax.activations import Store  # noqa: E402
from sae_jax.evaluate.sources import HeldOutRows  # noqa: E402
from sae_jax.interpret import collect  # noqa: E402


def main():
    if numbers[3:]:
        address, count, index = numbers[3:]
        jax.distributed.initialize(address, int(count), int(index))
    mesh = jax.make_mesh(
        (1, data, model), ("run", "data", "model"), devices=jax.local_devices()[: data * model]
    )
    source = HeldOutRows(Store.open(store), "a", tokens=10**6, holdout_fraction=None)
    collect(planted.sae("topk"), source, out, mesh=mesh, **planted.SLOTS)


if __name__ == "__main__":
    main()
