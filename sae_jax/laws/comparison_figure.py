"""Draws a comparison of groups of runs: one metric against another, with each group's frontier."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sae_jax.laws import labels
from sae_jax.plots import log_ticks, plain
from sae_jax.tables import as_number

_MARKERS = "osD^vPX*"  # so that groups are told apart without colours too
_DASHES = ("-", "--", ":")


def draw(compared) -> Figure:
    """Draws a `comparison.Comparison` in the style that is set.

    Settings on a group's frontier are joined by a line, with bars of one standard deviation over
    seeds; the others are faint.
    """
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for group, (colour, marker, dash) in _looks(compared).items():
        of_group = [setting for setting in compared.settings if setting.group == group]
        for on_frontier in (False, True):
            these = [setting for setting in of_group if setting.on_frontier == on_frontier]
            if not these:
                continue
            x, y = ([getattr(s, axis).mean() for s in these] for axis in "xy")
            bars = [
                [getattr(s, axis).std(ddof=1) if len(s.x) > 1 else 0.0 for s in these]
                for axis in "yx"
            ]
            if on_frontier:
                label = plain(group) if group else None
                look = {"linestyle": dash, "label": label, "zorder": 3}
            else:
                look = {"linestyle": "none", "alpha": 0.3, "zorder": 2}
            axes.errorbar(
                x, y, *bars, color=colour, marker=marker, markersize=3.5, elinewidth=0.8, **look
            )
    xs, ys = (np.concatenate([getattr(s, axis) for s in compared.settings]) for axis in "xy")
    axes.set_xlabel(labels.axis(compared.x))
    axes.set_ylabel(labels.axis(compared.y))
    if (xs > 0).all():
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
    if compared.best == "low" and (ys > 0).all():
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    if any(compared.groups):
        axes.legend(loc="best")
    return figure


def _looks(compared) -> dict[str, tuple]:
    """Returns (colour, marker, dash) by group: the first of the columns that make the groups
    decides the colour, the others marker and dash.

    Colours are the style's cycle; for more than two numbers they are along the style's scale.
    """
    keys = {s.group: tuple(s.cells[name] for name in compared.by) for s in compared.settings}
    keys = {group: keys[group] for group in compared.groups}
    firsts = list(dict.fromkeys(key[:1] for key in keys.values()))
    others = list(dict.fromkeys(key[1:] for key in keys.values()))
    colours = [f"C{number}" for number in range(len(firsts))]
    if len(firsts) > 2 and all(as_number(value) is not None for (value,) in firsts):
        scale = matplotlib.colormaps[matplotlib.rcParams["image.cmap"]]
        colours = [scale(place) for place in np.linspace(0, 0.9, len(firsts))]
    looks = {}
    for group, key in keys.items():
        first, other = firsts.index(key[:1]), others.index(key[1:])
        marker = other if len(others) > 1 else first
        dash = other + first // len(matplotlib.rcParams["axes.prop_cycle"])
        looks[group] = (
            colours[first],
            _MARKERS[marker % len(_MARKERS)],
            _DASHES[dash % len(_DASHES)],
        )
    return looks
