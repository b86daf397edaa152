"""Writes what a collection holds about latents as Neuronpedia and SAEDashboard take it.

There are three layouts, all made of one record of each latent:

    upload        batch-N.json, each the body of a request to neuronpedia.org's
                  /api/feature/upload-batch (see `neuronpedia_push`). Latents that never fired are
                  left out, since it refuses latents without an example.
    saedashboard  batch-N.json as SAEDashboard's runner writes them, with every latent.
    bulk          MODEL/SOURCE/: release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl, and
                  features/, activations/ and explanations/batch-N.jsonl.gz, which SAEDashboard's
                  neuronpedia_export makes of batch-N.json, and Neuronpedia imports.

Values are activations, in the model's units. They are the latents of the SAE that `sae-jax export`
writes, and what SAEDashboard shows: both multiply the norms of decoder rows into the latents.

What differs from SAEDashboard's own files:

- Numbers have 5 significant digits; it rounds to 3 decimals, which makes 0 of small ones.
- Examples are the collection's windows, not whole contexts.
- An interval never holds tokens on which the latent is off; its lowest one does. What share of
  tokens lies in an interval follows from the histogram, in proportion where the interval ends
  inside one of the histogram's bars.
- The histogram's bars begin at 0, and not at the smallest activation.
- Correlated neurons and latents are left empty: it correlates latents with those of their own batch
  only.

The limits of Neuronpedia's upload are those of its route.tsx of 2026-08.
"""

import dataclasses
import datetime
import functools
import gzip
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated

import jax.numpy as jnp
import msgspec
import numpy as np

from sae_jax import lm, paths
from sae_jax.errors import UserError
from sae_jax.interpret import effects
from sae_jax.interpret.collection import BINS, Collection
from sae_jax.interpret.text import vocabulary
from sae_jax.json_files import checked, read_json
from sae_jax.numpy_files import map_npy
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE

MANIFEST = "neuronpedia.json"
MOST_FEATURES = 128  # of a request
LAYOUTS = ("upload", "bulk", "saedashboard")
CREATOR_ID = "clkht01d40000jv08hvalcvly"  # Neuronpedia's own, as in SAEDashboard

_VERSION = 1
_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]*")
_SOURCE = re.compile(r"([0-9]+)-([a-z0-9][a-z0-9.-]*)(?:__([a-z0-9][a-z0-9._-]*))?")
_OUT_OF_RANGE = "<|outofrange|>"
_ALIGNED = 3  # of SAEDashboard's table of neurons
_OUTPUTS = 10  # promoted tokens, and suppressed ones
_TOP = -1  # of an interval's edge and share, for the highest peaks, which are no interval
_MOST_TOKENS, _MOST_VALUE, _MOST_INDEX, _LONGEST_TEXT = 1024, 99_999_999, 10_000_000, 512

_COPIED = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1",
    "correlated_features_indices", "correlated_features_pearson", "correlated_features_l1",
    "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero",
    "freq_hist_data_bar_heights", "freq_hist_data_bar_values", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "decoder_weights_dist",
)  # fmt: skip

