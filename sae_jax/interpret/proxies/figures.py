"""Figures of how specific latents are: one for each concept, and one of all beside neurons."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sae_jax.interpret.proxies.concepts import Concept
from sae_jax.interpret.proxies.units import BANDS, BINS, Unit
from sae_jax.plots import BLUE, INK, ORANGE, STYLE, plain

_OUTSIDE = "#b9bcc0"
_MOST_BARS = 40  # concepts in the figure of all


def of_concept(concept: Concept) -> Figure:
    """Draws a concept's best latent: its activations coloured by the proxy, the same weighted by
    activation (the expected value), the share inside by activation, and what it does to the output
    where that is known.
    """
    unit = concept.latents[0]
    panels = [_histogram, _expected_value, _bands]
    panels += [_logit_weights] if concept.logit_weights else []
    panels += [_steering] if concept.steering else []
    columns = 2 if len(panels) in (2, 4) else 3
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * columns, 0.4 + 2.5 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for panel, one in zip(panels, axes, strict=False):
            panel(one, concept, unit)
        for one in list(axes)[len(panels) :]:
            one.set_visible(False)
        figure.suptitle(plain(f"{concept.name}: latent {unit.unit}"), x=0.01, ha="left", size=11)
    return figure


def of_all(concepts: list[Concept]) -> Figure:
    """Draws the correlation with the proxy of the best latent of each concept, beside the best
    neuron and the most that a perfect latent of the concept's documents reaches.
    """
    shown = [c for c in concepts if c.latents and c.latents[0].pearson is not None]
    shown = sorted(shown, key=lambda c: -c.latents[0].pearson)[:_MOST_BARS][::-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 1.0 + 0.21 * max(len(shown), 1)), layout="constrained")
        axes = figure.subplots()
        for place, concept in enumerate(shown):
            last = place == len(shown) - 1
            axes.barh(place, concept.latents[0].pearson, 0.7, color=BLUE,
                      label="best latent" if last else None)  # fmt: skip
        for values, mark, colour, label in (
            ([c.neuron and c.neuron.pearson for c in shown], "o", ORANGE, "best neuron"),
            ([c.ceiling and c.ceiling.pearson for c in shown], "|", INK, "perfect latent"),
        ):
            points = [(value, place) for place, value in enumerate(values) if value is not None]
            if points:
                axes.plot(*zip(*points, strict=True), mark, color=colour, ms=7, label=label)
        axes.set_yticks(range(len(shown)), [plain(concept.name) for concept in shown])
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.6, max(len(shown), 1) - 0.4)
        axes.set_xlabel("Pearson correlation with the proxy")
        if shown:
            figure.legend(loc="outside upper center", ncols=3)
    return figure


def _edges(unit: Unit, count: int = BINS) -> np.ndarray:
    return np.linspace(0, unit.high or 1, count + 1)


def _stacked(axes, edges, inside, outside) -> None:
    """Draws two histograms on top of each other, what is inside the concept below."""
    inside, outside = np.asarray(inside, float), np.asarray(outside, float)
    axes.stairs(inside, edges, fill=True, color=BLUE, label="inside the concept")
    axes.stairs(
        inside + outside, edges, baseline=inside, fill=True, color=_OUTSIDE, label="outside"
    )


def _histogram(axes, concept: Concept, unit: Unit) -> None:
    _stacked(axes, _edges(unit), unit.inside, unit.outside)
    axes.set_title("Tokens by activation")
    axes.set_xlabel("activation")
    axes.set_yscale("symlog", linthresh=10)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, 20 * max(i + o for i, o in zip(unit.inside, unit.outside, strict=True)) + 10)
    axes.legend(loc="upper left")  # in the room above


def _expected_value(axes, concept: Concept, unit: Unit) -> None:
    _stacked(axes, _edges(unit), unit.mass_inside, unit.mass_outside)
    share = "" if unit.mass is None else f", {unit.mass:.0%} inside"
    axes.set_title(f"Activation mass{share}")
    axes.set_xlabel("activation")


def _bands(axes, concept: Concept, unit: Unit) -> None:
    edges = _edges(unit, BANDS)
    there = [i for i, share in enumerate(unit.bands) if share is not None]
    middles = (edges[1:] + edges[:-1]) / 2
    axes.plot(middles[there], [unit.bands[i] for i in there], "o-", ms=3)
    axes.axhline(concept.share, color=INK, linewidth=0.7, linestyle=":")
    axes.set_ylim(0, 1.02)
    axes.set_title("Share inside by activation")
    axes.set_xlabel("activation (dotted: of all tokens)")


def _logit_weights(axes, concept: Concept, unit: Unit) -> None:
    weights = concept.logit_weights
    for counts, total, colour, label in (
        (weights.counts_outside, weights.others, _OUTSIDE, "others"),
        (weights.counts_inside, weights.tokens, BLUE, "tokens of the concept"),
    ):
        share = np.asarray(counts) / max(total, 1)
        axes.stairs(share, weights.edges, fill=True, color=colour, alpha=0.7, label=label)
    axes.set_title("Logit weights")
    axes.set_xlabel("logit weight, median 0")
    axes.set_ylabel("share of tokens")
    axes.legend()


def _steering(axes, concept: Concept, unit: Unit) -> None:
    pushes = dict.fromkeys(one.push for one in concept.steering if one.factor)
    untouched = [one for one in concept.steering if not one.factor]
    for push, colour in zip(pushes, (BLUE, ORANGE), strict=False):
        points = [*untouched, *(one for one in concept.steering if one.push == push)]
        axes.plot(
            [one.factor for one in points], [one.tokens for one in points],
            "o-", ms=3, color=colour, label=push,
        )  # fmt: skip
    axes.set_ylim(0, 1.02)
    axes.set_title("Share inside of what is written")
    axes.set_xlabel("times the maximum")
    axes.legend()
