"""Collects examples of every latent of an SAE, in one pass over text.

Every row is encoded once. Its events, the few latents that are above zero, go to files on disk, a
piece of the text in each. When all are there, the latents are taken some at a time, each with all
its events: so maxima, histograms, the strongest sequences and samples of each interval are exact,
and do not depend on the order in which anything was computed, nor on devices, processes or stops.
Neither memory nor work grows with rows times latents.

A sequence belongs to an interval by its peak, the largest activation of the latent in it. The
examples of an interval are a uniform sample of those sequences that are not among the `top` ones,
by priorities that are hashes of the latent's and the sequence's numbers. Sequences of which the
windows have the same tokens count once for a latent, with the strongest peak; of equal peaks the
first sequence is taken.

Everything goes to a temporary directory beside the result. A pass that was stopped goes on there
with what is missing, when it is started again with the same settings. Several processes, which must
see the same directory, share the pieces and then the latents.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import time
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from sae_jax import lm, paths
from sae_jax.activations import Store
from sae_jax.errors import UserError
from sae_jax.evaluate.batching import evenly_spaced
from sae_jax.evaluate.processes import from_all, own_share
from sae_jax.evaluate.sources import HeldOutRows, ModelRows, check_sites
from sae_jax.interpret import collection
from sae_jax.interpret.coactive import SKETCH, Similarities, sketches
from sae_jax.interpret.collection import BINS, COACTIVE, VERSION, About, Collection
from sae_jax.interpret.events import Encoder, Events
from sae_jax.interpret.hashes import WindowHashes
from sae_jax.interpret.slots import fill, statistics
from sae_jax.json_files import read_json
from sae_jax.numpy_files import map_npy
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE

_PIECE = 2**14  # rows of a file of events, about
_BLOCK_EVENTS = 2**21  # of the latents that are taken at once, about
_BLOCK_LATENTS = 2**13
_SLOTS = ("value", "sequence", "position", "window")
_SUMS = ("count", "sum", "max")


class _Text(NamedTuple):
    """The sequences that are looked at: their places in the source, and what `Texts` has."""

    places: np.ndarray
    numbers: np.ndarray
    tokens: np.ndarray
    used: np.ndarray
    at_once: int
    fingerprint: str


def collect(
    sae: SAE,
    source: HeldOutRows | ModelRows | Store | str | os.PathLike,
    out,
    *,
    tokens: int = 1_000_000,
    top: int = 20,
    intervals: int = 12,
    per_interval: int = 5,
    before: int = 28,
    after: int = 14,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    settings: dict | None = None,
    overwrite: bool = False,
) -> Collection:
    """Collects examples of every latent, and returns them as they lie in the directory `out`.

    Args:
      sae: the SAE: an autoencoder, a transcoder or a crosscoder of any architecture.
      source: where texts are looked for: rows of a store, harvested or live, or a language model
        on text (`evaluate.sources`). Excluded rows do not count.
      out: the directory to write.
      tokens: about how many of the source's tokens to look at, spread evenly.
      top: how many of the strongest sequences to keep of each latent.
      intervals: how many equal parts of 0..maximum to draw further sequences from.
      per_interval: how many to draw from each.
      before: how many tokens of a window lie before the peak.
      after: how many tokens of a window lie after it.
      seed: the seed of what is drawn.
      mesh: devices of this process with axes `data`, which shares the rows, and `model`, which
        shares the dictionary. None: all of them share the rows, and each holds the whole SAE.
      settings: what else collection.json is to say, such as the SAE's name.
      overwrite: whether a pass that was begun with other settings, and did not end, is thrown away.

    Raises UserError if the sites do not fit the SAE, the source has no tokens, `out` is not empty,
    there is no room on the disk, or another pass into `out` was begun with other settings.
    """
    out = collection.free(out)
    source = _rows_of(source, tokens)
    check_sites(sae, source)
    text = _chosen(source, tokens)
    about = About(
        version=VERSION,
        settings={
            **(settings or {}),
            "site": ",".join(source.site_names),
            **source.settings,
            "looked_at": text.tokens.size,
            "seed": seed,
        },
        d_sae=sae.config.d_sae,
        rows=int(text.used.sum()),
        top=top,
        intervals=intervals,
        per_interval=per_interval,
        before=before,
        after=after,
    )
    cost = _cost(sae, text, about)
    logging.info("collecting: %s", cost)
    begin = time.monotonic()
    folder = _begun(out, sae, text, about, overwrite)
    _check_room(cost, folder, out)
    with _alone(folder):
        counts, encoding = _pass(sae, source, text, about, seed, mesh, folder, out)
    seconds = time.monotonic() - begin
    logging.info("collected: %s", cost.measured(seconds, encoding, counts, out))
    return Collection(out)


def _pass(sae, source, text: _Text, about: About, seed: int, mesh, folder, out) -> tuple:
    """Makes the collection, and returns how many events each latent has, and the seconds that
    encoding took."""
    begin = time.monotonic()
    if mesh is None and jax.local_device_count() > 1:
        mesh = lm.local_mesh()
    _encode(Encoder(sae, mesh), source, text, folder / "events")
    encoding = time.monotonic() - begin
    counts = _count(folder / "events", about.d_sae)
    from_all(None)  # all have read the events before any block is made
    blocks = _fill(counts, text, about, seed, folder)
    similar = _compare(blocks, counts, folder / "similar")
    from_all(None)
    if jax.process_index() == 0:
        _assemble(blocks, similar, text, about, folder, out)
    from_all(None)
    return counts, encoding


# ------------------------------------------------------------------------------ cost


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a pass is to cost, in words by `str`.

    Attributes:
      flops: of encoding.
      events: bytes of events a row on disk, while it lasts; None where it is not known before.
      rows: how many rows are encoded.
      disk: bytes of the collection.
      memory: bytes of the host's memory at most, beside the SAE and the process itself.
    """

    flops: int
    events: int | None
    rows: int
    disk: int
    memory: int

    def __str__(self) -> str:
        events = "12 bytes a firing latent"
        if self.events is not None:
            events = f"about {self.events * self.rows / 1e9:.2f} GB"
        return (
            f"{self.flops / 1e12:.3g} TFLOP of encoding, {events} of events on disk until it is "
            f"done, {self.disk / 1e9:.2f} GB of disk (twice that while it is made), "
            f"{self.memory / 1e9:.2f} GB of memory beside the SAE"
        )

    def measured(self, seconds: float, encoding: float, counts: np.ndarray, out) -> str:
        """Returns in one line what was stated and what it was."""
        disk = sum(file.stat().st_size for file in pathlib.Path(out).iterdir())
        events = "" if self.events is None else f" (stated {self.events * self.rows / 1e9:.2f})"
        return (
            f"{seconds:.0f} s, of which encoding {encoding:.0f} s "
            f"({self.flops / 1e9 / max(encoding, 1e-9):.0f} GFLOP/s); "
            f"events {12 * counts.sum() / 1e9:.2f} GB{events}; "
            f"disk {disk / 1e9:.2f} GB (stated {self.disk / 1e9:.2f})"
        )


