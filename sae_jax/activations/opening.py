"""Opens the stream of batches that a config describes, of a store or of a synthetic world."""

import functools
from collections.abc import Callable

from sae_jax.activations.store import Store
from sae_jax.activations.stream import Stream
from sae_jax.activations.synthetic import PREFIX, World, WorldStream
from sae_jax.config import DataConfig
from sae_jax.errors import UserError


def open_stream(
    data: DataConfig,
    split: str = "train",
    batch_size: int | None = None,
    open_store: Callable[[str], Store] = Store.open,
) -> Stream | WorldStream:
    """Opens the stream of batches that `data` describes.

    Args:
      data: the data section of a config. A row has the columns of its site or sites, and then those
        of its target site.
      split: "train" or "heldout".
      batch_size: another batch size than that of `data`.
      open_store: what opens the store, given its path. `lm.open_stream` opens live ones too.

    Of a synthetic world only the data's seed, sites and batch size matter, because it has no chunks
    to hold out or to shuffle, and never ends.

    Raises UserError for a store, a site or a setting that does not fit.
    """
    batch_size = batch_size or data.batch_size
    sites = f"{data.site},{data.target_site}" if data.target_site else data.site
    if is_world(data.store):
        if data.epochs != 1:
            raise UserError(
                f"data.epochs is {data.epochs}, but a world's rows never end or come again; "
                "leave it at 1"
            )
        world = open_world(data.store)
        return WorldStream(world, sites, batch_size=batch_size, seed=data.seed, split=split)
    return Stream(
        open_store(data.store),
        sites,
        batch_size=batch_size,
        seed=data.seed,
        split=split,
        holdout_fraction=data.holdout_fraction,
        epochs=data.epochs,
        virtual_shards=data.virtual_shards,
        window_rows=data.window_rows,
        include_excluded=data.include_excluded,
        drop_nonfinite=data.drop_nonfinite,
    )


def is_world(store: str) -> bool:
    """Whether `store`, as in a config, names a synthetic world and not a directory."""
    return store.startswith(PREFIX)


@functools.lru_cache(maxsize=4)
def open_world(spec: str) -> World:
    """Returns `World(spec)`, which is made once for all streams of a process."""
    return World(spec)
