"""The device mesh, and how a batch is placed on it."""

import math

import jax
import numpy as np
from jax.sharding import NamedSharding

from sae_jax.config import Config, MeshConfig
from sae_jax.errors import UserError
from sae_jax.ops.sharding import BATCH


def make_mesh(config: Config, devices: list | None = None) -> jax.sharding.Mesh:
    """Returns a mesh (run, data, model) over `devices`, by default all devices of the program.

    Raises UserError if the axes do not fit the number of devices, or do not divide the batch or the
    dictionary.
    """
    devices = jax.devices() if devices is None else devices
    run, data, model = sizes = _axis_sizes(config.mesh, len(devices))
    if config.data.batch_size % data:
        raise UserError(
            f"data.batch_size {config.data.batch_size} is not divisible by the {data} devices of "
            "the mesh's data axis; change it or set mesh.data"
        )
    if config.sae.d_sae % model:
        raise UserError(
            f"sae.d_sae {config.sae.d_sae} is not divisible by the {model} devices of the mesh's "
            "model axis; change it or set mesh.model"
        )
    if config.mesh.zero and config.sae.d_sae % (data * model):
        raise UserError(
            f"mesh.zero spreads sae.d_sae over {data} x {model} devices, which do not divide "
            f"{config.sae.d_sae}; change it or set mesh.zero=false"
        )
    return jax.make_mesh(sizes, ("run", "data", "model"), devices=devices[: math.prod(sizes)])


def _axis_sizes(config: MeshConfig, count: int) -> tuple[int, int, int]:
    sizes = [config.run, config.data, config.model]
    asked = f"mesh.run={config.run} mesh.data={config.data} mesh.model={config.model}"
    if any(size != -1 and size < 1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"{asked}: give sizes of 1 or more, and -1 (whatever is left) at most once")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        if count % known:
            raise UserError(f"{asked} does not divide the {count} devices at hand")
        sizes[sizes.index(-1)] = count // known
    used = math.prod(sizes)
    if used > count or (used < count and jax.process_count() > 1):
        raise UserError(f"{asked} takes {used} devices, but there are {count}")
    return tuple(sizes)


class BatchPlacement:
    """Says which rows of a batch (batch_size, width) this process reads, and places them.

    Both follow from the batch's sharding, not from the process's index: along the `model` axis
    several processes hold the same rows.

    Attributes:
      rows: the slices of the batch that this process reads, in ascending order.
    """

    def __init__(self, mesh: jax.sharding.Mesh, batch_size: int):
        self._sharding = NamedSharding(mesh, BATCH)
        self._batch_size = batch_size
        indices = self._sharding.addressable_devices_indices_map((batch_size, 1))
        self._range_of_device = {
            d: index[0].indices(batch_size)[:2] for d, index in indices.items()
        }
        self.rows = [slice(*r) for r in sorted(set(self._range_of_device.values()))]

    def place(self, rows_Rxd: np.ndarray) -> jax.Array:
        """Returns the global batch on the devices, made from this process's rows.

        They are the rows of `self.rows`, one slice after another.
        """
        starts = np.cumsum([0] + [s.stop - s.start for s in self.rows])
        offset = {s.start: int(start) for s, start in zip(self.rows, starts, strict=False)}
        shards = [
            jax.device_put(rows_Rxd[offset[low] : offset[low] + high - low], device)
            for device, (low, high) in self._range_of_device.items()
        ]
        shape = (self._batch_size, rows_Rxd.shape[1])
        return jax.make_array_from_single_device_arrays(shape, self._sharding, shards)
