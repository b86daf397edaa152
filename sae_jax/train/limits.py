"""What a run takes of JAX and of the machine: 32-bit arithmetic, and memory for its state."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import jax

from sae_jax.config import Config
from sae_jax.errors import UserError

_ADVICE = "lower sae.d_sae, or share it between devices with mesh.model or mesh.zero"
_STATE_FLOATS = 3  # of each weight: itself and Adam's two moments


def in_32_bits(function: Callable) -> Callable:
    """Makes `function` compute in 32 bits, also where JAX_ENABLE_X64 says otherwise.

    A run is then the same run, bit for bit, whatever else the program or the environment needs.
    """

    @functools.wraps(function)
    def call(*arguments, **named):
        with jax.enable_x64(False):
            return function(*arguments, **named)

    return call


def check_memory(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError if not even the weights and Adam's moments fit into the mesh's devices."""
    needed, there = _state_bytes(config, mesh), _device_bytes(mesh)
    if there is not None and needed > there:
        raise UserError(
            f"sae.d_sae {config.sae.d_sae:,} takes {_gigabytes(needed)} of each device for weights "
            f"and Adam's moments alone, of {_gigabytes(there)} that there are; {_ADVICE}"
        )


@contextlib.contextmanager
def lack_of_memory_named(advice: str = "") -> Iterator[None]:
    """Turns a lack of memory into a UserError that says what to do, `advice` first."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"there is not enough memory for this run ({str(error).splitlines()[0]:.120}); "
            f"{advice}{_ADVICE}, or lower data.batch_size (sae-jax plan says what a run takes)"
        ) from error


def _state_bytes(config: Config, mesh: jax.sharding.Mesh) -> int:
    """Returns the bytes of each device that the largest parameters and their moments take."""
    sae = config.sae
    shards = mesh.shape["model"] * (mesh.shape["data"] if config.mesh.zero else 1)
    return 4 * _STATE_FLOATS * (sae.d_in + sae.d_out) * sae.d_sae // shards


def _device_bytes(mesh: jax.sharding.Mesh) -> int | None:
    """Returns the bytes that each device has, None where nobody tells. CPU devices share them."""
    device, *_ = mesh.local_devices
    if device.platform == "cpu":
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return whole // len(mesh.local_devices)
    return (device.memory_stats() or {}).get("bytes_limit")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
