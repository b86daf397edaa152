"""Where data comes from: the store of activations and the stream (order) of batches."""

from sae_jax.activations.from_arrays import write_store
from sae_jax.activations.sites import Sites
from sae_jax.activations.store import Store
from sae_jax.activations.stream import Stream
from sae_jax.activations.writer import StoreWriter

__all__ = ["Sites", "Store", "StoreWriter", "Stream", "write_store"]
