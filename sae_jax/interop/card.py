"""Writes the README.md of an export, the model card that the Hugging Face hub shows."""

import dataclasses
import importlib.metadata
import json
import pathlib
import re
import string
import urllib.parse

from sae_jax import pages
from sae_jax.sae import SAE

_HERE = pathlib.Path(__file__).parent
# The formats that belong to a package, which the hub calls a library.
_LIBRARIES = ("saelens", "dictionary_learning", "sparsify", "sae_jax")
_TAGS = ["sparse-autoencoder", "sae", "mechanistic-interpretability", "sae_jax"]

_RECIPE = {
    "architecture": "architecture",
    "kind": "kind",
    "d_sae": "latents",
    "k": "k, latents a token",
    "sparsity_coefficient": "sparsity coefficient",
    "target_l0": "L0 aimed at",
    "prefix_widths": "nested widths",
    "aux_coefficient": "coefficient of the auxiliary loss",
    "tokens": "tokens",
    "batch_size": "batch, tokens",
    "epochs": "passes over the data",
    "learning_rate": "learning rate",
    "schedule": "schedule of the learning rate",
    "normalize": "normalisation of activations",
    "seed": "seed",
    "branched_from": "branched off",
}
_SOURCE = {
    "model_name": "language model",
    "site": "site",
    "hook_name": "hook, as TransformerLens calls it",
    "target_site": "site that it predicts",
    "hook_name_out": "hook that it predicts",
    "dataset_path": "text",
    "context_size": "context, tokens",
    "imported_from": "imported from the format",
    "run_id": "run",
}
_RUN_METRICS = {"l0": "L0", "eval_fvu": "FVU", "dead_fraction": "latents dead at the end, fraction"}
_METRICS = {
    "l0": "L0, latents active a token",
    "fvu": "FVU, fraction of variance unexplained",
    "explained_variance": "explained variance",
    "mse": "mean squared error, summed over the width",
    "cosine_similarity": "cosine similarity",
    "dead_fraction": "latents that never fired, fraction",
    "ce_clean": "cross-entropy of the model, nats",
    "ce_spliced": "cross-entropy with the SAE spliced in, nats",
    "ce_zero": "cross-entropy with the site ablated to zero, nats",
    "ce_recovered_zero": "CE recovered, against zero ablation",
    "kl_spliced": "KL(model, SAE spliced in), nats",
    "rows": "rows",
}
_PAPERS = {
    "relu": "Conerly et al., *Update on how we train SAEs*, Transformer Circuits, April 2024. "
    "https://transformer-circuits.pub/2024/april-update",
    "relu_l1_unit": "Bricken et al., *Towards Monosemanticity: Decomposing Language Models With "
    "Dictionary Learning*, Transformer Circuits, 2023. "
    "https://transformer-circuits.pub/2023/monosemantic-features",
    "topk": "Gao et al., *Scaling and evaluating sparse autoencoders*, 2024. "
    "https://arxiv.org/abs/2406.04093",
    "batchtopk": "Bussmann et al., *BatchTopK Sparse Autoencoders*, 2024. "
    "https://arxiv.org/abs/2412.06410",
    "matryoshka": "Bussmann et al., *Learning Multi-Level Features with Matryoshka Sparse "
    "Autoencoders*, 2025. https://arxiv.org/abs/2503.17547",
    "jumprelu": "Rajamanoharan et al., *Jumping Ahead: Improving Reconstruction Fidelity with "
    "JumpReLU Sparse Autoencoders*, 2024. https://arxiv.org/abs/2407.14435",
    "gated": "Rajamanoharan et al., *Improving Dictionary Learning with Gated Sparse "
    "Autoencoders*, 2024. https://arxiv.org/abs/2404.16014",
    "transcoder": "Dunefsky et al., *Transcoders Find Interpretable LLM Feature Circuits*, 2024. "
    "https://arxiv.org/abs/2406.11944",
    "skip_transcoder": "Paulo et al., *Transcoders Beat Sparse Autoencoders for "
    "Interpretability*, 2025. https://arxiv.org/abs/2501.18823",
    "crosscoder": "Lindsey et al., *Sparse Crosscoders for Cross-Layer Features and Model "
    "Diffing*, Transformer Circuits, 2024. https://transformer-circuits.pub/2024/crosscoders",
}


@dataclasses.dataclass(frozen=True)
class Hub:
    """Says where on the hub an export will be, and under which license.

    Attributes:
      license: the license as the hub writes it, such as apache-2.0; None if none is stated.
      repo: the repository as user/name; None if there is none.
      folder: the export's folder in the repository; "" if it is the whole repository.
    """

    license: str | None = None
    repo: str | None = None
    folder: str = ""


