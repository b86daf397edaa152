"""Encodes text to events on disk, a piece at a time, and gives them back by latent.

A pass over text is two steps. Every row is encoded once, and its events go to files, a piece of the
text in each; then latents are taken some at a time, each with all its events. What is made of these
is exact, and does not depend on the order in which anything was computed, nor on devices, processes
or stops. Neither memory nor work grows with rows times latents.

A pass has a folder of its own, beside its result and with the name tmp.RESULT, until it ends. One
that was stopped goes on there with what is missing.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import jax
import numpy as np

from sae_jax import lm, paths
from sae_jax.activations import Store
from sae_jax.errors import UserError
from sae_jax.evaluate.batching import evenly_spaced
from sae_jax.evaluate.processes import from_all, own_share
from sae_jax.evaluate.sources import HeldOutRows, ModelRows
from sae_jax.interpret.events import Encoder, Events
from sae_jax.json_files import read_json
from sae_jax.numpy_files import map_npy
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE

BLOCK_EVENTS = 2**21  # of the latents that are taken at once, about
BLOCK_LATENTS = 2**13

_PIECE = 2**14  # rows of a file of events, about


class Text(NamedTuple):
    """The sequences that are looked at: their places in the source, and what `Texts` has of them.

    Attributes:
      places: where each is in the source, (n,).
      numbers: the number of each in the store or text, (n,).
      tokens: token ids, (n, T).
      used: which tokens count, (n, T) bool.
      at_once: how many the source reads best at once.
      fingerprint: tells the source's activations from others.
    """

    places: np.ndarray
    numbers: np.ndarray
    tokens: np.ndarray
    used: np.ndarray
    at_once: int
    fingerprint: str


def rows_of(
    source: HeldOutRows | ModelRows | Store | str | os.PathLike, tokens: int
) -> HeldOutRows | ModelRows:
    """Returns all rows of the store that `source` is or names, or what it is else."""
    if isinstance(source, str | os.PathLike):
        source = lm.open_store(source)
    if isinstance(source, Store):
        return HeldOutRows(source, "", tokens=tokens, holdout_fraction=None)
    return source


def chosen_text(source: HeldOutRows | ModelRows, tokens: int) -> Text:
    """Returns about `tokens` of the source's tokens, spread evenly.

    Raises UserError if it has none, or if these are too many.
    """
    if not isinstance(source, HeldOutRows | ModelRows):
        raise UserError(f"{source.origin} has no tokens, so there is no text to show")
    texts = source.texts()
    length = texts.tokens.shape[1]
    places = evenly_spaced(np.arange(len(texts.tokens)), -(-tokens // length))
    if len(places) * length >= 2**31:
        raise UserError(f"{len(places) * length} tokens are too many at once; give fewer than 2^31")
    return Text(
        places,
        *(a[places] for a in (texts.numbers, texts.tokens, texts.used)),
        texts.at_once,
        texts.fingerprint,
    )


def begun(
    out: pathlib.Path,
    sae: SAE,
    text: Text,
    settings: dict,
    folders: tuple[str, ...],
    overwrite: bool,
) -> pathlib.Path:
    """Returns the pass's folder, where it may have been begun, with these folders in it.

    Raises UserError if that one had other settings, SAE or text, and is not to be thrown away.
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
    what = {"about": settings, "config": config, "of": digest.hexdigest()}
    what = json.loads(json.dumps(what))
    file = folder / "pass.json"
    if jax.process_index() == 0:
        if overwrite and file.is_file() and read_json(file) != what:
            shutil.rmtree(folder)
        for name in folders:
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
def alone(folder: pathlib.Path) -> Iterator[None]:
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


def write_events(
    sae: SAE, source, text: Text, folder: pathlib.Path, mesh: jax.sharding.Mesh | None = None
) -> None:
    """Writes the events of each piece of the text that is not there yet, sorted.

    Args:
      sae: what encodes.
      source: what rows are read of.
      text: the sequences of it that are looked at.
      folder: where the files are.
      mesh: see `events.Encoder`. None: all devices of this process share the rows.
    """
    if mesh is None and jax.local_device_count() > 1:
        mesh = lm.local_mesh()
    encoder = Encoder(sae, mesh)
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
        save_whole(files[start], lambda file, table=table: np.save(file, table))
    from_all(None)


def _check_disk(needed: int, is_first: bool, folder: pathlib.Path) -> None:
    """Raises UserError if the first piece tells that the events will not fit on the disk."""
    there = shutil.disk_usage(folder).free
    if is_first and needed > there:
        raise UserError(
            f"the latents that fire need about {needed / 1e9:.1f} GB at {folder}, which has "
            f"{there / 1e9:.1f} GB left; look at fewer tokens"
        )


def count_events(folder: pathlib.Path, latents: int) -> np.ndarray:
    """Returns how many events each latent has, (latents,)."""
    counts = np.zeros(latents, np.int64)
    for piece in open_pieces(folder):
        counts += np.bincount(piece[0], minlength=latents)
    return counts


def blocks_of(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields (first, stop) of latents that are taken at once, of which each has `counts` events."""
    ends, first = np.append(0, np.cumsum(counts)), 0
    while first < len(counts):
        stop = int(np.searchsorted(ends, ends[first] + BLOCK_EVENTS, "right")) - 1
        stop = min(max(stop, first + 1), first + BLOCK_LATENTS, len(counts))
        yield first, stop
        first = stop


def open_pieces(folder: pathlib.Path) -> list[np.ndarray]:
    """Returns the events of all pieces, mapped and not read: latents, rows and bits of values."""
    return [map_npy(file) for file in sorted(folder.glob("*.npy"))]


def events_of(pieces: list[np.ndarray], first: int, stop: int) -> Events:
    """Returns all events of the latents first..stop, sorted and counted from the first."""
    parts = []
    for table in pieces:
        low, high = np.searchsorted(table[0], [first, stop])
        parts.append(np.array(table[:, low:high]))
    latents, rows, values = np.concatenate(parts, axis=1)
    return Events(latents - np.int32(first), rows, values.view(np.float32)).sorted()


def save_whole(file: pathlib.Path, save: Callable[[BinaryIO], None]) -> None:
    """Writes a file whole or not at all: `save` is given an open file."""
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("wb") as opened:
        save(opened)
    temporary.replace(file)
