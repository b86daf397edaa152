"""Keeps the keys and values of tokens that a decoder has seen, for those that follow.

All rows fill the same slots. Prompts of different lengths end in the same slot, and what is before
a shorter one is padding that no query sees: positions count from the row's first token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax.lm.architecture import DecoderConfig, LayerKind, layout
from sae_jax.lm.attention import attend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Holds the keys and values of all layers.

    Attributes:
      keys: (B, n, slots, k) for each layer, a list; or (layers, B, n, slots, k) where the
        parameters of layers are stacked.
      values: the same of values.
      first: (B,), the slot of each row's first token.
      filled: the number of slots that are filled, a scalar.
      empty: whether it is 0.
    """

    keys: list[jax.Array] | jax.Array
    values: list[jax.Array] | jax.Array
    first: jax.Array
    filled: jax.Array
    empty: bool = dataclasses.field(metadata={"static": True})

    def positions(self, length: int) -> jax.Array:
        """Returns the positions (B, length) of the next tokens, negative ones for padding."""
        return (self.filled + jnp.arange(length))[None] - self.first[:, None]

    def after(self, length: int) -> "Cache":
        """Returns the cache with `length` more slots filled."""
        return dataclasses.replace(self, filled=self.filled + length, empty=False)

    def attend(self, q, k, v, layer, kind: LayerKind, softcap: float | None):
        """Writes a layer's new keys and values into the next slots, and attends to all.

        Args:
          q: queries (b, t, n, g, k).
          k: keys (b, t, n, k).
          v: values (b, t, n, k).
          layer: the layer's number, which is traced where layers are stacked.
          kind: how the layer attends.
          softcap: as in `attention.attend`.

        Returns:
          What each head's queries attend to, (b, t, n, g, k), and the cache, in which the slots do
          not count as filled before `after` says so.
        """
        keys, values = (self._written(a, x, layer) for a, x in ((self.keys, k), (self.values, v)))
        if self.empty:
            z = attend(q, k, v, kind, softcap, self.first)
        else:
            k, v = (jnp.moveaxis(_of_layer(a, layer), 1, 2) for a in (keys, values))
            z = attend(q, k, v, kind, softcap, self.first, self.filled)
        return z, dataclasses.replace(self, keys=keys, values=values)

    def _written(self, arrays, x, layer):
        new = jnp.moveaxis(x, 1, 2)
        if isinstance(arrays, list):
            own = jax.lax.dynamic_update_slice(arrays[layer], new, (0, 0, self.filled, 0))
            return [*arrays[:layer], own, *arrays[layer + 1 :]]
        return jax.lax.dynamic_update_slice(arrays, new[None], (layer, 0, 0, self.filled, 0))


def empty_cache(params, config: DecoderConfig, first: jax.Array, slots: int) -> Cache:
    """Returns a cache without tokens, sharded as the decoder's keys and values are.

    Args:
      params: the decoder's parameters, layers in a list or stacked.
      config: the decoder's config.
      first: (B,), the number of padding tokens before each row's first.
      slots: how many tokens it has room for, padding counted.
    """
    shape = (len(first), config.num_kv_heads, slots, config.head_dim)
    mesh, dtype = jax.typeof(params["embed"]).sharding.mesh, params["embed"].dtype
    spec = P()
    if not mesh.empty:
        heads = layout(config)["layers"][0]["w_k"].model_axis(mesh.shape["model"])
        batch = jax.typeof(first).sharding.spec[0]
        spec = P(batch, None if heads is None else "model", None, None)
    stacked = isinstance(params["layers"], dict)
    if stacked:
        shape, spec = (config.num_layers, *shape), P(None, *spec)

    def zeros():
        sharding = None if mesh.empty else NamedSharding(mesh, spec)
        return jnp.zeros(shape, dtype, out_sharding=sharding)

    keys, values = (
        zeros() if stacked else [zeros() for _ in range(config.num_layers)] for _ in range(2)
    )
    return Cache(keys, values, first, jnp.int32(0), empty=True)


def _of_layer(arrays, layer):
    if isinstance(arrays, list):
        return arrays[layer]
    return jax.lax.dynamic_index_in_dim(arrays, layer, keepdims=False)
