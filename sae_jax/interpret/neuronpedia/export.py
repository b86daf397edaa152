"""Makes one record of each latent, with the fields of SAEDashboard's NeuronpediaDashboardFeature.

Values are activations, in the model's units. They are the latents of the SAE that `sae-jax export`
writes, and what SAEDashboard shows: both multiply the norms of decoder rows into the latents.

What differs from what SAEDashboard writes:

- Numbers have 5 significant digits; it rounds to 3 decimals, which makes 0 of small ones.
- Examples are the collection's windows, not whole contexts.
- An interval holds no tokens on which the latent is off; its lowest one does. What share of tokens
  lies in an interval follows from the histogram, in proportion where it ends inside a bar.
- The histogram's bars begin at 0, and not at the smallest activation.
- Promoted tokens are those of `effects`, with values whose median is 0.
- Correlated neurons and latents are left empty. It correlates latents with those of their own batch
  only, and Neuronpedia's page of neurons needs a cosine with each correlation.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.interpret import effects
from sae_jax.interpret.collection import BINS, Collection
from sae_jax.interpret.explain.labels import Said
from sae_jax.interpret.text import vocabulary
from sae_jax.lm.text import well_formed
from sae_jax.sae import SAE

MOST_TOKENS, MOST_VALUE, MOST_INDEX = 1024, 99_999_999, 10_000_000
TOP = -1  # the lower edge of the highest peaks, which are no interval, and their share of tokens

_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]*")
_SOURCE = re.compile(r"([0-9]{1,4})-([a-z0-9][a-z0-9.-]*)(?:__([a-z0-9][a-z0-9._-]*))?")
_OUT_OF_RANGE = "<|outofrange|>"
_ALIGNED = 3  # of SAEDashboard's table of neurons
_OUTPUTS = 10  # promoted tokens, and suppressed ones


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
      explanations: what `sae-jax explain` said of latents, by their numbers, which become
        explanations too, with names of their methods that begin with sae_jax, and scores.
      dataset: what text the examples are from.
    """

    collection: Collection
    sae: SAE
    tokenizer: lm.Tokenizer
    site: str
    model_id: str
    source: str
    model: lm.LanguageModel | None = None
    labels: Mapping[int, str] = dataclasses.field(default_factory=dict)
    method: str | None = None
    labeller: str | None = None
    explanations: Mapping[int, Sequence[Said]] = dataclasses.field(default_factory=dict)
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


def check(export: Export) -> None:
    """Raises UserError for what Neuronpedia refuses of any latent, and for a damaged collection."""
    collection, sae = export.collection, export.sae
    about, config = collection.about, sae.config
    check_names(export.model_id, export.source)
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
    if config.d_sae - 1 > MOST_INDEX:
        raise UserError(f"latent {config.d_sae - 1}: index; Neuronpedia's end at {MOST_INDEX:,}")
    length = about.before + 1 + about.after
    if length > MOST_TOKENS:
        raise UserError(f"examples of {length:,} tokens; Neuronpedia takes {MOST_TOKENS:,}")
    wrong = ~((collection.density >= 0) & (collection.density <= 1))
    _refuse(wrong, collection.density, "density", "0 to 1", collection)
    strengths = collection.max_activation.astype(np.float64)  # which tells the limit from 1e8
    wrong = ~((strengths >= 0) & (strengths <= MOST_VALUE))
    _refuse(wrong, strengths, "activations", f"0 to {MOST_VALUE:,}", collection)
    if strange := [i for i in export.explanations if not 0 <= i < config.d_sae]:
        raise UserError(f"latent {strange[0]} is explained, but the SAE has {config.d_sae:,}")
    for latent, text in export.labels.items():
        if not 0 <= latent < config.d_sae:
            raise UserError(f"a label is of latent {latent}, but the SAE has {config.d_sae:,}")
        if text != well_formed(text):
            raise UserError(f"latent {latent}: its label holds half of a character")
        if "\0" in text:
            raise UserError(f"latent {latent}: its label holds the character 0; leave it out")


def check_names(model_id: str, source: str) -> None:
    """Raises UserError unless these may be Neuronpedia's names of a model and of an SAE."""
    _check_name(model_id, _MODEL, "the model's name", "gpt2-small")
    _check_name(source, _SOURCE, "the source", "6-mine-res, of layer 6 and the set mine-res")


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


