"""Held-out rows of a synthetic world as a source, and the least error that is possible on them."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import scipy.sparse

from sae_jax.activations import open_stream
from sae_jax.config import DataConfig
from sae_jax.evaluate.batching import pad_rows
from sae_jax.evaluate.processes import own_share
from sae_jax.sae import SAE


class WorldRows:
    """Rows that no run on a world trains on, as a source (see `sources`) with the true features.

    Attributes:
      world: the world, which knows the true features.
      stream: the stream of its held-out rows.
    """

    def __init__(self, data: DataConfig, *, tokens: int):
        """Takes the first `tokens` held-out rows of the world `data.store`, at the sites of `data`.

        Raises UserError if there is no such world or site.
        """
        self.stream = open_stream(dataclasses.replace(data, epochs=1), "heldout")
        self.world = self.stream.world
        self.site_names, self.site_widths = self.stream.site_names, self.stream.site_widths
        self.num_rows = tokens
        self.origin = data.store
        self.settings = {
            "rows": "held-out rows of the world",
            "store": data.store,
            "tokens": tokens,
            "positions": "all",
        }

    def num_batches(self, rows: int) -> int:
        """Returns how many batches of at most `rows` rows this process gets."""
        return len(own_share(range(0, self.num_rows, rows)))

    def batches(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (activations, which rows count) of this process's batches."""
        for ids in self._ids(own_share(range(0, self.num_rows, rows)), rows):
            x = self.stream.read_rows(ids)
            yield pad_rows(x, rows), pad_rows(np.ones(len(x), bool), rows)

    def sequences(self, limit: int, tokenizer=None) -> None:
        """Returns None, because a world has no tokens."""

    def ids(self, rows: int) -> Iterator[np.ndarray]:
        """Yields the ids of the rows of each batch, for the batches of all processes."""
        return self._ids(range(0, self.num_rows, rows), rows)

    def _ids(self, starts: range, rows: int) -> Iterator[np.ndarray]:
        first = self.stream.first_row
        for start in starts:
            yield first + np.arange(start, min(start + rows, self.num_rows))

    def optimal_mse(self, sae: SAE) -> float | None:
        """Returns the least mean squared error that an SAE with as many latents can have here.

        The error is on these very rows, summed over the columns of the sites that are predicted
        (see `World.optimal_mse`). Returns None where it is not known: for worlds whose features are
        not orthonormal, and for skip transcoders, whose linear part needs no latents.
        """
        if not self.world.has_optimum or sae.config.kind == "skip_transcoder":
            return None
        sites = len(sae.config.site_widths or [sae.config.d_out])
        rows = scipy.sparse.vstack([self.world.activations(ids) for ids in self.ids(2**16)])
        return sites * self.world.optimal_mse(sae.config.d_sae, rows)
