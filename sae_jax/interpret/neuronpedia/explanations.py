"""Makes Neuronpedia's explanations and scores of what was said of latents."""

import dataclasses

from sae_jax.interpret.explain.labels import Mark, Said
from sae_jax.interpret.neuronpedia.export import Export

_OURS = "sae_jax"
_SCORE_TYPES = {
    "detection": "eleuther_recall",
    "fuzzing": "eleuther_fuzz",
    "embedding": "eleuther_embedding",
}


@dataclasses.dataclass(frozen=True)
class Named:
    """An explanation with Neuronpedia's names.

    Attributes:
      text: the explanation.
      method: what method made it, or None.
      model: what model wrote it, or None.
      scores: how it is scored, as far as that is defined.
    """

    text: str
    method: str | None
    model: str | None
    scores: list[Mark]


def named(export: Export, latent: int) -> list[Named]:
    """Returns the explanations of a latent: its label first, then all that was said of it."""
    found = []
    if latent in export.labels:
        found.append(Named(export.labels[latent], export.method, export.labeller, []))
    for said in export.explanations.get(latent, ()):
        text = (said.text or "").replace("\0", "").strip()
        if text:
            scores = [mark for mark in said.scores if mark.value is not None]
            found.append(Named(text, _method(said), said.model.lower() or None, scores))
    return found


def score_type(scorer: str) -> str:
    """Returns Neuronpedia's name of a scorer: that of delphi's scorers, which it runs too, or one
    of ours."""
    return _SCORE_TYPES.get(scorer, f"{_OURS}-{scorer}".lower())


def details_of(mark: Mark) -> object:
    """Returns what a score's row tells of it as JSON.

    Neuronpedia's page takes that of delphi's scorers for a list of examples, so there is none of
    these.
    """
    if mark.scorer in _SCORE_TYPES:
        return []
    return {
        "controls": mark.controls,
        "examples": mark.examples,
        "unparsable": mark.unparsable,
    }


def _method(said: Said) -> str:
    return f"{_OURS}-{said.by}-{said.method}".lower()
