"""Measures how specific the latents of an SAE are for concepts that simple rules can tell
(Bricken et al. 2023, "Towards Monosemanticity").

For each proxy the latents, and the neurons of the site, that go with it best are found on one half
of the text and measured on the other.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sae_jax import lm
from sae_jax.activations import Store
from sae_jax.errors import UserError, choose
from sae_jax.evaluate.sources import HeldOutRows, ModelRows
from sae_jax.interpret.activity import Activity
from sae_jax.interpret.proxies.bank import Bank, Proxy, of_documents
from sae_jax.interpret.proxies.concepts import (
    SPECIFIC,
    Ceiling,
    Concept,
    Partner,
    Specificity,
)
from sae_jax.interpret.proxies.influence import logit_weights, steered
from sae_jax.interpret.proxies.labels import DocumentLabels
from sae_jax.interpret.proxies.neurons import Neurons
from sae_jax.interpret.proxies.units import Halves, Unit, correlations, latents_inside, measured
from sae_jax.sae import SAE

FEWEST = 100
"""Tokens inside a concept, in each half, without which no latent is looked for."""
_CONCEPTS = 32  # whose neurons' values are in memory together
_MOSTLY = 0.5  # of a label's tokens are inside a concept that the label is counted to


def specificity(
    activity: Activity,
    tokenizer: lm.Tokenizer,
    proxies: Sequence[str] = ("scripts", "alphabets", "patterns", "documents"),
    *,
    neurons: Activity | HeldOutRows | ModelRows | Store | str | os.PathLike | None = None,
    other: Activity | None = None,
    controls: Mapping[str, Activity] | None = None,
    labels: DocumentLabels | None = None,
    sae: SAE | None = None,
    model: lm.LanguageModel | None = None,
    steer: Sequence[str] = (),
    factors: Sequence[float] = (2, 5, 10),
    best: int = 5,
    inherit: bool = False,
    fewest: int = FEWEST,
) -> Specificity:
    """Returns how well latents tell concepts, beside neurons, another SAE and the proxies' own
    limits.

    Args:
      activity: where the latents are active.
      tokenizer: the tokenizer of its text.
      proxies: groups of proxies (`GROUPS`), names of single ones, or NAME=REGEX for one's own.
        Without labels, the group documents is empty.
      neurons: the neurons of the site: rows of the store that the activity was recorded of, or the
        model on its text, whose values count with both signs; or an activity of neurons on the same
        text.
      other: the activity of another SAE on the same text.
      controls: activities of units that should mean nothing, on the same text, by name, such as
        random directions: of bytes that a model never saw, these may tell a script as well.
      labels: the labels of the text's documents (`document_labels`).
      sae: the SAE, for logit weights and steering.
      model: its language model, for the same.
      steer: names of concepts for which the model writes with the best latent set to multiples of
        its maximum.
      factors: the multiples.
      best: how many latents of each concept are measured.
      inherit: whether common characters, such as spaces, have the script of their neighbours.
      fewest: the tokens of each half inside a concept for which latents are looked for.

    Raises UserError for a proxy that there is not, where neurons or the other activity are of
    another text, and where steering is asked for without an SAE and a model.
    """
    if steer and (sae is None or model is None):
        raise UserError("steering needs the SAE and its language model; give both")
    controls = dict(controls or {})
    for beside in (neurons, other, *controls.values()):
        if isinstance(beside, Activity):
            _check_text(beside, activity)
    own = dict(name.split("=", 1) for name in proxies if "=" in name)
    wanted = [name.split("=", 1)[0] for name in proxies]
    bank = Bank(tokenizer, activity.tokens, activity.used, wanted, patterns=own, inherit=inherit)
    found = bank.of(activity.tokens)
    if labels is not None and "documents" in wanted:
        found += of_documents(labels)
    scripts = {name.removesuffix(" script"): name for name in bank.names}
    steer = [choose(scripts.get(n, n), bank.names, "a concept to steer to") for n in steer]
    search = _Search(activity, found, labels, best, fewest)
    concepts = search.concepts()
    if neurons is not None:
        if not isinstance(neurons, Activity):
            neurons = Neurons(neurons, activity)
        concepts = search.beside_neurons(concepts, neurons)
    if other is not None:
        concepts = search.beside_other(concepts, other)
    for name, control in controls.items():
        concepts = search.beside_control(concepts, name, control)
    if sae is not None and model is not None:
        concepts = search.with_logit_weights(concepts, sae, model)
    for place, concept in enumerate(concepts):
        if concept.name in steer and concept.latents:
            latent = concept.latents[0].unit
            written = steered(sae, model, activity, latent, bank, concept.name, factors=factors)
            concepts[place] = dataclasses.replace(concept, steering=written)
    settings = {
        **activity.about.settings,
        "d_sae": activity.d_sae,
        "tokens_found_on": int(search.halves.found.sum()),
        "tokens_measured_on": int(search.halves.tested.sum()),
        "common_characters_inherit": inherit,
        "fewest_tokens": fewest,
    }
    return Specificity(settings, concepts)


class _Search:
    """The proxies of a text, and what is measured of them."""

    def __init__(
        self,
        activity: Activity,
        proxies: list[Proxy],
        labels: DocumentLabels | None,
        best: int,
        fewest: int,
    ):
        self.activity, self.proxies, self.labels = activity, proxies, labels
        self.best, self.fewest, self.halves = best, fewest, Halves.of(activity)

    def concepts(self) -> list[Concept]:
        """Returns the concepts with their best latents."""
        looked_for = [proxy for proxy in self.proxies if self._is_frequent(proxy)]
        chosen = self._best(self.activity, looked_for, self.best)
        masks = [proxy.inside.reshape(-1) for proxy in self.proxies]
        inside_of = latents_inside(self.activity, masks, self.halves.tested)
        found = []
        for proxy, within in zip(self.proxies, inside_of.tolist(), strict=True):
            inside = proxy.inside.reshape(-1)[self.halves.tested]
            latents = [self._unit(self.activity, proxy, i) for i in chosen.get(proxy.name, [])]
            said = (
                self._said(latents)
                if proxy.name in chosen
                else (f"too little text: {int(inside.sum()):,} tokens of it")
            )
            found.append(
                Concept(
                    proxy.name,
                    proxy.kind,
                    int(inside.sum()),
                    float(inside.mean()) if len(inside) else 0.0,
                    said,
                    latents,
                    within,
                    self._ceiling(proxy),
                )
            )
        return found

    def beside_neurons(self, concepts: list[Concept], neurons: Activity | Neurons) -> list[Concept]:
        """Returns the concepts with the best neuron of each, and that of its best latent."""
        concepts, places = list(concepts), [i for i, c in enumerate(concepts) if c.latents]
        if not places:
            return concepts
        firsts = [concepts[i].latents[0].unit for i in places]
        halves, count = (self.halves.found, self.halves.tested), len(places)
        if isinstance(neurons, Activity):
            targets = [self.proxies[i].values.reshape(-1) for i in places]
            targets += [self.activity.dense(unit).reshape(-1) for unit in firsts]
            found, tested = (correlations(neurons, targets, half) for half in halves)
            size = found
        else:
            targets = [_part_of(self.proxies[i].values) for i in places]
            targets += [_part_of_events(*self.activity.of(unit)) for unit in firsts]
            found, tested = neurons.correlations(targets, halves)
            size = np.abs(found)
        units = np.argmax(np.where(np.isnan(size), -1, size), axis=1)
        signs = np.where(found[np.arange(len(units)), units] < 0, -1, 1)
        for at in range(0, count, _CONCEPTS):
            chosen = range(at, min(at + _CONCEPTS, count))
            if isinstance(neurons, Activity):
                values = [neurons.dense(int(units[i])).reshape(-1) for i in chosen]
            else:
                values = neurons.values(units[chosen.start : chosen.stop].tolist())
            for i, own in zip(chosen, values, strict=True):
                partner = units[count + i]
                concepts[places[i]] = dataclasses.replace(
                    concepts[places[i]],
                    neuron=self._neuron(self.proxies[places[i]], units[i], signs[i], own),
                    neuron_of_latent=Partner(int(partner), _number(tested[count + i, partner])),
                )
        return concepts

    def beside_other(self, concepts: list[Concept], other: Activity) -> list[Concept]:
        """Returns the concepts with the latent of another SAE that goes with the best of each."""
        places = [i for i, concept in enumerate(concepts) if concept.latents]
        dense = [self.activity.dense(concepts[i].latents[0].unit).reshape(-1) for i in places]
        found = correlations(other, dense, self.halves.found)
        tested, concepts = correlations(other, dense, self.halves.tested), list(concepts)
        for place, row, together in zip(places, found, tested, strict=True):
            unit = int(np.argmax(np.where(np.isnan(row), -1, row)))
            concepts[place] = dataclasses.replace(
                concepts[place], other=Partner(unit, _number(together[unit]))
            )
        return concepts

    def beside_control(
        self, concepts: list[Concept], name: str, control: Activity
    ) -> list[Concept]:
        """Returns the concepts with the best unit of a control."""
        looked_for = [p for p, c in zip(self.proxies, concepts, strict=True) if c.latents]
        chosen = self._best(control, looked_for, 1)
        concepts = list(concepts)
        for place, proxy in enumerate(self.proxies):
            if best := chosen.get(proxy.name):
                unit = self._unit(control, proxy, best[0])
                controls = concepts[place].controls | {name: unit}
                concepts[place] = dataclasses.replace(concepts[place], controls=controls)
        return concepts

    def with_logit_weights(
        self, concepts: list[Concept], sae: SAE, model: lm.LanguageModel
    ) -> list[Concept]:
        """Returns the concepts with the logit weights of the best latent of each."""
        places = [i for i, concept in enumerate(concepts) if concept.latents]
        latents = [concepts[i].latents[0].unit for i in places]
        inside = [self.proxies[i].inside for i in places]
        weights = logit_weights(sae, model, self.activity, latents, inside)
        concepts = list(concepts)
        for place, found in zip(places, weights, strict=True):
            concepts[place] = dataclasses.replace(concepts[place], logit_weights=found)
        return concepts

    def _is_frequent(self, proxy: Proxy) -> bool:
        inside = proxy.inside.reshape(-1)
        halves = (self.halves.found, self.halves.tested)
        return all((inside & half).sum() >= self.fewest for half in halves)

    def _best(self, activity: Activity, proxies: list[Proxy], count: int) -> dict[str, list[int]]:
        """Returns the units that go best with each proxy on the half for finding."""
        targets = [proxy.values.reshape(-1) for proxy in proxies]
        found = correlations(activity, targets, self.halves.found)
        chosen = {}
        for proxy, row in zip(proxies, found, strict=True):
            order = np.argsort(-np.where(np.isnan(row), -np.inf, row), kind="stable")
            chosen[proxy.name] = [int(i) for i in order[:count] if row[i] > 0]
        return chosen

    def _unit(self, activity: Activity, proxy: Proxy, unit: int) -> Unit:
        rows, values = activity.of(unit)
        return measured(unit, rows, values, proxy, self.halves, **self._documents(proxy))

    def _neuron(self, proxy: Proxy, unit: int, sign: int, values: np.ndarray) -> Unit:
        values = values * sign
        rows = np.flatnonzero((values > 0) & self.activity.used.reshape(-1))
        return measured(
            unit, rows, values[rows], proxy, self.halves,
            sign=sign, below=values, **self._documents(proxy),
        )  # fmt: skip

    @staticmethod
    def _said(latents: list[Unit]) -> str:
        """Returns in words whether there is a latent for a concept that has enough text."""
        if not latents:
            return "no latent: none goes with it"
        first = latents[0]
        how = f"F1 {first.at_best.f1:.2f}"
        if first.at_best.f1 < SPECIFIC:
            return f"no latent: the best, {first.unit}, has {how}"
        return f"latent {first.unit}, {how}"

    def _documents(self, proxy: Proxy) -> dict[str, np.ndarray]:
        """Returns the tokens and documents of a concept's labels, for `measured`."""
        ours = self._labelled.get(proxy.name)
        if ours is None:
            return {}
        labelled = np.isin(self.labels.codes, ours).reshape(-1)
        return {"labelled": labelled, "documents": self.labels.documents.reshape(-1)}

    @functools.cached_property
    def _labelled(self) -> dict[str, np.ndarray]:
        """The labels of each concept that has any, as codes."""
        if self.labels is None:
            return {}
        count, codes = len(self.labels.names), self.labels.codes
        usable = self.activity.used & (codes >= 0)
        totals = np.bincount(codes[usable], minlength=count)
        by_name = {name.lower(): code for code, name in enumerate(self.labels.names)}
        by_name |= {f"{name} documents": code for name, code in by_name.items()}
        found = {}
        for proxy in self.proxies:
            same = by_name.get(proxy.name.lower())
            hits = np.bincount(codes[usable & proxy.inside], minlength=count)
            mostly = np.flatnonzero(hits > _MOSTLY * totals)
            if same is not None:
                found[proxy.name] = np.array([same])
            elif len(mostly):
                found[proxy.name] = mostly
        return found

    def _ceiling(self, proxy: Proxy) -> Ceiling | None:
        ours = self._labelled.get(proxy.name)
        if ours is None or proxy.kind == "documents":
            return None
        labelled = np.isin(self.labels.codes, ours).reshape(-1)
        rows = np.flatnonzero(labelled & self.activity.used.reshape(-1))
        perfect = measured(-1, rows, np.ones(len(rows)), proxy, self.halves)
        swapped = perfect.above_zero  # of the documents, by the proxy
        return Ceiling(
            [self.labels.names[i] for i in ours],
            perfect.active,
            swapped.recall,
            swapped.precision,
            swapped.f1,
            perfect.pearson,
        )


def _check_text(beside: Activity, activity: Activity) -> None:
    same = beside.tokens.shape == activity.tokens.shape
    if not (same and (beside.tokens == activity.tokens).all()):
        raise UserError(
            f"{beside.path} was recorded on another text than {activity.path}; record both on the "
            "same tokens"
        )


def _part_of(values: np.ndarray) -> Callable[[slice], np.ndarray]:
    return lambda part: values.reshape(-1)[part]


def _part_of_events(rows: np.ndarray, values: np.ndarray) -> Callable[[slice], np.ndarray]:
    """Returns a function that gives a latent's activations on a part of the tokens."""

    def of(part: slice) -> np.ndarray:
        found = np.zeros(part.stop - part.start, np.float32)
        events = slice(*np.searchsorted(rows, [part.start, part.stop]))
        found[rows[events] - part.start] = values[events]
        return found

    return of


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
