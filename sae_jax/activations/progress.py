"""Tells how far a store is that others are writing."""

import contextlib
import dataclasses
import itertools
import pathlib
import time

from sae_jax import paths
from sae_jax.activations.files import Folder
from sae_jax.activations.meta import StoreMeta, read_meta
from sae_jax.errors import UserError
from sae_jax.numpy_files import read_npz

_RECENT = 9  # shards, of which the speed is taken
_STALE_SECONDS, _STALE_GAPS = 300.0, 10.0  # silence that a harvest which goes on does not keep


@dataclasses.dataclass(frozen=True)
class StoreProgress:
    """How far a store is.

    Attributes:
      meta: its meta.json.
      shards: how many shards are written.
      rows_per_second: the speed of the last few shards, of all writers together; None where there
        are too few, and for a live store that computes only some of its shards.
      silent: the seconds since a shard was written; None before there is one, and where the writers
        have not noted it.
      longest_gap: the most seconds between two of the last few shards while they were written.
    """

    meta: StoreMeta
    shards: int
    rows_per_second: float | None = None
    silent: float | None = None
    longest_gap: float = 0.0

    @property
    def rows(self) -> int:
        """About how many rows are written."""
        return round(self.meta.num_rows * self.shards / self.meta.num_shards)

    @property
    def stale(self) -> bool:
        """Whether nobody seems to write: it has been silent for ten times as long as before."""
        if self.meta.complete or self.silent is None:
            return False
        return self.silent > max(_STALE_SECONDS, _STALE_GAPS * self.longest_gap)

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
    if not meta.complete:
        notes, times, failure = [], [], None
        try:
            notes = sorted(name for name in folder.sizes("written") if name.endswith(".npz"))
            times = sorted(_times(folder, notes))
        except UserError as error:
            failure = error
        if times:
            return _with_speed(meta, len(notes), times[-_RECENT:])
        meta = read_meta(folder) or meta  # notes are removed when the store is finished
    if meta.complete:
        return StoreProgress(meta, meta.num_shards)
    if failure:
        raise failure
    return StoreProgress(meta, len(notes))


def _with_speed(meta: StoreMeta, shards: int, times: list[float]) -> StoreProgress:
    """Returns how far a store is whose last few shards were written at these times."""
    gaps = sorted(after - before for before, after in itertools.pairwise(times))
    # The time for which nobody wrote is no part of the speed. It is told by the next longest gap,
    # and not by a typical one: of several writers at once most gaps are next to nothing.
    if len(gaps) > 1 and gaps[-1] > max(_STALE_SECONDS, _STALE_GAPS * gaps[-2]):
        gaps.pop()
    rate = None
    if sum(gaps) > 0 and not (meta.live and meta.live.statistics_tokens):
        rate = len(gaps) * meta.num_rows / meta.num_shards / sum(gaps)
    silent = max(0.0, time.time() - times[-1])
    return StoreProgress(meta, shards, rate, silent, max(gaps, default=0.0))


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
