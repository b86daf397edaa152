"""Where every latent is active in a text, on disk: what explanations are made of and tested on.

An activity holds the text that was looked at and, for each latent, every token on which it is above
zero, with its activation. Arrays are files of their own that are mapped, not read:

    activity.json   the settings, and what was looked at
    starts.npy      (d_sae + 1,) int64: where the events of each latent begin
    rows.npy        (events,) int32: the token of each event, counted over all sequences
    values.npy      (events,) float32: its activation, a length in the model's units
    tokens.npy      (sequences, T) int32
    used.npy        (sequences, T) bool: which tokens count
    numbers.npy     (sequences,) int64: the number of each sequence in the store or text

The sequences are in two halves, one to find an explanation on and one to test it on. A sequence's
tokens decide which it is in, so that copies of a text are never in both.
"""

import dataclasses
import functools
import os
import pathlib
import shutil

import jax
import numpy as np
from absl import logging

from sae_jax import paths
from sae_jax.activations import Store
from sae_jax.errors import UserError
from sae_jax.evaluate.processes import from_all
from sae_jax.evaluate.sources import HeldOutRows, ModelRows, check_sites
from sae_jax.interpret import collection
from sae_jax.interpret.hashes import WindowHashes, mix
from sae_jax.interpret.passes import (
    alone,
    begun,
    blocks_of,
    chosen_text,
    count_events,
    events_of,
    open_pieces,
    rows_of,
    write_events,
)
from sae_jax.json_files import checked, read_json
from sae_jax.numpy_files import map_npy
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE

VERSION = 1


@dataclasses.dataclass(frozen=True)
class About:
    """What activity.json says.

    Attributes:
      version: the version of the format.
      settings: what was recorded of what: the SAE's name, the site, the store or the model and the
        text.
      d_sae: the number of latents.
      rows: how many tokens count; excluded ones do not.
    """

    version: int
    settings: dict
    d_sae: int
    rows: int


class Activity:
    """The events of every latent of an SAE on a text, as they lie in a directory.

    Attributes:
      about: what activity.json says.
      tokens: token ids, (n, T) int32.
      used: which tokens count, (n, T) bool.
      numbers: the number of each sequence in the store or text, (n,).
    """

    def __init__(self, path):
        """Opens the activity in a directory. Raises UserError if there is none, or damaged."""
        self.path = paths.local(path)
        file = self.path / "activity.json"
        if not file.is_file():
            raise UserError(f"{self.path} holds no recorded activity: it has no {file.name}")
        self.about = checked(read_json(file), About, file)
        if self.about.version != VERSION:
            raise UserError(f"{file} is of version {self.about.version}, not {VERSION}")
        checked(self.about.settings.get("site"), str, f"{file}, settings.site")
        names = ("starts", "rows", "values", "tokens", "used", "numbers")
        found = {name: np.asarray(map_npy(self.path / f"{name}.npy")) for name in names}
        self.tokens, self.used, self.numbers = (found[name] for name in names[3:])
        self._starts, self._rows, self._values = (found[name] for name in names[:3])
        if not self._is_whole():
            raise UserError(
                f"{self.path} is damaged: its files do not fit together; remove it to record again"
            )

    def _is_whole(self) -> bool:
        """Returns whether the files can be of one recording: nothing in them points outside."""
        starts, rows, values, tokens = self._starts, self._rows, self._values, self.tokens
        arrays = (starts, rows, values, tokens, self.used, self.numbers)
        return (
            "".join(array.dtype.kind for array in arrays) == "iifibi"
            and tokens.ndim == 2
            and self.used.shape == tokens.shape
            and self.numbers.shape == tokens.shape[:1]
            and starts.shape == (self.about.d_sae + 1,)
            and rows.shape == values.shape == (starts[-1],)
            and starts[0] == 0
            and bool((np.diff(starts) >= 0).all())
            and min(tokens.min(initial=0), self.numbers.min(initial=0), rows.min(initial=0)) >= 0
            and rows.max(initial=-1) < tokens.size
            and bool(np.isfinite([values.min(initial=0), values.max(initial=0)]).all())
        )

    @property
    def d_sae(self) -> int:
        """The number of latents."""
        return self.about.d_sae

    @property
    def counts(self) -> np.ndarray:
        """On how many tokens each latent is active, (d_sae,)."""
        return np.diff(self._starts)

    @property
    def density(self) -> np.ndarray:
        """On what part of the tokens each latent is active, (d_sae,)."""
        return self.counts / max(self.about.rows, 1)

    @functools.cached_property
    def max_activation(self) -> np.ndarray:
        """The largest activation of each latent, (d_sae,); 0 where it is never active."""
        found = np.zeros(self.d_sae, np.float32)
        fires = self.counts > 0
        if fires.any():
            found[fires] = np.maximum.reduceat(self._values, self._starts[:-1][fires])
        return found

    @functools.cached_property
    def held_out(self) -> np.ndarray:
        """The sequences that explanations are tested on, not found on, (n,) bool."""
        length = self.tokens.shape[1]
        of_whole = WindowHashes(self.tokens, length, length)
        n = len(self.tokens)
        return (mix(of_whole(np.arange(n), np.zeros(n, np.int64))) & np.uint64(1)).astype(bool)

    def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens on which a latent is active, (m,) rising, and its activations, (m,).

        Row r is the token r % T of the sequence r // T. Raises UserError if there is no such
        latent.
        """
        if not 0 <= latent < self.d_sae:
            raise UserError(f"no latent {latent}: there are 0 to {self.d_sae - 1:,}")
        events = slice(self._starts[latent], self._starts[latent + 1])
        return self._rows[events], self._values[events]

    def between(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the events of the latents first..stop: where those of each begin among them,
        (stop - first + 1,), and of all the tokens and the activations, as `of` does.
        """
        starts = self._starts[first : stop + 1]
        events = slice(starts[0], starts[-1])
        return starts - starts[0], self._rows[events], self._values[events]

    def dense(self, latent: int) -> np.ndarray:
        """Returns the latent's activation on every token, (n, T) float32."""
        rows, values = self.of(latent)
        found = np.zeros(self.tokens.size, np.float32)
        found[rows] = values
        return found.reshape(self.tokens.shape)


