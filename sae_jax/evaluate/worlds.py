"""Held-out rows of a synthetic world as something to evaluate on, and the best error there is."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import scipy.sparse

from sae_jax.activations import open_stream
from sae_jax.config import DataConfig
from sae_jax.evaluate.batching import pad_rows
from sae_jax.evaluate.processes import shared_out
from sae_jax.sae import SAE


class WorldRows:
    """The first `tokens` rows that no run on the world trains on, of the sites of `data`: a source
    as those in `sources`, with the world's answers besides."""

    def __init__(self, data: DataConfig, *, tokens: int):
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
        return len(shared_out(range(0, self.num_rows, rows)))

    def batches(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for ids in self._ids(shared_out(range(0, self.num_rows, rows)), rows):
            x = self.stream.read_rows(ids)
            yield pad_rows(x, rows), pad_rows(np.ones(len(x), bool), rows)

    def sequences(self, limit: int) -> None:
        """There are no tokens."""

    def ids(self, rows: int) -> Iterator[np.ndarray]:
        """Ids of the rows of each batch, of all processes."""
        return self._ids(range(0, self.num_rows, rows), rows)

    def _ids(self, starts: range, rows: int) -> Iterator[np.ndarray]:
        first = self.stream.first_row
        for start in starts:
            yield first + np.arange(start, min(start + rows, self.num_rows))

    def optimal_mse(self, sae: SAE) -> float | None:
        """The least mean squared error, summed over the columns of the sites that are predicted,
        of any SAE with as many latents on these very rows (`World.optimal_mse`); None where it is
        not known: other worlds than orthonormal ones, and skip transcoders, whose linear part
        needs no latents."""
        if not self.world.has_optimum or sae.config.kind == "skip_transcoder":
            return None
        sites = len(sae.config.site_widths or [sae.config.d_out])
        rows = scipy.sparse.vstack([self.world.activations(ids) for ids in self.ids(2**16)])
        return sites * self.world.optimal_mse(sae.config.d_sae, rows)