def features(export: Export, latents: np.ndarray) -> Iterator[dict]:
    """Yields the records of latents, as SAEDashboard's NeuronpediaDashboardFeature has them.

    Raises UserError, which names the latent and the field, for a number that is not finite.
    """
    collection = export.collection
    sequences, length = shape(collection)
    aligned = _aligned(export, latents)
    outputs = _outputs(export, latents)
    for place, latent in enumerate(map(int, latents)):
        record = {
            "feature_index": latent,
            **aligned[place],
            "correlated_neurons_indices": [],
            "correlated_neurons_l1": [],
            "correlated_neurons_pearson": [],
            "correlated_features_indices": [],
            "correlated_features_l1": [],
            "correlated_features_pearson": [],
            **outputs[place],
            "frac_nonzero": digits(collection.density[latent]),
            **_histogram(collection, latent),
            "n_prompts_total": sequences,
            "n_tokens_in_prompt": length,
            "dataset": export.dataset,
            "activations": list(_activations(export, latent)),
            "vector": [],
        }
        _check_finite(record, latent)
        for example in record["activations"]:
            _check_finite(example, latent)
        yield record


def _check_finite(record: dict, latent: int) -> None:
    for field, value in record.items():
        numbers = value if isinstance(value, list) else [value]
        if numbers and isinstance(numbers[0], float) and not all(map(math.isfinite, numbers)):
            raise UserError(f"latent {latent}: {field} has a number that is not finite")


def _aligned(export: Export, latents: np.ndarray) -> list[dict]:
    """Returns the neurons that each latent writes to most, and its share of each head's norm."""
    rows = np.asarray(export.sae.direction(latents), np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(norms > 0, norms, 1.0)  # as SAEDashboard folds them
    best = np.argsort(-rows, axis=1, kind="stable")[:, :_ALIGNED]
    values = np.take_along_axis(rows, best, axis=1)
    total = np.abs(rows).sum(axis=1, keepdims=True)
    shares = np.abs(values) / np.where(total > 0, total, 1.0)
    heads = [[]] * len(rows)
    if export.site.startswith("z.") and isinstance(export.model, lm.JaxModel):
        by_head = rows.reshape(len(rows), export.model.config.num_heads, -1)
        by_head = np.linalg.norm(by_head, axis=2)
        total = by_head.sum(axis=1, keepdims=True)
        heads = [digits(row) for row in by_head / np.where(total > 0, total, 1.0)]
    return [
        {
            "neuron_alignment_indices": best[i].tolist(),
            "neuron_alignment_values": digits(values[i]),
            "neuron_alignment_l1": digits(shares[i]),
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
            "neg_values": digits(found.suppressed_values[i]),
            "pos_str": [export.token(t) for t in found.promoted[i]],
            "pos_values": digits(found.promoted_values[i]),
            "logits_hist_data_bar_heights": found.histogram[i].tolist(),
            "logits_hist_data_bar_values": digits(
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
        "freq_hist_data_bar_values": digits(values) if fired else [],
    }


def _activations(export: Export, latent: int) -> Iterator[dict]:
    """Yields the examples of a latent: the highest peaks, then those of the intervals."""
    collection = export.collection
    about, top = collection.about, float(collection.max_activation[latent])
    up_to = np.concatenate([[0], np.cumsum(collection.histogram[latent])])
    for group, examples in enumerate(collection.examples(latent)):
        low, high, share = TOP, digits(top), TOP
        if group:
            ends = 1 - np.array([group, group - 1]) / about.intervals
            below, above = np.interp(ends * BINS, np.arange(BINS + 1), up_to)
            low, high = digits(ends * top)
            share = digits((above - below) / about.rows)
        for example in examples:
            shown = np.asarray(example.ids[example.start : example.stop])
            yield {
                "bin_min": low,
                "bin_max": high,
                "bin_contains": share,
                "tokens": [export.token(t) for t in shown.tolist()],
                "values": digits(example.activations),
                "qualifying_token_index": example.peak - example.start,
            }


def shape(collection: Collection) -> tuple[int, int]:
    """Returns how many texts there are, and their length in tokens."""
    return collection.array("tokens").shape


def digits(values):
    """Returns a number, or the list of the numbers of an array (N,), with 5 significant digits."""
    if np.ndim(values):
        return [float(f"{v:.5g}") if v else 0.0 for v in np.asarray(values).tolist()]
    return float(f"{float(values):.5g}")