_Token = Annotated[str, msgspec.Meta(min_length=1)]
_Limit = Annotated[float, msgspec.Meta(le=_MOST_VALUE)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


@dataclasses.dataclass(frozen=True)
class _Logit:
    """Describes a token that a latent promotes or suppresses, in an upload."""

    token: _Token
    value: float


@dataclasses.dataclass(frozen=True)
class _Activation:
    """Describes an example in an upload."""

    tokens: Annotated[list[_Token], msgspec.Meta(min_length=1, max_length=_MOST_TOKENS)]
    values: Annotated[list[float], msgspec.Meta(min_length=1, max_length=_MOST_TOKENS)]
    quantileMin: _Limit
    quantileMax: _Limit
    quantileFraction: _Share | None = None


@dataclasses.dataclass(frozen=True)
class _Feature:
    """Describes a latent in an upload."""

    index: Annotated[int, msgspec.Meta(ge=0, le=_MOST_INDEX)]
    density: _Share
    activations: Annotated[list[_Activation], msgspec.Meta(min_length=1)]
    topLogits: Annotated[list[_Logit], msgspec.Meta(max_length=20)] = ()
    bottomLogits: Annotated[list[_Logit], msgspec.Meta(max_length=20)] = ()


@dataclasses.dataclass(frozen=True)
class Export:
    """The latents of an SAE, and what Neuronpedia is to call them.

    Attributes:
      collection: what is known about the latents.
      sae: the SAE.
      tokenizer: what turns the collection's tokens into text.
      site: the site that the SAE writes to.
      model_id: Neuronpedia's name of the language model, such as gpt2-small.
      source: Neuronpedia's name of the SAE: its layer, the set that it belongs to, and, after "__",
        what tells it from others of the layer, as in 6-mine-res or 6-mine-res__l0-40.
      model: the language model. Without it no promoted and suppressed tokens are written.
      labels: texts by latents, which become explanations.
      method: Neuronpedia's name of the method that made the labels.
      labeller: Neuronpedia's name of the model that wrote the labels.
      dataset: what text the examples are from.
    """

    collection: Collection
    sae: SAE
    tokenizer: lm.Tokenizer
    site: str
    model_id: str
    source: str
    model: lm.JaxModel | None = None
    labels: Mapping[int, str] = dataclasses.field(default_factory=dict)
    method: str | None = None
    labeller: str | None = None
    dataset: str = ""

    @property
    def layer(self) -> int:
        """The number of the layer in `source`."""
        return int(_SOURCE.fullmatch(self.source)[1])

    @property
    def set_name(self) -> str:
        """The name of the set in `source`."""
        return _SOURCE.fullmatch(self.source)[2]

    @property
    def suffix(self) -> str | None:
        """What follows "__" in `source`."""
        return _SOURCE.fullmatch(self.source)[3]

    @functools.cached_property
    def vocabulary(self) -> list[str]:
        """The tokens by their ids."""
        return vocabulary(self.tokenizer)

    def token(self, token: int) -> str:
        """Returns a token as Neuronpedia is to show it."""
        inside = 0 <= token < len(self.vocabulary)
        return self.vocabulary[token] if inside else _OUT_OF_RANGE


@dataclasses.dataclass(frozen=True)
class Release:
    """What the bulk layout says of the work that an SAE belongs to.

    Attributes:
      name: Neuronpedia's name of the release; the set's by default.
      title: what it is called.
      creator: who made it.
      creator_id: the number of the creator at Neuronpedia.
      url: where more is told.
      repository: where the weights are on the hub, org/name.
      folder: the folder of the repository.
    """

    name: str = ""
    title: str = ""
    creator: str = ""
    creator_id: str = CREATOR_ID
    url: str = ""
    repository: str = ""
    folder: str = ""


@dataclasses.dataclass(frozen=True)
class Written:
    """What a writer wrote.

    Attributes:
      path: the directory.
      latents: how many latents are in it.
      left_out: how many are not, since they never fired.
      files: the names of the files with latents.
    """

    path: object
    latents: int
    left_out: int
    files: list[str]


def write_upload_batches(out, export: Export, *, batch: int = 64) -> Written:
    """Writes the bodies of requests to neuronpedia.org's /api/feature/upload-batch.

    Args:
      out: the directory.
      export: what to write.
      batch: how many latents go in a file, at most 128.

    Returns what was written. If it was interrupted, the same call goes on with the next file.

    Raises UserError, which names the latent and the field, for what Neuronpedia would refuse,
    before `out` exists; and if `out` holds anything but this export.
    """
    check(export)
    if not 1 <= batch <= MOST_FEATURES:
        raise UserError(f"{batch} latents a file; Neuronpedia takes 1 to {MOST_FEATURES}")
    for latent, text in export.labels.items():
        units = len(text.encode("utf-16-le")) // 2  # as JavaScript counts
        if not 1 <= units <= _LONGEST_TEXT:
            raise UserError(
                f"latent {latent}: explanations.text has {units} characters; Neuronpedia takes 1 "
                f"to {_LONGEST_TEXT}"
            )
    alive = np.flatnonzero(export.collection.max_activation > 0)
    if not len(alive):
        raise UserError(f"no latent of {export.collection.path} ever fired; nothing to upload")

    def make(number: int, latents: np.ndarray) -> dict[str, bytes]:
        features = [_uploaded(export, f) for f in _features(export, latents)]
        for feature in features:
            checked(feature, _Feature, f"latent {feature['index']}")
        body = {"modelId": export.model_id, "source": export.source, "features": features}
        return {f"batch-{number}.json": _line(body)}

    return _write(out, export, "upload", alive, batch, ["batch-{}.json"], make)


def write_saedashboard(out, export: Export, *, batch: int = 128) -> Written:
    """Writes batch-N.json as SAEDashboard does, which its NeuronpediaDashboardBatch reads.

    Args:
      out: the directory.
      export: what to write.
      batch: how many latents go in a file.

    Returns what was written. If it was interrupted, the same call goes on with the next file.

    Raises UserError if `export` cannot be Neuronpedia's, or `out` holds anything but this export.
    """
    check(export)

    def make(number: int, latents: np.ndarray) -> dict[str, bytes]:
        body = {
            "model_id": export.model_id,
            "layer": export.layer,
            "sae_set": export.set_name,
            "sae_id_suffix": export.suffix,
            "features": list(_features(export, latents)),
        }
        return {f"batch-{number}.json": _line(body)}

    latents = np.arange(export.collection.about.d_sae)
    return _write(out, export, "saedashboard", latents, batch, ["batch-{}.json"], make)


def write_bulk(out, export: Export, release: Release, *, batch: int = 128) -> Written:
    """Writes the layout that Neuronpedia imports, as SAEDashboard's neuronpedia_export does.

    Args:
      out: the directory, in which MODEL/SOURCE is made.
      export: what to write.
      release: what is said of the work.
      batch: how many latents go in a file.

    Returns what was written. If it was interrupted, the same call goes on with the next file.

    Raises UserError if `export` cannot be Neuronpedia's, or `out` holds anything but this export.
    """
    check(export)
    folder = f"{export.model_id}/{export.source}"
    kinds = ("features", "activations", *(["explanations"] if export.labels else []))
    names = [f"{folder}/{kind}/batch-{{}}.jsonl.gz" for kind in kinds]
    rows = _Rows(export, release)

    def make(number: int, latents: np.ndarray) -> dict[str, bytes]:
        features = list(_features(export, latents))
        made = (
            [rows.feature(f) for f in features],
            [row for f in features for row in rows.activations(f)],
            [rows.explanation(i) for i in latents if i in export.labels],
        )
        lines = (b"".join(map(_line, part)) for part in made[: len(names)])
        return {
            name.format(number): gzip.compress(data, mtime=0)
            for name, data in zip(names, lines, strict=True)
        }

    heads = {f"{folder}/{name}.jsonl": _line(row) for name, row in rows.heads().items()}
    latents = np.arange(export.collection.about.d_sae)
    return _write(
        out, export, "bulk", latents, batch, names, make, heads, dataclasses.asdict(release)
    )


def check(export: Export) -> None:
    """Raises UserError for what Neuronpedia refuses of any latent, and for a damaged collection."""
    collection, sae = export.collection, export.sae
    about, config = collection.about, sae.config
    _check_name(export.model_id, _MODEL, "the model's name", "gpt2-small")
    _check_name(export.source, _SOURCE, "the source", "6-mine-res, of layer 6 and the set mine-res")
    for what, name in (("method", export.method), ("model", export.labeller)):
        if name is not None and name != name.lower():
            raise UserError(f"the labels' {what} is {name!r}; Neuronpedia's names are lower case")
    if config.kind == "crosscoder":
        raise UserError("a crosscoder writes to several sites; Neuronpedia's sources have one")
    if about.d_sae != config.d_sae:
        raise UserError(
            f"{collection.path} is of {about.d_sae:,} latents, but the SAE has {config.d_sae:,}; "
            "collect again"
        )
    if config.d_sae - 1 > _MOST_INDEX:
        raise UserError(f"latent {config.d_sae - 1}: index; Neuronpedia's end at {_MOST_INDEX:,}")
    length = about.before + 1 + about.after
    if length > _MOST_TOKENS:
        raise UserError(f"examples of {length:,} tokens; Neuronpedia takes {_MOST_TOKENS:,}")
    wrong = ~((collection.density >= 0) & (collection.density <= 1))
    _refuse(wrong, collection.density, "density", "0 to 1", collection)
    strengths = collection.max_activation
    wrong = ~((strengths >= 0) & (strengths <= _MOST_VALUE))
    _refuse(wrong, strengths, "activations", f"0 to {_MOST_VALUE:,}", collection)
    for latent in export.labels:
        if not 0 <= latent < config.d_sae:
            raise UserError(f"a label is of latent {latent}, but the SAE has {config.d_sae:,}")


def _check_name(name: str, pattern: re.Pattern, what: str, example: str) -> None:
    if not pattern.fullmatch(name):
        raise UserError(
            f"{what} at Neuronpedia is {name!r}; it is of lower-case letters, digits, '-', '_' and "
            f"'.', as in {example}"
        )


def _refuse(wrong, values, field: str, may: str, collection: Collection) -> None:
    """Raises UserError, which names the first latent that is `wrong`."""
    if wrong.any():
        latent = int(np.argmax(wrong))
        raise UserError(
            f"latent {latent}: {field} is {values[latent]}, and may be {may}; {collection.path} is "
            "damaged: collect again"
        )


def _features(export: Export, latents: np.ndarray) -> Iterator[dict]:
    """Yields the records of latents, as SAEDashboard's NeuronpediaDashboardFeature has them."""
    collection = export.collection
    sequences, length = _shape(collection)
    aligned = _aligned(export, latents)
    outputs = _outputs(export, latents)
    for place, latent in enumerate(map(int, latents)):
        yield {
            "feature_index": latent,
            **aligned[place],
            "correlated_neurons_indices": [],
            "correlated_neurons_l1": [],
            "correlated_neurons_pearson": [],
            "correlated_features_indices": [],
            "correlated_features_l1": [],
            "correlated_features_pearson": [],
            **outputs[place],
            "frac_nonzero": _digits(collection.density[latent]),
            **_histogram(collection, latent),
            "n_prompts_total": sequences,
            "n_tokens_in_prompt": length,
            "dataset": export.dataset,
            "activations": list(_activations(export, latent)),
            "vector": [],
        }


def _aligned(export: Export, latents: np.ndarray) -> list[dict]:
    """Returns the neurons that each latent writes to most, and its share of each head's norm."""
    rows = export.sae.w_dec[...][jnp.asarray(latents)] / export.sae.target_scale
    rows = np.asarray(rows, np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(norms > 0, norms, 1.0)  # as SAEDashboard folds them
    best = np.argsort(-rows, axis=1, kind="stable")[:, :_ALIGNED]
    values = np.take_along_axis(rows, best, axis=1)
    total = np.abs(rows).sum(axis=1, keepdims=True)
    shares = np.abs(values) / np.where(total > 0, total, 1.0)
    heads = [[]] * len(rows)
    if export.site.startswith("z.") and export.model is not None:
        by_head = rows.reshape(len(rows), export.model.config.num_heads, -1)
        by_head = np.linalg.norm(by_head, axis=2)
        total = by_head.sum(axis=1, keepdims=True)
        heads = _digits(by_head / np.where(total > 0, total, 1.0))
    return [
        {
            "neuron_alignment_indices": best[i].tolist(),
            "neuron_alignment_values": _digits(values[i]),
            "neuron_alignment_l1": _digits(shares[i]),
            "decoder_weights_dist": heads[i],
        }
        for i in range(len(rows))
    ]


def _outputs(export: Export, latents: np.ndarray) -> list[dict]:
    """Returns the tokens that each latent promotes and suppresses, where the model is known."""
    found = None
    if export.model is not None:
        found = effects.output_tokens(export.sae, export.model, export.site, latents, _OUTPUTS)
    if found is None:
        names = ("neg_str", "neg_values", "pos_str", "pos_values")
        bars = ("logits_hist_data_bar_heights", "logits_hist_data_bar_values")
        return [{name: [] for name in (*names, *bars)} for _ in latents]
    centres = (np.arange(effects.BINS) + 0.5) / effects.BINS
    return [
        {
            "neg_str": [export.token(t) for t in found.suppressed[i]],
            "neg_values": _digits(found.suppressed_values[i]),
            "pos_str": [export.token(t) for t in found.promoted[i]],
            "pos_values": _digits(found.promoted_values[i]),
            "logits_hist_data_bar_heights": found.histogram[i].tolist(),
            "logits_hist_data_bar_values": _digits(
                found.low[i] + centres * (found.high[i] - found.low[i])
            ),
        }
        for i in range(len(latents))
    ]


def _histogram(collection: Collection, latent: int) -> dict:
    """Returns the bars of the histogram of activations; none of a latent that never fired."""
    counts = collection.histogram[latent]
    top = float(collection.max_activation[latent])
    values = (np.arange(BINS) + 0.5) * (top / BINS)
    fired = bool(counts.any())
    return {
        "freq_hist_data_bar_heights": counts.tolist() if fired else [],
        "freq_hist_data_bar_values": _digits(values) if fired else [],
    }


def _activations(export: Export, latent: int) -> Iterator[dict]:
    """Yields the examples of a latent: the highest peaks, then those of the intervals."""
    collection = export.collection
    about, top = collection.about, float(collection.max_activation[latent])
    up_to = np.concatenate([[0], np.cumsum(collection.histogram[latent])])
    for group, examples in enumerate(collection.examples(latent)):
        low, high, share = _TOP, _digits(top), _TOP
        if group:
            ends = 1 - np.array([group, group - 1]) / about.intervals
            below, above = np.interp(ends * BINS, np.arange(BINS + 1), up_to)
            low, high = _digits(ends * top)
            share = _digits((above - below) / about.rows)
        for example in examples:
            yield {
                "bin_min": low,
                "bin_max": high,
                "bin_contains": share,
                "tokens": [export.token(t) for t in example.ids[example.start : example.stop]],
                "values": _digits(example.activations),
                "qualifying_token_index": example.peak - example.start,
            }


def _uploaded(export: Export, feature: dict) -> dict:
    """Returns a record as /api/feature/upload-batch takes it."""
    latent = feature["feature_index"]
    made = {"index": latent, "density": feature["frac_nonzero"]}
    for ours, theirs in (("pos", "topLogits"), ("neg", "bottomLogits")):
        pairs = zip(feature[f"{ours}_str"], feature[f"{ours}_values"], strict=True)
        if found := [{"token": token, "value": value} for token, value in pairs]:
            made[theirs] = found
    if latent in export.labels:
        by = {"methodName": export.method, "modelName": export.labeller}
        by = {name: value for name, value in by.items() if value is not None}
        made["explanations"] = [{"text": export.labels[latent], **by}]
    made["activations"] = [
        {
            "tokens": a["tokens"],
            "values": a["values"],
            "quantileMin": a["bin_min"],
            "quantileMax": a["bin_max"],
            **({} if a["bin_contains"] == _TOP else {"quantileFraction": a["bin_contains"]}),
        }
        for a in feature["activations"]
    ]
    return made


class _Rows:
    """Makes rows of the bulk layout, with the fields that SAEDashboard's neuronpedia_export has."""

    def __init__(self, export: Export, release: Release, created: str):
        """Takes what rows are made of; `created` is the time that they all bear."""
        self._export, self._release, self._created = export, release, created
        self._set = release.name or export.set_name
        self._hook = lm.hook_name(export.site)

    def heads(self) -> dict[str, dict]:
        """Returns the one row of each file that is not of latents, by the file's name."""
        export, release, created = self._export, self._release, self._created
        sequences, length = _shape(export.collection)
        title = release.title or self._set
        return {
            "release": {
                "name": self._set, "description": title, "creatorName": release.creator,
                "creatorId": release.creator_id, "visibility": "PUBLIC", "isNewUi": False,
                "featured": False, "descriptionShort": title,
                "urls": [release.url] if release.url else [], "creatorEmail": None,
                "creatorNameShort": release.creator, "defaultSourceSetName": None,
                "defaultSourceId": None, "defaultUmapSourceIds": [], "createdAt": created,
            },
            "model": {
                "id": export.model_id, "instruct": export.model_id.endswith("-it"),
                "creatorId": release.creator_id, "displayNameShort": export.model_id,
                "displayName": export.model_id, "tlensId": None, "dimension": None,
                "visibility": "PUBLIC", "defaultSourceSetName": None, "defaultSourceId": None,
                "inferenceEnabled": False, "layers": 0, "neuronsPerLayer": 0, "createdAt": created,
                "owner": "", "updatedAt": created, "website": None,
            },
            "sourceset": {
                "modelId": export.model_id, "name": export.set_name,
                "creatorId": release.creator_id, "hasDashboards": True, "visibility": "PUBLIC",
                "description": title, "type": "", "creatorName": release.creator, "urls": [],
                "creatorEmail": None, "releaseName": self._set, "defaultOfModelId": None,
                "defaultRange": 1, "defaultShowBreaks": True, "showDfa": False,
                "showCorrelated": False, "showHeadAttribution": False, "showUmap": False,
                "createdAt": created,
            },
            "source": {
                "id": export.source, "modelId": export.model_id, "setName": export.set_name,
                "creatorId": release.creator_id, "hasDashboards": True, "inferenceEnabled": False,
                "inferenceHosts": [], "saelensConfig": None, "saelensRelease": None,
                "saelensSaeId": None, "hfRepoId": release.repository,
                "hfFolderId": release.folder, "visibility": "PUBLIC", "defaultOfModelId": None,
                "hasUmap": False, "hasUmapLogSparsity": False, "hasUmapClusters": False,
                "num_prompts": sequences, "num_tokens_in_prompt": length,
                "dataset": export.dataset, "notes": None, "createdAt": created,
            },
        }  # fmt: skip

    def feature(self, feature: dict, neighbours: list[tuple[int, float]]) -> dict:
        """Returns the row of a latent, from its record and (latent, cosine) of its neighbours."""
        copied = {name: feature[name] for name in feature if name in _COPIED}
        return {
            **self._place(feature["feature_index"]),
            "creatorId": self._release.creator_id,
            "createdAt": self._created,
            "maxActApprox": max((max(a["values"]) for a in feature["activations"]), default=0.0),
            "hasVector": False,
            "vector": [],
            "vectorLabel": None,
            "vectorDefaultSteerStrength": 10,
            "hookName": self._hook,
            "topkCosSimIndices": [latent for latent, _ in neighbours],
            "topkCosSimValues": [_digits(cosine) for _, cosine in neighbours],
            **copied,
            "sourceSetName": None,
        }

    def activations(self, feature: dict) -> Iterator[dict]:
        """Yields the rows of a latent's examples."""
        latent = feature["feature_index"]
        for number, example in enumerate(feature["activations"]):
            values = example["values"]
            yield {
                "id": self._id("activation", latent, number),
                "tokens": example["tokens"],
                **self._place(latent),
                "maxValue": max(values),
                "maxValueTokenIndex": values.index(max(values)),
                "minValue": min(values),
                "values": values,
                "creatorId": self._release.creator_id,
                "dataSource": None,
                "dataIndex": None,
                "dfaValues": [],
                "dfaTargetIndex": None,
                "dfaMaxValue": None,
                "createdAt": self._created,
                "lossValues": [],
                "logitContributions": None,
                "binMin": example["bin_min"],
                "binMax": example["bin_max"],
                "binContains": example["bin_contains"],
                "qualifyingTokenIndex": example["qualifying_token_index"],
                "zIndices": None,
                "zValues": None,
            }

    def explanation(self, latent: int) -> dict:
        """Returns the row of a label. Neuronpedia makes the embedding that it searches by."""
        return {
            "id": self._id("explanation", latent, 0),
            **self._place(latent),
            "description": self._export.labels[latent],
            "authorId": self._release.creator_id,
            "embedding": None,
            "triggeredById": None,
            "typeName": self._export.method,
            "explanationModelName": self._export.labeller,
            "notes": None,
            "createdAt": self._created,
        }

    def _place(self, latent: int) -> dict:
        return {"modelId": self._export.model_id, "layer": self._export.source, "index": latent}

    def _id(self, *parts) -> str:
        """Returns a name of a row that no other export has, of 25 characters as theirs."""
        place = (self._export.model_id, self._export.source, self._created, *parts)
        return "c" + hashlib.sha256(repr(place).encode()).hexdigest()[:24]


def _shape(collection: Collection) -> tuple[int, int]:
    """Returns how many texts there are, and their length in tokens."""
    return map_npy(collection.path / "tokens.npy").shape


def _write(
    out,
    export: Export,
    layout: str,
    latents: np.ndarray,
    batch: int,
    names: list[str],
    make: Callable[[int, np.ndarray], dict[str, bytes]],
    heads: Mapping[str, bytes] | None = None,
    release: dict | None = None,
) -> Written:
    """Writes the files of a layout to a temporary directory, and then gives it its name.

    Args:
      out: the directory.
      export: what is written.
      layout: its layout.
      latents: the latents to write.
      batch: how many go in a file.
      names: the names of a batch's files, with {} for its number.
      make: returns the content of a batch's files by name, from its number and its latents.
      heads: the content of other files, by name.
      release: what the layout says of the work.
    """
    out = paths.local(out)
    numbers = range(-(-len(latents) // batch))
    settings = _settings(export) | {"layout": layout, "batch": batch, "release": release}
    files = [name.format(number) for number in numbers for name in names]
    left_out = export.collection.about.d_sae - len(latents)
    written = Written(out, len(latents), left_out, files)
    if out.exists() and any(out.iterdir()):
        _check_same(out, settings)
        return written
    part = out.with_name(f"tmp.{out.name}")
    if part.exists() and not _is_same(part, settings):
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    about = settings | {"files": files, "latents": len(latents)}
    paths.save_json(about, part / MANIFEST)
    for name, data in (heads or {}).items():
        _save(part / name, data)
    for number in progress(numbers, f"write for Neuronpedia to {out}", len(numbers), "file"):
        if all((part / name.format(number)).is_file() for name in names):
            continue
        for name, data in make(number, latents[number * batch : (number + 1) * batch]).items():
            _save(part / name, data)
    if out.exists():
        out.rmdir()
    part.rename(out)
    return written


def _save(file, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    paths.write(file, data)


def _settings(export: Export) -> dict:
    """Returns what makes an export what it is, for the manifest."""
    collection = export.collection
    known = hashlib.sha256((collection.path / "collection.json").read_bytes())
    known.update(np.ascontiguousarray(collection.density).tobytes())
    known.update(np.ascontiguousarray(collection.max_activation).tobytes())
    labels = hashlib.sha256(_line(sorted((int(i), t) for i, t in export.labels.items())))
    return {
        "version": _VERSION,
        "model": export.model_id,
        "source": export.source,
        "site": export.site,
        "dataset": export.dataset,
        "collection": known.hexdigest(),
        "labels": labels.hexdigest() if export.labels else None,
        "method": export.method,
        "labeller": export.labeller,
        "language_model": export.model and export.model.fingerprint,
    }


def _is_same(directory, settings: dict) -> bool:
    """Returns whether a directory's manifest is of these settings."""
    found = read_json(directory / MANIFEST, default={})
    return all(found.get(name) == value for name, value in settings.items())


def _check_same(directory, settings: dict) -> None:
    """Raises UserError, which names what differs, unless a directory holds this export."""
    if not (directory / MANIFEST).is_file():
        raise UserError(f"{directory} exists and is not empty; choose another directory")
    found = read_json(directory / MANIFEST)
    for name, value in settings.items():
        if found.get(name) != value:
            raise UserError(
                f"{directory} holds another export, of {name} {found.get(name)!r}, not {value!r}; "
                "choose another directory"
            )


def _line(values) -> bytes:
    return msgspec.json.encode(values) + b"\n"


def _digits(values):
    """Returns a number, or the numbers of an array, with 5 significant digits."""
    if np.ndim(values):
        return [_digits(value) for value in np.asarray(values).tolist()]
    return float(f"{float(values):.5g}")