def peaks(rows: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
    """Returns where the highest activation of each sequence is, (n,), the strongest first.

    Args:
      rows: the tokens of a latent's events, (m,) rising, as `Activity.of` gives them.
      values: its activations there, (m,).
      length: the tokens of a sequence.
    """
    strongest = np.lexsort((rows, -values))
    _, first = np.unique((rows // length)[strongest], return_index=True)
    return strongest[np.sort(first)]


def record(
    sae: SAE,
    source: HeldOutRows | ModelRows | Store | str | os.PathLike,
    out,
    *,
    tokens: int = 1_000_000,
    mesh: jax.sharding.Mesh | None = None,
    settings: dict | None = None,
    overwrite: bool = False,
) -> Activity:
    """Records where every latent is active, and returns it as it lies in the directory `out`.

    One that was stopped goes on with what is missing. It takes 8 bytes of disk for each latent that
    fires on a token, and more than twice that while it is made.

    Args:
      sae: the SAE: an autoencoder, a transcoder or a crosscoder of any architecture.
      source: what texts are read of: rows of a store, harvested or live, or a language model on
        text (`evaluate.sources`). Excluded rows do not count.
      out: the directory to write.
      tokens: about how many of the source's tokens to look at, spread evenly.
      mesh: as for `collect`.
      settings: what else activity.json is to say, such as the SAE's name.
      overwrite: whether a pass that was begun with other settings, and did not end, is thrown away.

    Raises UserError if the sites do not fit the SAE, the source has no tokens, `out` is not empty,
    there is no room on the disk, or another pass into `out` was begun with other settings.
    """
    out = collection.free(out)
    source = rows_of(source, tokens)
    check_sites(sae, source)
    text = chosen_text(source, tokens)
    about = About(
        VERSION,
        {**(settings or {}), "site": ",".join(source.site_names), **source.settings},
        sae.config.d_sae,
        int(text.used.sum()),
    )
    folder = begun(out, sae, text, dataclasses.asdict(about), ("events",), overwrite)
    with alone(folder):
        write_events(sae, source, text, folder / "events", mesh)
        if jax.process_index() == 0:
            _assemble(folder, text, about, out)
        from_all(None)
    return Activity(out)


def _assemble(folder: pathlib.Path, text, about: About, out: pathlib.Path) -> None:
    """Writes the files of an activity from the events of a pass, and gives the whole its name."""
    done = folder / "done"
    done.mkdir(exist_ok=True)
    counts, pieces = count_events(folder / "events", about.d_sae), open_pieces(folder / "events")
    starts = np.append(0, np.cumsum(counts))
    needed = 8 * int(starts[-1]) + 5 * text.tokens.size
    if needed > (there := shutil.disk_usage(done).free):
        raise UserError(
            f"{out} needs {needed / 1e9:.1f} GB of disk, and there are {there / 1e9:.1f} GB; look "
            "at fewer tokens"
        )
    arrays = {"starts": starts, "tokens": text.tokens.astype(np.int32), "used": text.used}
    for name, array in (arrays | {"numbers": text.numbers}).items():
        np.save(done / f"{name}.npy", array)
    with (done / "rows.npy").open("wb") as rows, (done / "values.npy").open("wb") as values:
        for file, kind in ((rows, "<i4"), (values, "<f4")):
            header = {"descr": kind, "fortran_order": False, "shape": (int(starts[-1]),)}
            np.lib.format.write_array_header_1_0(file, header)
        blocks = list(blocks_of(counts))
        for first, stop in progress(blocks, "sorting by latent", len(blocks), "block"):
            events = events_of(pieces, first, stop)
            events.rows.astype("<i4").tofile(rows)
            events.values.astype("<f4").tofile(values)
    paths.save_json(dataclasses.asdict(about), done / "activity.json")
    logging.info("recorded: %d events of %d latents on %d tokens", starts[-1], about.d_sae,
                 about.rows)  # fmt: skip
    if out.exists():
        out.rmdir()
    done.rename(out)
    shutil.rmtree(folder)
