"""Collects examples of every latent of an SAE, in one pass over text.

The pass is that of `passes`: latents are taken some at a time, each with all its events, so that
maxima, histograms, the strongest sequences and samples of each interval are exact.

A sequence belongs to an interval by its peak, the largest activation of the latent in it. The
examples of an interval are a uniform sample of those sequences that are not among the `top` ones,
by priorities that are hashes of the latent's and the sequence's numbers. Sequences of which the
windows have the same tokens count once for a latent, with the strongest peak; of equal peaks the
first sequence is taken.

Everything goes to a temporary directory beside the result. A pass that was stopped goes on there
with what is missing, when it is started again with the same settings. Several processes, which must
see the same directory, share the pieces and then the latents.
"""

import dataclasses
import os
import pathlib
import shutil
import time

import jax
import numpy as np
from absl import logging

from sae_jax.activations import Store
from sae_jax.evaluate.processes import from_all, own_share
from sae_jax.evaluate.sources import HeldOutRows, ModelRows, check_sites
from sae_jax.interpret import collection
from sae_jax.interpret.coactive import Similarities, sketches
from sae_jax.interpret.collection import VERSION, About, Collection
from sae_jax.interpret.cost import check_room, cost_of
from sae_jax.interpret.hashes import WindowHashes
from sae_jax.interpret.passes import (
    Text,
    alone,
    begun,
    blocks_of,
    chosen_text,
    count_events,
    events_of,
    open_pieces,
    rows_of,
    save_whole,
    write_events,
)
from sae_jax.interpret.slots import fill, statistics
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE

_SLOTS = ("value", "sequence", "position", "window")
_SUMS = ("count", "sum", "max")


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
    source = rows_of(source, tokens)
    check_sites(sae, source)
    text = chosen_text(source, tokens)
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
    cost = cost_of(sae, text, about)
    logging.info("collecting: %s", cost)
    begin = time.monotonic()
    folders = ("events", "blocks", "similar")
    folder = begun(out, sae, text, dataclasses.asdict(about), folders, overwrite)
    check_room(cost, folder, out)
    with alone(folder):
        counts, encoding = _pass(sae, source, text, about, seed, mesh, folder, out)
    seconds = time.monotonic() - begin
    logging.info("collected: %s", cost.measured(seconds, encoding, counts, out))
    return Collection(out)


def _pass(sae, source, text: Text, about: About, seed: int, mesh, folder, out) -> tuple:
    """Makes the collection, and returns how many events each latent has, and the seconds that
    encoding took."""
    begin = time.monotonic()
    write_events(sae, source, text, folder / "events", mesh)
    encoding = time.monotonic() - begin
    counts = count_events(folder / "events", about.d_sae)
    from_all(None)  # all have read the events before any block is made
    blocks = _fill(counts, text, about, seed, folder)
    similar = _compare(blocks, counts, folder / "similar")
    from_all(None)
    if jax.process_index() == 0:
        _assemble(blocks, similar, text, about, folder, out)
    from_all(None)
    return counts, encoding


def _fill(counts, text: Text, about: About, seed: int, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the arrays of some latents after the other, and returns the files in order."""
    blocks = {folder / "blocks" / f"{r[0]:010d}.npz": r for r in blocks_of(counts)}
    pieces = open_pieces(folder / "events")
    windows = WindowHashes(text.tokens, about.before, about.after)
    files = list(blocks)
    own = [files[i] for i in own_share(range(len(files))) if not files[i].is_file()]
    for file in progress(own, "choosing the examples", len(own), "block"):
        first, stop = blocks[file]
        events = events_of(pieces, first, stop)
        found = statistics(events, stop - first)
        length = text.tokens.shape[1]
        found |= fill(events, first, found["max"], length, text.numbers, windows, about, seed)
        found["sketch"] = sketches(events, stop - first)
        save_whole(file, lambda file, found=found: np.savez(file, **found))
    from_all(None)
    return files


def _compare(blocks, counts, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes which latents fire together, of some after the other; returns the files in order."""
    similarities = Similarities(np.concatenate(list(_read(blocks, "sketch"))), counts)
    ranges = list(similarities.blocks())
    files = [folder / f"{first:010d}.npz" for first, _ in ranges]
    own = [i for i in own_share(range(len(files))) if not files[i].is_file()]
    for i in progress(own, "comparing latents", len(own), "block"):
        coactive, similarity = similarities.of(*ranges[i])
        found = {"coactive": coactive, "similarity": similarity}
        save_whole(files[i], lambda file, found=found: np.savez(file, **found))
    return files


def _assemble(blocks, similar, text: Text, about: About, folder: pathlib.Path, out) -> None:
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
