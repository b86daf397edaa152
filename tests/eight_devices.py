"""Run by tests/test_train_processes.py in a process with 8 CPU devices: the latents that BatchTopK
picks in training, on every mesh of 1, 2, 4 and 8 devices, and what they are on one."""

import os

os.environ["NPROC"] = "16"

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

import numpy as np  # noqa: E402

from sae_jax import sae as saes  # noqa: E402
from sae_jax.ops.sharding import BATCH  # noqa: E402
from sae_jax.sae import BatchTopKConfig  # noqa: E402


def picked(shape, rows, config) -> np.ndarray:
    """Latents (B, d_sae) of a training batch on a mesh of shape (data, model)."""
    devices = jax.devices()[: shape[0] * shape[1]]
    architecture = saes.architecture(config)
    with jax.set_mesh(jax.make_mesh((1, *shape), ("run", "data", "model"), devices=devices)):

        @jax.jit
        def latents(key, x):
            b_dec = jax.numpy.zeros(config.d_in)
            sae = architecture.from_parameters(
                config, architecture.init_parameters(key, config, b_dec)
            )
            return sae.activate_batch(sae.preactivations(x), config.k)[0]

        return np.asarray(latents(jax.random.key(1), jax.device_put(rows, BATCH)))


def main():
    rows = np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)
    rows[::2] = rows[1::2]  # every value twice: ties wherever the line falls
    config = saes.resolve(BatchTopKConfig(d_sae=1024, k=7), 64)
    want = picked((1, 1), rows, config)
    assert (want > 0).sum() == 7 * 256
    meshes = [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4), (1, 8)]
    for shape in meshes:
        got = picked(shape, rows, config)
        same = np.array_equal(got.view(np.int32), want.view(np.int32))
        print(f"data {shape[0]} model {shape[1]}: {'same' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