def describe_cost(
    sae: SAE,
    source: HeldOutRows | ModelRows,
    *,
    tokens: int = 1_000_000,
    top: int = 20,
    intervals: int = 12,
    per_interval: int = 5,
    before: int = 28,
    after: int = 14,
) -> Cost:
    """Returns what `collect` with these arguments is to cost.

    Raises UserError if the source has no tokens.
    """
    text = _chosen(source, tokens)
    about = About(VERSION, {}, sae.config.d_sae, 0, top, intervals, per_interval, before, after)
    return _cost(sae, text, about)


def _cost(sae: SAE, text: _Text, about: About) -> Cost:
    config, rows = sae.config, text.tokens.size
    slots = about.top + about.intervals * about.per_interval
    of_slots = slots * (12 + 2 * (about.before + 1 + about.after))
    of_latent = 12 + 4 * BINS + of_slots + 8 * COACTIVE
    k = config.k
    fired = min(_BLOCK_EVENTS, rows * (k or 64))
    memory = 13 * rows + max(
        160 * fired + 2 * min(_BLOCK_LATENTS, about.d_sae) * of_latent,
        48 * SKETCH * min(about.d_sae, rows * (k or 64)),
    )
    return Cost(
        flops=2 * config.d_in * config.d_sae * rows,
        events=None if k is None else 12 * k,
        rows=rows,
        disk=about.d_sae * of_latent + text.tokens.nbytes + text.numbers.nbytes,
        memory=memory,
    )


def _check_room(cost: Cost, folder: pathlib.Path, out: pathlib.Path) -> None:
    free = shutil.disk_usage(folder).free
    if 2 * cost.disk > free:
        raise UserError(
            f"{out} needs {2 * cost.disk / 1e9:.1f} GB of disk while it is made, and there are "
            f"{free / 1e9:.1f} GB; keep fewer examples, or choose another --out"
        )


