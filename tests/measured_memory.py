"""Run by tests/test_plan.py in a process with 8 CPU devices: bytes that training steps take, as
`plan` predicts them and as the operating system measures them. Arguments: architecture, data,
model, "zero" or nothing."""

import json
import os
import pathlib
import sys

os.environ["NPROC"] = "16"

from sae_jax.plan import chips

topology = chips.find("cpu:8")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from sae_jax.config import Config, DataConfig, MeshConfig  # noqa: E402
from sae_jax.ops.active import by_all_latents  # noqa: E402
from sae_jax.ops.sharding import BATCH  # noqa: E402
from sae_jax.plan.estimate import estimate, resolve  # noqa: E402
from sae_jax.sae import by_name  # noqa: E402
from sae_jax.train.mesh import make_mesh  # noqa: E402
from sae_jax.train.step import Trainer  # noqa: E402

WIDTH, TOKENS = 1024, 1024
STATUS = pathlib.Path("/proc/self/status")


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (at most since `clear_refs` was written to), in bytes."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def main(architecture: str, data: str, model: str, zero: str):
    config = Config(
        sae=by_name(architecture).Config(d_sae=65_536),
        data=DataConfig(batch_size=TOKENS),
        mesh=MeshConfig(data=int(data), model=int(model), zero=zero == "zero"),
    )
    config = resolve(config, (WIDTH,))
    predicted = estimate(config, topology)
    # As `plan` counts. Compiling another program first would leave more memory in use.
    with jax.set_mesh(make_mesh(config)), by_all_latents():
        trainer = Trainer(config, 10, 1.0)
        before = resident("VmRSS")
        state = trainer.init(np.zeros(WIDTH, np.float32), 1.0)
        rows = np.random.default_rng(0).normal(size=(TOKENS, WIDTH))
        rows = jax.device_put(rows.astype(jnp.bfloat16), BATCH)
        arrays = [*jax.tree.leaves(state), rows]
        device = jax.devices()[5]
        shards = [s.data for a in arrays for s in a.addressable_shards if s.device == device]
        del arrays
        held = sum(s.nbytes for s in shards)
        del shards
        state, metrics = trainer.step(state, rows)
        jax.block_until_ready((state, metrics))
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        state, metrics = trainer.step(state, rows)
        jax.block_until_ready((state, metrics))
    parts = ("parameters", "optimizer", "counters", "batch")
    measured = {
        "held": held,
        "predicted_held": sum(predicted.bytes[part] for part in parts),
        "peak": (resident("VmHWM") - before) / 8,
        "predicted_peak": predicted.total,
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
