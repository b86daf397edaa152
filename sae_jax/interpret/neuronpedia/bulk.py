"""Makes the rows of the layout that Neuronpedia imports, as SAEDashboard's neuronpedia_export does.

Source: sae_dashboard/neuronpedia/neuronpedia_export.py of SAEDashboard's repository, 2026-05.
"""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Iterator

from sae_jax import lm
from sae_jax.interpret.neuronpedia.explanations import details_of, named, score_type
from sae_jax.interpret.neuronpedia.export import Export, digits, shape

CREATOR_ID = "clkht01d40000jv08hvalcvly"  # Neuronpedia's own, as in SAEDashboard

_COPIED = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1",
    "correlated_features_indices", "correlated_features_pearson", "correlated_features_l1",
    "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero",
    "freq_hist_data_bar_heights", "freq_hist_data_bar_values", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "decoder_weights_dist",
)  # fmt: skip


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


class Rows:
    """Makes rows of the bulk layout, with the fields that SAEDashboard's neuronpedia_export has."""

    def __init__(self, export: Export, release: Release):
        """Takes what rows are made of. The time that they bear is that of the collection."""
        self._export, self._release = export, release
        made = (export.collection.path / "collection.json").stat().st_mtime
        made = datetime.datetime.fromtimestamp(made, datetime.UTC).replace(tzinfo=None)
        self._created = made.isoformat(timespec="milliseconds")  # as theirs, without a time zone
        self._set = release.name or export.set_name
        self._hook = lm.hook_name(export.site)

    def heads(self) -> dict[str, dict]:
        """Returns the one row of each file that is not of latents, by the file's name."""
        export, release, created = self._export, self._release, self._created
        sequences, length = shape(export.collection)
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
            "topkCosSimValues": [digits(cosine) for _, cosine in neighbours],
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

    def explanations(self, latent: int) -> Iterator[dict]:
        """Yields the rows of what a latent is said to be. Neuronpedia makes the embeddings that it
        searches by."""
        for number, one in enumerate(named(self._export, latent)):
            yield {
                "id": self._id("explanation", latent, number),
                **self._place(latent),
                "description": one.text,
                "authorId": self._release.creator_id,
                "embedding": None,
                "triggeredById": None,
                "typeName": one.method,
                "explanationModelName": one.model,
                "notes": None,
                "createdAt": self._created,
            }

    def scores(self, latent: int) -> Iterator[dict]:
        """Yields the rows of the scores of these."""
        for number, one in enumerate(named(self._export, latent)):
            for mark in one.scores:
                yield {
                    "id": self._id("score", latent, number, mark.scorer),
                    "value": mark.value,
                    "explanationId": self._id("explanation", latent, number),
                    "initiatedByUserId": self._release.creator_id,
                    "explanationScoreTypeName": score_type(mark.scorer),
                    "explanationScoreModelName": mark.model.lower() or None,
                    "jsonDetails": json.dumps(details_of(mark)),
                    "createdAt": self._created,
                }

    def _place(self, latent: int) -> dict:
        return {"modelId": self._export.model_id, "layer": self._export.source, "index": latent}

    def _id(self, *parts) -> str:
        """Returns a name of a row that no other export has, of 25 characters as theirs."""
        place = (self._export.model_id, self._export.source, self._created, *parts)
        return "c" + hashlib.sha256(repr(place).encode()).hexdigest()[:24]