# ------------------------------------------------------------------------------ passes


def _rows_of(source, tokens: int):
    """Returns all rows of the store that `source` is or names, or what it is else."""
    if isinstance(source, str | os.PathLike):
        source = lm.open_store(source)
    if isinstance(source, Store):
        return HeldOutRows(source, "", tokens=tokens, holdout_fraction=None)
    return source


def _chosen(source, tokens: int) -> _Text:
    if not isinstance(source, HeldOutRows | ModelRows):
        raise UserError(f"{source.origin} has no tokens, so there is no text to show")
    texts = source.texts()
    length = texts.tokens.shape[1]
    places = evenly_spaced(np.arange(len(texts.tokens)), -(-tokens // length))
    if len(places) * length >= 2**31:
        raise UserError(f"{len(places) * length} tokens are too many at once; give fewer than 2^31")
    return _Text(
        places,
        *(a[places] for a in (texts.numbers, texts.tokens, texts.used)),
        texts.at_once,
        texts.fingerprint,
    )


def _begun(out: pathlib.Path, sae: SAE, text: _Text, about: About, overwrite: bool) -> pathlib.Path:
    """Returns the temporary directory, where a pass may have been begun.

    Raises UserError if that one had other settings, and is not to be thrown away.
    """
    folder = out.with_name(f"tmp.{out.name}")
    digest = hashlib.sha256(text.fingerprint.encode())
    for array in (text.numbers, text.tokens, text.used):
        digest.update(np.ascontiguousarray(array))
    for name, value in sorted(sae.parameters().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value))
    for scale in (sae.scale, sae.target_scale):
        digest.update(np.asarray(scale, np.float32).tobytes())
    config = json.dumps(dataclasses.asdict(sae.config), sort_keys=True, default=str)
    what = {"about": dataclasses.asdict(about), "config": config, "of": digest.hexdigest()}
    what = json.loads(json.dumps(what))
    file = folder / "pass.json"
    if jax.process_index() == 0:
        if overwrite and file.is_file() and read_json(file) != what:
            shutil.rmtree(folder)
        for name in ("events", "blocks", "similar"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            paths.save_json(what, file)
    from_all(None)
    if read_json(file) != what:
        raise UserError(
            f"{folder} holds a pass that was begun with other settings, another SAE or other text; "
            "go on with those, or throw it away with --overwrite (overwrite=True)"
        )
    return folder


@contextlib.contextmanager
def _alone(folder: pathlib.Path):
    """Keeps other passes out of the directory. Raises UserError if one is at work there."""
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            file = stack.enter_context((folder / "lock").open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another process is at work in {folder}; wait for it, or stop it"
                ) from None
        yield


def _encode(encoder: Encoder, source, text: _Text, folder: pathlib.Path) -> None:
    """Writes the events of each piece of the text that is not there yet, sorted."""
    count, length = text.tokens.shape
    size = max(1, _PIECE // (length * text.at_once)) * text.at_once
    starts = range(0, count, size)
    files = {start: folder / f"{start:010d}.npy" for start in starts}
    missing = [start for start in own_share(starts) if not files[start].is_file()]
    for start in progress(missing, "encoding the texts", len(missing), "piece"):
        stop = min(start + size, count)
        used = text.used[start:stop].reshape(-1)
        x = source.read(text.places[start:stop]).reshape(len(used), -1)
        step = encoder.rows_at_once
        batches = ((x[i : i + step], used[i : i + step]) for i in range(0, len(x), step))
        first = start * length
        found = [
            events._replace(rows=events.rows + np.int32(first + i))
            for i, events in zip(range(0, len(x), step), encoder(batches), strict=True)
        ]
        events = Events(*map(np.concatenate, zip(*found, strict=True))).sorted()
        table = np.stack([events.latents, events.rows, events.values.view(np.int32)])
        _check_disk(table.nbytes * len(missing), start == missing[0], folder)
        _save(files[start], lambda file, table=table: np.save(file, table))
    from_all(None)


def _check_disk(needed: int, is_first: bool, folder: pathlib.Path) -> None:
    """Raises UserError if the first piece tells that the events will not fit on the disk."""
    there = shutil.disk_usage(folder).free
    if is_first and needed > there:
        raise UserError(
            f"the latents that fire need about {needed / 1e9:.1f} GB at {folder}, which has "
            f"{there / 1e9:.1f} GB left; look at fewer tokens"
        )


def _count(folder: pathlib.Path, latents: int) -> np.ndarray:
    """Returns how many events each latent has, (latents,)."""
    counts = np.zeros(latents, np.int64)
    for file in sorted(folder.glob("*.npy")):
        counts += np.bincount(map_npy(file)[0], minlength=latents)
    return counts


def _fill(counts, text: _Text, about: About, seed: int, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the arrays of some latents after the other, and returns the files in order."""
    ends = np.append(0, np.cumsum(counts))
    blocks, first = {}, 0
    while first < about.d_sae:
        stop = int(np.searchsorted(ends, ends[first] + _BLOCK_EVENTS, "right")) - 1
        stop = min(max(stop, first + 1), first + _BLOCK_LATENTS, about.d_sae)
        blocks[folder / "blocks" / f"{first:010d}.npz"] = first, stop
        first = stop
    pieces = [map_npy(file) for file in sorted((folder / "events").glob("*.npy"))]
    windows = WindowHashes(text.tokens, about.before, about.after)
    files = list(blocks)
    own = [files[i] for i in own_share(range(len(files))) if not files[i].is_file()]
    for file in progress(own, "choosing the examples", len(own), "block"):
        first, stop = blocks[file]
        events = _events_of(pieces, first, stop)
        found = statistics(events, stop - first)
        length = text.tokens.shape[1]
        found |= fill(events, first, found["max"], length, text.numbers, windows, about, seed)
        found["sketch"] = sketches(events, stop - first)
        _save(file, lambda file, found=found: np.savez(file, **found))
    from_all(None)
    return files


def _events_of(pieces: list[np.ndarray], first: int, stop: int) -> Events:
    """Returns all events of the latents first..stop, sorted and counted from the first."""
    parts = []
    for table in pieces:
        low, high = np.searchsorted(table[0], [first, stop])
        parts.append(np.array(table[:, low:high]))
    latents, rows, values = np.concatenate(parts, axis=1)
    return Events(latents - np.int32(first), rows, values.view(np.float32)).sorted()


def _compare(blocks, counts, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes which latents fire together, of some after the other; returns the files in order."""
    similarities = Similarities(np.concatenate(list(_read(blocks, "sketch"))), counts)
    ranges = list(similarities.blocks())
    files = [folder / f"{first:010d}.npz" for first, _ in ranges]
    own = [i for i in own_share(range(len(files))) if not files[i].is_file()]
    for i in progress(own, "comparing latents", len(own), "block"):
        coactive, similarity = similarities.of(*ranges[i])
        found = {"coactive": coactive, "similarity": similarity}
        _save(files[i], lambda file, found=found: np.savez(file, **found))
    return files


def _assemble(blocks, similar, text: _Text, about: About, folder: pathlib.Path, out) -> None:
    """Makes one file of each array, and gives the whole its name."""
    done = folder / "done"
    done.mkdir(exist_ok=True)
    for names, files in ((("histogram", *_SLOTS), blocks), (("coactive", "similarity"), similar)):
        for name in names:
            _append_all(done / f"{name}.npy", files, name, about.d_sae)
    np.save(done / "tokens.npy", text.tokens.astype(np.int32))
    np.save(done / "numbers.npy", text.numbers)
    count, total, largest = (np.concatenate(list(_read(blocks, name))) for name in _SUMS)
    latents = {
        "density": count / max(about.rows, 1),
        "mean_activation": total / np.maximum(count, 1),
        "max_activation": largest,
    }
    latents = {name: value.astype(np.float32) for name, value in latents.items()}
    collection.finish(done, out, about, latents)
    shutil.rmtree(folder)


def _append_all(file: pathlib.Path, parts, name: str, rows: int) -> None:
    """Writes an .npy file of the arrays of this name, without holding more than one of them."""
    with file.open("wb") as opened:
        for i, part in enumerate(_read(parts, name)):
            if i == 0:
                header = np.lib.format.header_data_from_array_1_0(part)
                header["shape"] = rows, *part.shape[1:]
                np.lib.format.write_array_header_1_0(opened, header)
            part.tofile(opened)


def _read(files, name: str):
    """Yields the array of this name of each file."""
    for file in files:
        with np.load(file) as arrays:
            yield arrays[name]


def _save(file: pathlib.Path, save) -> None:
    """Writes a file whole or not at all: `save` is given an open file."""
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("wb") as opened:
        save(opened)
    temporary.replace(file)
