"""Where data comes from: stores of activations, synthetic worlds, and their streams of batches."""

from sae_jax.activations.arrays import ArrayStore
from sae_jax.activations.foreign import convert
from sae_jax.activations.from_arrays import write_store
from sae_jax.activations.iterables import IterableData
from sae_jax.activations.meta import LiveMeta
from sae_jax.activations.opening import is_world, open_stream, open_world
from sae_jax.activations.sites import Sites
from sae_jax.activations.store import Store
from sae_jax.activations.stream import Stream
from sae_jax.activations.synthetic import World, WorldStream
from sae_jax.activations.writer import StoreWriter

__all__ = [
    "ArrayStore",
    "IterableData",
    "LiveMeta",
    "Sites",
    "Store",
    "StoreWriter",
    "Stream",
    "World",
    "WorldStream",
    "convert",
    "is_world",
    "open_stream",
    "open_world",
    "write_store",
]