def model_card(sae: SAE, format: str, usage: str, provenance: dict, hub: Hub) -> str:
    """Returns the text of the model card of one SAE.

    Args:
      sae: the SAE.
      format: the name of the export's format.
      usage: the format's `USAGE`, a snippet of Python.
      provenance: where the SAE comes from, as `read_provenance` gives it.
      hub: where on the hub the export will be, and its license.
    """
    config, training = sae.config, provenance.get("training", {})
    # An import does not know what it was before its format made, say, a JumpReLU of a BatchTopK.
    architecture = training.get("architecture", config.architecture)
    site = provenance.get("hook_name") or provenance.get("site")
    title = f"{architecture} {config.kind.replace('_', ' ')}"
    title += f" at {site}" if site else ""
    title += f" of {provenance['model_name']}" if "model_name" in provenance else ""
    return _render(
        "card.md",
        title=_text(title),
        front_matter=_front_matter(format, [architecture, config.kind], provenance, hub),
        format=format,
        config=config,
        source=_rows(_SOURCE, provenance),
        usage=_with_path(
            string.Template(usage).substitute(d_in=config.d_in, site=_line(site or "the site")), hub
        ),
        recipe=_rows(_RECIPE, training),
        metrics=_rows(_METRICS, provenance["evaluation"])
        if "evaluation" in provenance
        else _rows(_RUN_METRICS, provenance),
        license=_text(hub.license),
        citations=[
            *(_PAPERS[what] for what in (architecture, config.kind) if what in _PAPERS),
            _this_software(),
        ],
    )


def collection_card(title: str, format: str, saes: list[dict], provenance: dict, hub: Hub) -> str:
    """Returns the text of the model card of several SAEs.

    Args:
      title: the card's title.
      format: the name of the exports' format.
      saes: the entries of the index that `many.export_many` writes.
      provenance: the provenance that all the SAEs have in common.
      hub: where on the hub the exports will be, and their license.
    """
    tags = sorted({sae["architecture"] for sae in saes})
    return _render(
        "collection.md",
        title=_text(title),
        front_matter=_front_matter(format, tags, provenance, hub),
        format=format,
        saes=saes,
        text=_text,
        link=urllib.parse.quote,
        license=_text(hub.license),
        citations=[_this_software()],
    )


def _this_software() -> str:
    """Returns how to cite sae_jax, of the version that writes the card."""
    version = importlib.metadata.version("sae-jax")
    return (
        "The sae_jax authors, *sae_jax: sparse autoencoders for language-model activations in "
        f"JAX*, version {version}, 2026."
    )


def _render(template: str, **values) -> str:
    return pages.render(_HERE / template, **values).rstrip() + "\n"


def _front_matter(format: str, tags: list[str], provenance: dict, hub: Hub) -> dict:
    """Returns the values of the card's YAML front matter, by name.

    The hub refuses a base_model that is no name of its own, so a local folder is left out.
    """
    values = {"library_name": format} if format in _LIBRARIES else {}
    if hub.license:
        values["license"] = hub.license
    if re.fullmatch(r"[\w.-]+/[\w.-]+", provenance.get("model_name", "")):
        values["base_model"] = provenance["model_name"]
    return values | {"tags": [*_TAGS, *tags]}


def _with_path(usage: str, hub: Hub) -> str:
    """Returns the snippet with a line behind its imports that sets `path`."""
    imports, _, rest = usage.rstrip().partition("\n\n")
    if not hub.repo:
        return f'{imports}\n\npath = "."  # the folder of this README\n{rest}'
    repo = json.dumps(hub.repo)  # which is how Python writes text too
    call = f"snapshot_download({repo})"
    if hub.folder:
        only, below = json.dumps(f"{hub.folder}/*"), json.dumps(f"/{hub.folder}")
        call = f"snapshot_download({repo}, allow_patterns={only}) + {below}"
    return f"from huggingface_hub import snapshot_download\n{imports}\n\npath = {call}\n{rest}"


def _rows(labels: dict[str, str], values: dict) -> list[tuple[str, str]]:
    return [(label, _text(values[name])) for name, label in labels.items() if name in values]


def _text(value) -> str:
    """Returns a value as Markdown that shows it and nothing else, on one line."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        # An underscore within a word is no mark.
        return re.sub(r"[\\`*\[\]<>|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", _line(str(value)))
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _line(text: str) -> str:
    return " ".join(text.split())
