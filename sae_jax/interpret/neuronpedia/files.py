"""Writes an export's files to a directory that has its name only when it is whole."""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import msgspec
import numpy as np

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.interpret.neuronpedia.export import Export
from sae_jax.json_files import read_json
from sae_jax.progress_bar import progress

MANIFEST = "neuronpedia.json"
_VERSION = 1


def write(
    out,
    settings: dict,
    batches: Sequence[np.ndarray],
    names: Sequence[str],
    make: Callable[[int, np.ndarray], list[bytes]],
    heads: Mapping[str, bytes] = MappingProxyType({}),
) -> list[str]:
    """Writes the files of all batches, and returns their names.

    They are written to a temporary directory beside `out`, which gets the name at the end. A call
    that was interrupted is taken up by the same call: batches whose files are there stay.

    Args:
      out: the directory.
      settings: what makes the export what it is; MANIFEST in the directory holds it.
      batches: the latents of each batch.
      names: the names of a batch's files, with {} for its number.
      make: returns the contents of a batch's files, from its number and its latents.
      heads: other files and their contents, by name.

    Raises UserError if `out` holds anything but this export, which is then left as it is.
    """
    out = paths.local(out)
    files = [name.format(number) for number in range(len(batches)) for name in names]
    settings = {"version": _VERSION, **settings}
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a directory")
    if out.exists() and any(out.iterdir()):
        _check_same(out, settings)
        return files
    part = out.with_name(f"tmp.{out.name}")
    if part.exists() and (different := _difference(part, settings)) is not None:
        if different == MANIFEST and any(not f.name.startswith(MANIFEST) for f in part.iterdir()):
            raise UserError(f"{part} is in the way, which no export left there; move it")
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    paths.save_json(settings | {"files": files}, part / MANIFEST)
    for name in names:
        (part / name).parent.mkdir(parents=True, exist_ok=True)
    for name, data in heads.items():
        paths.write(part / name, data)
    numbered = progress(enumerate(batches), f"writing {out}", len(batches), "file")
    for number, latents in numbered:
        places = [part / name.format(number) for name in names]
        if all(place.is_file() for place in places):
            continue
        for place, data in zip(places, make(number, latents), strict=True):
            paths.write(place, data)
    if out.exists():
        out.rmdir()
    part.rename(out)
    return files


def batched(latents: np.ndarray, size: int) -> list[np.ndarray]:
    """Returns latents in parts of `size`, of which the last may be smaller."""
    return [latents[start : start + size] for start in range(0, len(latents), size)]


def settings_of(export: Export, layout: str, batch: int) -> dict:
    """Returns what makes an export what it is, for its manifest."""
    collection = export.collection
    known = hashlib.sha256((collection.path / "collection.json").read_bytes())
    for array in (collection.density, collection.max_activation):
        known.update(np.ascontiguousarray(array).tobytes())
    labels = json_line(sorted((int(i), text) for i, text in export.labels.items()))
    said = json_line(sorted((int(i), list(each)) for i, each in export.explanations.items()))
    return {
        "layout": layout,
        "model": export.model_id,
        "source": export.source,
        "site": export.site,
        "dataset": export.dataset,
        "batch": batch,
        "collection": known.hexdigest(),
        "labels": hashlib.sha256(labels).hexdigest() if export.labels else None,
        "explanations": hashlib.sha256(said).hexdigest() if export.explanations else None,
        "method": export.method,
        "labeller": export.labeller,
        "language_model": export.model and export.model.fingerprint,
    }


def json_line(values) -> bytes:
    """Returns values as one line of JSON, in UTF-8."""
    return msgspec.json.encode(values) + b"\n"


def _difference(directory, settings: dict) -> str | None:
    """Returns the first setting that a directory's manifest does not share, or None.

    It is the manifest's own name where there is none.
    """
    if not (directory / MANIFEST).is_file():
        return MANIFEST
    found = read_json(directory / MANIFEST)
    return next((name for name in settings if found.get(name) != settings[name]), None)


def _check_same(directory, settings: dict) -> None:
    different = _difference(directory, settings)
    if different == MANIFEST:
        raise UserError(f"{directory} exists and is not empty; choose another directory")
    if different is not None:
        found = read_json(directory / MANIFEST).get(different)
        raise UserError(
            f"{directory} holds another export, with {different} {found!r} and not "
            f"{settings[different]!r}; choose another directory"
        )
