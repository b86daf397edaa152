"""Tells how far a store is that others are writing."""

import contextlib
import dataclasses
import pathlib
import time

from sae_jax import paths
from sae_jax.activations.files import Folder
from sae_jax.activations.meta import StoreMeta, read_meta
from sae_jax.errors import UserError
from sae_jax.numpy_files import read_npz

_RECENT = 9  # shards, of which the speed is taken
_STALE_SECONDS, _STALE_SHARDS = 300.0, 10.0  # silence that a harvest which goes on does not keep


@dataclasses.dataclass(frozen=True)
class StoreProgress:
    """How far a store is.

    Attributes:
      meta: its meta.json.
      shards: how many shards are written.
      rows_per_second: the speed of the last few shards, of all writers together; None where there
        are too few.
      silent: the seconds since a shard was written; None before there is one.
    """

    meta: StoreMeta
    shards: int
    rows_per_second: float | None = None
    silent: float | None = None

    @property
    def rows(self) -> int:
        """About how many rows are written."""
        return round(self.meta.num_rows * self.shards / self.meta.num_shards)

    @property
    def stale(self) -> bool:
        """Whether nobody seems to write: it has been silent for longer than ten shards take."""
        if self.meta.complete or self.silent is None:
            return False
        shard = 0.0
        if self.rows_per_second:
            shard = self.meta.num_rows / self.meta.num_shards / self.rows_per_second
        return self.silent > max(_STALE_SECONDS, _STALE_SHARDS * shard)

    @property
    def seconds_left(self) -> float | None:
        """The time until all shards are written; None where nobody writes, or it is not known."""
        if self.meta.complete or self.stale or not self.rows_per_second:
            return None
        return (self.meta.num_rows - self.rows) / self.rows_per_second


def read_progress(path) -> StoreProgress:
    """Returns how far the store at `path` is.

    Raises UserError if there is no store, or what its writers noted cannot be read.
    """
    folder = Folder(path)
    meta = read_meta(folder)
    if meta is None:
        raise UserError(f"no activation store at {folder.path}: {folder.path}/meta.json is missing")
    if meta.complete:
        return StoreProgress(meta, meta.num_shards)
    notes = sorted(name for name in folder.sizes("written") if name.endswith(".npz"))
    times = sorted(_times(folder, notes))
    if not times:
        return StoreProgress(meta, 0)
    recent = times[-_RECENT:]
    seconds = recent[-1] - recent[0]
    rate = None
    if seconds > 0:
        rate = (len(recent) - 1) * meta.num_rows / meta.num_shards / seconds
    return StoreProgress(meta, len(notes), rate, max(0.0, time.time() - recent[-1]))


def _times(folder: Folder, notes: list[str]) -> list[float]:
    """Returns when shards were written: all, or of an object store, which does not tell it, the
    last few by number, of which their writers have noted it."""
    if folder.remote:
        files = [paths.path(folder.path) / name for name in notes[-_RECENT:]]
        found = [read_npz(file, lambda names: {"time"} & set(names)) for file in files]
        return [float(arrays["time"]) for arrays in found if "time" in arrays]
    times = []
    for name in notes:
        with contextlib.suppress(FileNotFoundError):  # the store was just finished
            times.append((pathlib.Path(folder.path) / name).stat().st_mtime)
    return times
