"""The stream of a world's rows: the same interface as a store's, without an end."""

import grain
import numpy as np

from sae_jax.activations.sites import check_distinct, split_names
from sae_jax.activations.stream import SPLITS
from sae_jax.activations.synthetic.world import World
from sae_jax.errors import UserError, choose

_ROWS = 2**36  # rows of the held-out split, and of the training split for each seed
_SEEDS = 2**26 - 1


class WorldStream:
    """Batches (batch_size, width) float32 of rows of a world.

    The held-out rows have the ids below 2^36, whatever the seed. The rows to train on have 2^36 ids
    of their own for each seed. Step s takes the next batch_size ids.

    Attributes:
      world: the world.
      batch_size: rows of a batch.
      site_names: the sites that are read, side by side.
      site_widths: their widths.
      width: the sum of their widths.
      mean: the exact mean (width,) of the rows.
      site_mean_squared_norms: the mean squared norm of the rows at each site.
      features: the directions (G * dims, width) of the features.
      first_row: the id of the first row.
      num_steps: the number of steps.
      steps_per_epoch: the same number, since a world does not repeat itself.
      rows_per_epoch: the rows of all steps.
    """

    def __init__(
        self, world: World, sites: str = "", *, batch_size: int, seed: int = 0, split: str = "train"
    ):
        """Opens the stream of some sites of a world.

        Args:
          world: the world.
          sites: "a", or "a,b" for several side by side; "" stands for the only site.
          batch_size: rows of a batch.
          seed: chooses the rows to train on, from 0 to 2^26 - 2.
          split: "train" or "heldout".

        Raises UserError for a site that the world does not have, and for a seed out of range.
        """
        choose(split, SPLITS, "the split of a stream")
        if batch_size < 1:
            raise UserError(f"data.batch_size is {batch_size}; it must be at least 1")
        if not 0 <= seed < _SEEDS:
            raise UserError(f"data.seed is {seed}; for a world it must be from 0 to {_SEEDS - 1}")
        self.world = world
        self.batch_size = batch_size
        self.site_names = _choose_sites(world, sites)
        self._sites = [world.site_names.index(name) for name in self.site_names]
        self.site_widths = tuple(world.site_widths[site] for site in self._sites)
        self.width = sum(self.site_widths)
        means = [world.mean(site) for site in self._sites]
        self.mean = np.concatenate(means)
        self.site_mean_squared_norms = tuple(
            world.variances[site] + float(np.sum(mean**2))
            for site, mean in zip(self._sites, means, strict=True)
        )
        self.features = np.concatenate([world.features[site] for site in self._sites], axis=1)
        self.first_row = _ROWS * (seed + 1) if split == "train" else 0
        self.num_steps = self.steps_per_epoch = _ROWS // batch_size
        self.rows_per_epoch = self.num_steps * batch_size

    @property
    def fingerprint(self) -> str:
        """The text that describes the world, which is all that its rows depend on."""
        return self.world.spec

    def check_step(self, step: int) -> None:
        """Does nothing, because a world's rows are computed."""

    def batch_rows(self, step: int) -> np.ndarray:
        """Returns the ids (batch_size,) int64 of the rows of a step."""
        if not 0 <= step < self.num_steps:
            raise UserError(f"step {step} is not one of the stream's {self.num_steps} steps")
        return self.first_row + step * self.batch_size + np.arange(self.batch_size)

    def read(self, step: int) -> np.ndarray:
        """Returns the batch (batch_size, width) of a step."""
        return self.read_rows(self.batch_rows(step))

    def read_rows(self, ids) -> np.ndarray:
        """Returns the rows (n, width) with the ids `ids` (n,), in any order."""
        return self.world.render(self.world.activations(ids), self._sites)

    def dataset(self, start_step: int = 0, rows=slice(None)) -> grain.MapDataset:
        """Returns the batches from `start_step` on as a grain dataset.

        Args:
          start_step: the first step.
          rows: the slice of the batch, or a list of slices, that this process needs.
        """
        slices = [rows] if isinstance(rows, slice) else rows
        places = np.concatenate([np.arange(self.batch_size)[part] for part in slices])
        steps = grain.MapDataset.range(start_step, self.num_steps)
        return steps.map(lambda step: self.read_rows(self.batch_rows(step)[places]))

    def batches(self, start_step: int = 0, rows=slice(None), prefetch: int = 2):
        """Returns an iterator over `dataset(start_step, rows)` with `prefetch` batches ready in
        advance.
        """
        options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
        return iter(self.dataset(start_step, rows).to_iter_dataset(options))


def _choose_sites(world: World, sites: str) -> tuple[str, ...]:
    """Returns the names of the sites that a user asks for."""
    if not sites and len(world.site_names) > 1:
        raise UserError(
            f"{world.spec} has several sites, choose one: {', '.join(world.site_names)}"
        )
    names = tuple(split_names(sites)) if sites else world.site_names
    for name in names:
        choose(name, world.site_names, f"the site of {world.spec}")
    check_distinct(names, world.spec)
    return names
