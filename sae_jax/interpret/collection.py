"""What a pass over text collected about every latent of an SAE, as a folder on disk.

A collection has one fixed set of slots for each latent: `top` for the sequences on which it peaks
highest, and `per_interval` for each of `intervals` equal parts of the range from 0 to its maximum,
the highest part first (Bricken et al. 2023, "Towards Monosemanticity"), drawn from its other
sequences. A slot is empty where its value is 0. Arrays are files of their own that are mapped, not
read, so that a collection of any size opens at once:

    collection.json     the settings, and what was looked at
    latents.npz         density, mean_activation, max_activation (d_sae,) float32
    histogram.npy       (d_sae, BINS) uint32: activations above zero, in equal parts of 0..maximum
    value.npy           (d_sae, slots) float32: the peak of the latent in the slot's sequence
    sequence.npy        (d_sae, slots) int32: the row of tokens.npy
    position.npy        (d_sae, slots) int32: where the peak is
    window.npy          (d_sae, slots, before + 1 + after) uint16: activations around the peak, in
                        parts of the latent's maximum over 65535; 0 beyond the sequence
    coactive.npy        (d_sae, COACTIVE) int32: latents that fire on the same tokens, the most
                        similar first; -1 where there are no more
    similarity.npy      (d_sae, COACTIVE) float32: the estimated Jaccard index of the two
    tokens.npy          (sequences, T) int32: the texts that were looked at
    numbers.npy         (sequences,) int64: the number of each in the store or text

Activations are lengths in the model's units: the latent times the norm of its decoder row.
"""

import dataclasses
import functools
import pathlib

import numpy as np

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.json_files import checked, read_json
from sae_jax.numpy_files import map_npy, read_npz

VERSION = 1
BINS = 50
COACTIVE = 16
FULL = 65535  # of window.npy: the latent's maximum


@dataclasses.dataclass(frozen=True)
class Example:
    """A window of a sequence on which a latent is active.

    Attributes:
      sequence: the number of the sequence in the store or text.
      ids: the token ids of the whole sequence, (T,).
      start: the position of the window's first token.
      stop: the position after its last token.
      peak: the position of the highest activation in the whole sequence.
      activations: the latent's activations in the window, (stop - start,), as lengths in the units
        of the data (see `evaluate.metrics`).
    """

    sequence: int
    ids: np.ndarray
    start: int
    stop: int
    peak: int
    activations: np.ndarray


@dataclasses.dataclass(frozen=True)
class About:
    """What collection.json says.

    Attributes:
      version: the version of the format.
      settings: what was collected from what: the SAE's name, the site, the store or the model and
        the text, and the seed.
      d_sae: the number of latents.
      rows: how many tokens count; excluded ones do not.
      top: how many slots there are for the highest peaks.
      intervals: how many intervals there are.
      per_interval: how many slots each interval has.
      before: how many tokens of a window lie before the peak.
      after: how many lie after it.
    """

    version: int
    settings: dict
    d_sae: int
    rows: int
    top: int
    intervals: int
    per_interval: int
    before: int
    after: int


class Collection:
    """A collection on disk. What latents.npz has is its attributes, the rest is `array(name)`."""

    def __init__(self, path):
        """Opens the collection in a directory. Raises UserError if there is none, or damaged."""
        self.path = paths.local(path)
        file = self.path / "collection.json"
        if not file.is_file():
            raise UserError(f"{self.path} is no collection of a dashboard: it has no {file.name}")
        self.about = checked(read_json(file), About, file)
        if self.about.version != VERSION:
            raise UserError(f"{file} is of version {self.about.version}, not {VERSION}")
        latents = read_npz(self.path / "latents.npz")
        self.density = latents["density"]
        self.mean_activation = latents["mean_activation"]
        self.max_activation = latents["max_activation"]

    def array(self, name: str) -> np.ndarray:
        """Returns the array in the file NAME.npy, mapped and not read."""
        return self._arrays[name]

    @functools.cached_property
    def histogram(self) -> np.ndarray:
        """The counts of activations above zero, (d_sae, BINS)."""
        return self.array("histogram")

    def examples(self, latent: int) -> list[list[Example]]:
        """Returns a latent's examples by group: group 0 the highest peaks, then the intervals from
        the highest to the lowest, each from the largest value down for group 0, else as drawn."""
        self._check(latent)
        about, length = self.about, self.array("tokens").shape[1]
        values, windows = self.array("value")[latent], self.array("window")[latent]
        groups = [[] for _ in range(1 + about.intervals)]
        for slot in np.flatnonzero(values > 0):
            row, peak = int(self.array("sequence")[latent, slot]), self._peak(latent, slot)
            start, stop = max(0, peak - about.before), min(length, peak + about.after + 1)
            first = start - (peak - about.before)
            parts = windows[slot, first : first + stop - start]
            activations = parts.astype(np.float32) * (self.max_activation[latent] / FULL)
            activations[peak - start] = values[slot]
            group = 0 if slot < about.top else 1 + (slot - about.top) // about.per_interval
            number, ids = int(self.array("numbers")[row]), self.array("tokens")[row]
            groups[group].append(Example(number, ids, start, stop, peak, activations))
        return groups

    def peak_tokens(self) -> np.ndarray:
        """Returns the tokens on which the highest peaks lie, (d_sae, top); -1 in empty slots."""
        top = slice(self.about.top)
        places = (self.array(name)[:, top] for name in ("sequence", "position"))
        return np.where(self.array("value")[:, top] > 0, self.array("tokens")[*places], -1)

    def coactive(self, latent: int) -> list[tuple[int, float]]:
        """Returns (latent, Jaccard index) of those that fire on the same tokens, best first."""
        self._check(latent)
        found, similarity = self.array("coactive")[latent], self.array("similarity")[latent]
        return [(int(i), float(s)) for i, s in zip(found, similarity, strict=True) if i >= 0]

    def _check(self, latent: int) -> None:
        if not 0 <= latent < self.about.d_sae:
            raise UserError(f"no latent {latent}: there are 0 to {self.about.d_sae - 1:,}")

    def _peak(self, latent: int, slot: int) -> int:
        return int(self.array("position")[latent, slot])

    @functools.cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        names = ("histogram", "value", "sequence", "position", "window", "coactive", "similarity")
        names = (*names, "tokens", "numbers")
        # Plain views, still mapped: a memmap makes objects of its own wherever it is indexed.
        return {n: np.asarray(map_npy(self.path / f"{n}.npy")) for n in names}


def write(path, about: About, latents: dict[str, np.ndarray], arrays: dict) -> Collection:
    """Writes a collection to a directory under a temporary name, and returns it.

    Args:
      path: the directory.
      about: what collection.json is to say.
      latents: density, mean_activation and max_activation, (d_sae,).
      arrays: the other arrays, by the names of their files.

    Raises UserError if the directory exists and is not empty.
    """
    path = free(path)
    temporary = path.with_name(f"tmp.{path.name}")
    temporary.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(temporary / f"{name}.npy", array)
    return finish(temporary, path, about, latents)


def free(path) -> pathlib.Path:
    """Returns the path of a new collection. Raises UserError if something is there already."""
    path = paths.local(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty; choose another directory")
    return path


def finish(temporary: pathlib.Path, path: pathlib.Path, about: About, latents: dict) -> Collection:
    """Adds latents.npz and collection.json to a folder with the arrays, and gives it its name."""
    np.savez(temporary / "latents.npz", **latents)
    paths.save_json(dataclasses.asdict(about), temporary / "collection.json")
    if path.exists():
        path.rmdir()
    temporary.rename(path)
    return Collection(path)
