"""Writes the three layouts, each from the records of `export`.

The limits of an upload are those of Neuronpedia's api/feature/upload-batch/route.tsx, 2026-08.
"""

import dataclasses
import gzip
import pathlib
from typing import Annotated

import msgspec
import numpy as np

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.interpret.dashboard.neighbours import Neighbours
from sae_jax.interpret.explain.labels import short
from sae_jax.interpret.neuronpedia.bulk import Release, Rows
from sae_jax.interpret.neuronpedia.explanations import named
from sae_jax.interpret.neuronpedia.export import (
    MOST_INDEX,
    MOST_TOKENS,
    MOST_VALUE,
    TOP,
    Export,
    check,
    features,
)
from sae_jax.interpret.neuronpedia.files import batched, json_line, settings_of, write
from sae_jax.json_files import checked

MOST_FEATURES = 128  # of a request
_LONGEST_TEXT = 512
_FILES = ["batch-{}.json"]

_Token = Annotated[str, msgspec.Meta(min_length=1)]
_Edge = Annotated[float, msgspec.Meta(le=MOST_VALUE)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


@dataclasses.dataclass(frozen=True)
class _Logit:
    """Describes a token that a latent promotes or suppresses, in an upload."""

    token: _Token
    value: float


@dataclasses.dataclass(frozen=True)
class _Activation:
    """Describes an example in an upload."""

    tokens: Annotated[list[_Token], msgspec.Meta(min_length=1, max_length=MOST_TOKENS)]
    values: Annotated[list[float], msgspec.Meta(min_length=1, max_length=MOST_TOKENS)]
    quantileMin: _Edge
    quantileMax: _Edge
    quantileFraction: _Share | None = None


@dataclasses.dataclass(frozen=True)
class _Feature:
    """Describes a latent in an upload."""

    index: Annotated[int, msgspec.Meta(ge=0, le=MOST_INDEX)]
    density: _Share
    activations: Annotated[list[_Activation], msgspec.Meta(min_length=1)]
    topLogits: Annotated[list[_Logit], msgspec.Meta(max_length=20)] | None = None
    bottomLogits: Annotated[list[_Logit], msgspec.Meta(max_length=20)] | None = None


@dataclasses.dataclass(frozen=True)
class Written:
    """What a writer wrote.

    Attributes:
      path: the directory.
      latents: how many latents are in it.
      left_out: how many are not, since they never fired.
      files: the names of the files with latents.
    """

    path: pathlib.Path
    latents: int
    left_out: int
    files: list[str]


def write_upload_batches(out, export: Export, *, batch: int = 32) -> Written:
    """Writes the bodies of requests to neuronpedia.org's /api/feature/upload-batch.

    Latents that never fired are left out, since it refuses latents without an example, and
    explanations of more than 512 characters are cut. `push` sends the files.

    Args:
      out: the directory.
      export: what to write.
      batch: how many latents go in a file, at most 128.

    Returns what was written. If it is interrupted, the same call goes on with the next file.

    Raises UserError, which names the latent and the field, for what Neuronpedia would refuse: no
    directory `out` is made then. Also if `out` holds anything but this export.
    """
    _check_batch(batch)
    check(export)
    for latent, text in export.labels.items():
        units = len(text.encode("utf-16-le")) // 2  # as JavaScript counts
        if not 1 <= units <= _LONGEST_TEXT:
            raise UserError(
                f"latent {latent}: its label, explanations.text, has {units} characters; "
                f"Neuronpedia takes 1 to {_LONGEST_TEXT}"
            )
    alive = np.flatnonzero(export.collection.max_activation > 0)
    if not len(alive):
        raise UserError(f"no latent of {export.collection.path} ever fired; nothing to upload")

    def make(number: int, latents: np.ndarray) -> list[bytes]:
        uploaded = [_uploaded(export, feature) for feature in features(export, latents)]
        for feature in uploaded:
            checked(feature, _Feature, f"latent {feature['index']}")
        body = {"modelId": export.model_id, "source": export.source, "features": uploaded}
        return [json_line(body)]

    settings = settings_of(export, "upload", batch)
    files = write(out, settings, batched(alive, batch), _FILES, make)
    return Written(paths.local(out), len(alive), export.collection.about.d_sae - len(alive), files)


def write_saedashboard(out, export: Export, *, batch: int = 128) -> Written:
    """Writes batch-N.json as SAEDashboard's runner does: its NeuronpediaDashboardBatch reads them.

    Args:
      out: the directory.
      export: what to write, all of its latents.
      batch: how many latents go in a file, at most 128.

    Returns what was written. If it is interrupted, the same call goes on with the next file.

    Raises UserError if the names cannot be Neuronpedia's, or `out` holds anything but this export.
    """
    _check_batch(batch)
    check(export)

    def make(number: int, latents: np.ndarray) -> list[bytes]:
        body = {
            "model_id": export.model_id,
            "layer": export.layer,
            "sae_set": export.set_name,
            "sae_id_suffix": export.suffix,
            "features": list(features(export, latents)),
        }
        return [json_line(body)]

    latents = np.arange(export.collection.about.d_sae)
    settings = settings_of(export, "saedashboard", batch)
    files = write(out, settings, batched(latents, batch), _FILES, make)
    return Written(paths.local(out), len(latents), 0, files)


def write_bulk(out, export: Export, release: Release, *, batch: int = 128) -> Written:
    """Writes the layout that Neuronpedia imports, as SAEDashboard's neuronpedia_export does.

    That is MODEL/SOURCE/ with release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl and
    batch-N.jsonl.gz in features/, activations/ and, where there are labels or explanations,
    explanations/ and scores/.
    Besides what SAEDashboard writes there are neighbours by the cosine of decoder rows.

    Args:
      out: the directory.
      export: what to write, all of its latents.
      release: what is said of the work.
      batch: how many latents go in a file, at most 128.

    Returns what was written. If it is interrupted, the same call goes on with the next file.

    Raises UserError if the names cannot be Neuronpedia's, or `out` holds anything but this export.
    """
    _check_batch(batch)
    check(export)
    rows, neighbours = Rows(export, release), Neighbours(export.sae)
    folder = f"{export.model_id}/{export.source}"
    kinds = ["features", "activations"]
    kinds += ["explanations"] if export.labels or export.explanations else []
    kinds += ["scores"] if export.explanations else []

    def make(number: int, latents: np.ndarray) -> list[bytes]:
        found, near = list(features(export, latents)), neighbours.find(latents)
        made = {
            "features": [rows.feature(*pair) for pair in zip(found, near, strict=True)],
            "activations": [row for feature in found for row in rows.activations(feature)],
            "explanations": [row for i in latents.tolist() for row in rows.explanations(i)],
            "scores": [row for i in latents.tolist() for row in rows.scores(i)],
        }
        parts = [b"".join(map(json_line, made[kind])) for kind in kinds]
        return [gzip.compress(part, mtime=0) for part in parts]

    latents = np.arange(export.collection.about.d_sae)
    settings = settings_of(export, "bulk", batch) | {"release": dataclasses.asdict(release)}
    heads = {f"{folder}/{name}.jsonl": json_line(row) for name, row in rows.heads().items()}
    names = [f"{folder}/{kind}/batch-{{}}.jsonl.gz" for kind in kinds]
    files = write(out, settings, batched(latents, batch), names, make, heads)
    return Written(paths.local(out), len(latents), 0, files)


def _check_batch(batch: int) -> None:
    if not 1 <= batch <= MOST_FEATURES:
        raise UserError(f"{batch} latents a file; it may be 1 to {MOST_FEATURES}")


def _uploaded(export: Export, feature: dict) -> dict:
    """Returns a record as /api/feature/upload-batch takes it."""
    latent = feature["feature_index"]
    made = {"index": latent, "density": feature["frac_nonzero"]}
    for ours, theirs in (("pos", "topLogits"), ("neg", "bottomLogits")):
        pairs = zip(feature[f"{ours}_str"], feature[f"{ours}_values"], strict=True)
        if found := [{"token": token, "value": value} for token, value in pairs]:
            made[theirs] = found
    if explanations := named(export, latent):
        made["explanations"] = [
            {
                "text": short(one.text, _LONGEST_TEXT),
                **({"methodName": one.method} if one.method is not None else {}),
                **({"modelName": one.model} if one.model is not None else {}),
            }
            for one in explanations
        ]
    made["activations"] = [
        {
            "tokens": example["tokens"],
            "values": example["values"],
            "quantileMin": example["bin_min"],
            "quantileMax": example["bin_max"],
            # It takes no share below 0, but -1 as the edge that marks the highest peaks.
            **({"quantileFraction": example["bin_contains"]} if example["bin_min"] != TOP else {}),
        }
        for example in feature["activations"]
    ]
    return made
