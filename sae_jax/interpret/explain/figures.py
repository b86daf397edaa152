"""Draws how explanations score: distributions beside controls, and scores against density."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sae_jax.interpret.explain.comparison import FROM_UNITS, IN_PLACE, Scored
from sae_jax.interpret.explain.doubts import CONTROL_NAMES
from sae_jax.interpret.explain.records import LATENTS, Score
from sae_jax.plots import CYCLE, INK, STYLE, log_ticks

_POINTS = 400  # of a curve
_COLORS = dict(zip((LATENTS, *IN_PLACE, *FROM_UNITS), CYCLE, strict=False))


def scores_of(one: Scored, scores: Sequence[Score]) -> dict[str, dict[int, float]]:
    """Returns the scores by unit of the latents, of what was scored in place of their explanations,
    and of control units, by name."""
    found: dict[str, dict[int, float]] = {}
    for score in scores:
        same = (score.by, score.method, score.scorer) == (one.by, one.method, one.scorer)
        if same and score.value is not None and (score.units == LATENTS or not score.control):
            found.setdefault(score.control or score.units, {})[score.unit] = score.value
    return {name: found[name] for name in _COLORS if name in found}


def distribution(one: Scored, values: Mapping[str, Mapping[int, float]]) -> Figure:
    """Draws, for latents and each control, what share of the units has at least each score.

    values: what `scores_of` returns.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, of in values.items():
            shares = np.linspace(0, 1, min(_POINTS, len(of) + 1))
            ends = np.quantile(list(of.values()), 1 - shares, method="inverted_cdf")
            axes.step(
                ends,
                shares,
                where="pre",
                color=_COLORS[name],
                linewidth=2 if name == LATENTS else 1.2,
                linestyle="--" if name in IN_PLACE else "-",
                label=f"{CONTROL_NAMES.get(name, name)} ({len(of):,})",
            )
        if one.chance is not None:
            axes.axvline(one.chance, color=INK, linewidth=0.7, linestyle=":")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel(f"{one.scorer}, at least")
        axes.set_ylabel("share of the units")
        figure.legend(loc="outside lower left", ncols=1)
        return figure


def against_density(one: Scored, of: Mapping[int, float], density: np.ndarray) -> Figure:
    """Draws the score of each latent against its density (d_sae,)."""
    units = np.array([unit for unit in of if density[unit] > 0], int)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.scatter(
            100 * density[units],
            [of[unit] for unit in units.tolist()],
            s=8,
            alpha=0.6,
            linewidths=0,
            color=_COLORS[LATENTS],
            rasterized=len(units) > _POINTS,
        )
        if one.chance is not None:
            axes.axhline(one.chance, color=INK, linewidth=0.7, linestyle=":")
        axes.set_xscale("log")
        axes.set_xlabel("fires on, % of tokens")
        axes.set_ylabel(one.scorer)
        log_ticks(axes.xaxis)
        return figure
