"""Four CPU devices for every test in this process."""

import os

os.environ.setdefault("NPROC", "16")  # XLA's threads; fewer than devices and collectives hang

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(params=[(1, 1), (4, 1), (1, 4), (2, 2)], ids=lambda s: f"data{s[0]}-model{s[1]}")
def mesh(request):
    """The ambient mesh of each shape that four devices allow."""
    data, model = request.param
    mesh = jax.make_mesh(
        (1, data, model), ("run", "data", "model"), devices=jax.devices()[: data * model]
    )
    with jax.set_mesh(mesh):
        yield mesh
