"""Encodes rows to events: the latents that fire, where, and how strongly.

An event is a latent's activation above zero on one row. A TopK SAE finds its events without dense
latents. Another SAE encodes so few rows at once that their dense latents are small, and only the
entries above zero leave the device. Either way activations are those that `sae.encode` gives.

On a mesh the rows are shared over its axis `data`, and the dictionary over `model`.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax import ops
from sae_jax.errors import UserError
from sae_jax.evaluate.batching import pad_rows
from sae_jax.evaluate.metrics import activation_scale
from sae_jax.ops.active import positive_entries
from sae_jax.ops.sharding import BATCH, CODE, PER_LATENT, PER_TOKEN, per_shard, shard_index
from sae_jax.sae import SAE, TopK

DENSE = 2**25  # elements of a device's dense latents at once
_ROWS = 4096  # at once where there are no dense latents
_ROOM = 64  # events of a row that there is room for at first
_SHARDS = P(("data", "model"))


class Events(NamedTuple):
    """Activations above zero.

    Attributes:
      latents: the latents, (E,) int32.
      rows: the rows, (E,) int32.
      values: the activations, (E,) float32.
    """

    latents: np.ndarray
    rows: np.ndarray
    values: np.ndarray

    def sorted(self) -> "Events":
        """Returns the events by latent, and those of a latent by row."""
        order = np.argsort((self.latents.astype(np.int64) << 32) | self.rows)
        return Events(*(array[order] for array in self))


class Encoder:
    """Finds the events of rows of activations."""

    def __init__(self, sae: SAE, mesh: jax.sharding.Mesh | None = None):
        """Lays the SAE out over the mesh's axis `model`; without a mesh it stays where it is.

        Raises UserError if the axis does not divide the dictionary.
        """
        self._mesh, data, model = mesh, 1, 1
        if mesh is not None:
            data, model = mesh.shape["data"], mesh.shape["model"]
            if sae.config.d_sae % model:
                raise UserError(
                    f"{sae.config.d_sae} latents do not divide among the {model} devices of the "
                    "mesh's model axis; choose another"
                )
            sae = placed(sae, mesh)
        self._sae, self._is_sparse = sae, type(sae).activate is TopK.activate
        self._scale = np.asarray(activation_scale(sae))
        own = max(1, _ROWS // data)  # so that a piece of the text is several batches
        most = own if self._is_sparse else max(1, DENSE * model // sae.config.d_sae)
        self.rows_at_once = data * min(own, most)
        self._entries = self.rows_at_once // data * (sae.config.d_sae // model)
        self._room = min(_ROOM * self.rows_at_once // data, self._entries)

    def __call__(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[Events]:
        """Yields the events of each batch, while the next one is being encoded.

        A batch is rows (B, width), with the columns of a stream, and a mask (B,) of those that
        count. B is at most `rows_at_once`. Events of a batch are in no order.
        """
        ahead = None
        for batch in batches:
            found = self._dispatch(*batch)
            if ahead is not None:
                yield self._take(*ahead)
            ahead = batch, found
        if ahead is not None:
            yield self._take(*ahead)

    def _dispatch(self, x: np.ndarray, used: np.ndarray):
        x, used = (pad_rows(a, self.rows_at_once) for a in (x, used))
        if self._mesh is None:
            return self._encode(jnp.asarray(x), jnp.asarray(used))
        with jax.set_mesh(self._mesh):
            x = jax.device_put(x, NamedSharding(self._mesh, BATCH))
            used = jax.device_put(used, NamedSharding(self._mesh, PER_TOKEN))
            return self._encode(x, used)

    def _encode(self, x, used):
        if self._is_sparse:
            return None, None, *_encode_top_k(self._sae, x, used)
        return self._room, *_encode_dense(self._sae, x, used, self._room)

    def _take(self, batch, found) -> Events:
        """Returns the events on the host; with more room where there were more than it held."""
        room, total, *found = found
        if room is not None and (most := int(np.max(total))) > room:
            self._room = max(self._room, min(1 << (most - 1).bit_length(), self._entries))
            return self._take(batch, self._dispatch(*batch))
        rows, latents, values = (np.asarray(a).reshape(-1) for a in found)
        values = values * self._scale[latents]
        fired = values > 0
        return Events(latents[fired], rows[fired], values[fired])


def placed(sae: SAE, mesh: jax.sharding.Mesh) -> SAE:
    """Returns the SAE with its parameters laid out over a mesh, as in training."""
    config = sae.config
    with jax.set_mesh(mesh):
        like = jax.eval_shape(
            lambda: sae.init_parameters(jax.random.key(0), config, jnp.zeros(config.d_out))
        )
        parameters = {
            name: jax.device_put(value, NamedSharding(mesh, like[name].sharding.spec))
            for name, value in sae.parameters().items()
        }
        scales = (
            x if isinstance(x, float | int) else jax.device_put(x, NamedSharding(mesh, P()))
            for x in (sae.scale, sae.target_scale)
        )
        return type(sae).from_parameters(config, parameters, *scales)


def _inputs(sae: SAE, rows_BxW, used_B):
    """Returns what the SAE encodes, 0 in rows that do not count and may not be finite."""
    return sae.split(jnp.where(used_B[:, None], rows_BxW.astype(jnp.float32), 0.0))[0]


@jax.jit
def _encode_top_k(sae: TopK, rows_BxW, used_B):
    """Returns rows, latents and values of all slots of the code; unused slots have the value 0."""
    x, bias = sae.encoder_input(_inputs(sae, rows_BxW, used_B) * sae.scale)
    code, _ = ops.encode_top_k(x, sae.w_enc[...], bias, None, sae.config.k, 0)

    def local(values, latents, used, bias):
        rows = shard_index("data") * len(used) + jnp.arange(len(used), dtype=jnp.int32)
        latents += shard_index("model") * len(bias)
        values = jnp.where(used[:, None], values, 0.0)
        return jnp.broadcast_to(rows[:, None], values.shape), latents, values

    specs = (CODE, CODE, PER_TOKEN, PER_LATENT)
    return per_shard(local, specs, CODE)(code.values, code.indices, used_B, bias)


@functools.partial(jax.jit, static_argnames="room")
def _encode_dense(sae: SAE, rows_BxW, used_B, room: int):
    """Returns how many events each shard has, and the rows, latents and values of `room` each."""
    latents_BxN = sae.encode(_inputs(sae, rows_BxW, used_B))

    def local(dense, used):
        dense = jnp.where(used[:, None], dense, 0.0)
        total, rows, latents, values = positive_entries(dense, room)
        rows += shard_index("data") * dense.shape[0]
        latents += shard_index("model") * dense.shape[1]
        return total[None], rows, latents, values

    return per_shard(local, (CODE, PER_TOKEN), _SHARDS)(latents_BxN, used_B)
