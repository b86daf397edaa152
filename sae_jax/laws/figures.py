"""Figures of a fit: its data, its curve with a 95% band, and the points held out."""

from collections.abc import Callable
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sae_jax.errors import choose
from sae_jax.laws import curves, labels
from sae_jax.laws.curves import Band
from sae_jax.laws.fitting import Fit
from sae_jax.laws.holdout import groups
from sae_jax.laws.isoflop import IsoflopFit
from sae_jax.plots import STYLE, log_ticks

FIRST, SECOND = "C0", "C1"  # colours of the style's cycle
_MOST_LINES = 9  # sizes or budgets that get a line


def panels(found: Fit | IsoflopFit, planned: dict | None = None) -> dict[str, Figure]:
    """Draws each panel of a fit as a figure of its own, as report.html shows them.

    Args:
      found: the fit.
      planned: the prediction of `predict.predict`, drawn as a star; None for none.

    Returns:
      The figures by title.
    """
    out = {}
    for panel in _panels(found):
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(4.8, 3.6), layout="constrained")
            panel.draw(figure.subplots(), found, planned)
            out[panel.title] = figure
    return out


def overview(found: Fit | IsoflopFit, planned: dict | None = None) -> Figure:
    """Draws all panels of a fit side by side in one figure, which is saved as fit.png."""
    drawn = _panels(found)
    columns = 2 if len(drawn) in (2, 4) else min(len(drawn), 3)
    rows = -(-len(drawn) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * columns, 3.5 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for panel, one in zip(drawn, axes, strict=True):
            panel.draw(one, found, planned)
            one.set_title(panel.title)
        return figure


def for_paper(found: Fit | IsoflopFit, planned: dict | None = None, panel: str | None = None):
    """Draws one panel of a fit as a figure without a title, in the style that is set.

    Args:
      found: the fit.
      planned: the prediction of `predict.predict`, drawn as a star; None for none.
      panel: one that `check_panel` allows; the law's first by default.

    Returns:
      The figure.
    """
    drawn = {one.name: one for one in _panels(found)}
    figure = Figure(layout="constrained")
    (drawn[panel] if panel else next(iter(drawn.values()))).draw(figure.subplots(), found, planned)
    return figure


def check_panel(found: Fit | IsoflopFit, panel: str | None) -> None:
    """Raises UserError, which names those that there are, unless the fit has such a panel."""
    if panel is not None:
        choose(panel, [one.name for one in _panels(found)], f"--panel of {found.name}")


class _Panel(NamedTuple):
    """A part of a fit's figure: its name for `--panel`, its title, and what draws it on axes."""

    name: str
    title: str
    draw: Callable


def _panels(found: Fit | IsoflopFit) -> list[_Panel]:
    """Returns the panels of a fit, the one that tells most first."""
    optimal = _Panel("optimal", "Compute-optimal size and tokens", _optimal_sizes)
    residuals = _Panel("residuals", "Residuals", _residuals)
    if isinstance(found, IsoflopFit):
        return [
            _Panel("isoflop", "IsoFLOP curves and their minima", _isoflop_curves),
            _Panel("loss", "Loss at the minima", _loss_at_minima),
            optimal,
            _Panel("residuals", "Residuals of the minima", _minima_residuals),
        ]
    if found.law.name == "power":
        return [_Panel("loss", "Loss against compute", _power), residuals]
    if found.law.name == "openai_nk":
        return [
            _Panel("size", "Loss against dictionary size", _by_k),
            _Panel("surface", "L(n, k)", _surface),
            residuals,
        ]
    if found.law.name == "joint":
        size = _Panel("size", "Loss against dictionary size, most tokens", _by_k)
    else:
        size = _Panel("size", "Loss against dictionary size, by budget", _by_budget)
    if found.frontier is None:
        return [size, residuals]
    return [_Panel("loss", "Loss against compute", _by_size), optimal, size, residuals]


def _log_axes(axes, x: str, y: str) -> None:
    """Makes both axes logarithmic and labels them."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    log_ticks(axes.xaxis)
    log_ticks(axes.yaxis)


def _compute(found) -> str:
    """Returns the label of the axis of compute."""
    if "flops" in found.results.columns:
        return labels.axis("flops")
    return "compute (latents × tokens)"


def _loss(found) -> str:
    """Returns the label of the axis of losses."""
    return labels.axis(found.results.loss_column)


def _colour_scale(axes, values: np.ndarray, label: str):
    """Adds a colour bar for `values` and returns the function from value to colour."""
    low, high = values.min(), values.max()
    norm = LogNorm(low, high if high > low else low * 1.01)
    colours = _colour_map()
    bar = axes.figure.colorbar(
        matplotlib.cm.ScalarMappable(norm, colours), ax=axes, pad=0.02, aspect=30
    )
    bar.outline.set_visible(False)
    log_ticks(bar.ax.yaxis)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label(label)
    return lambda value: colours(norm(value))


def _colour_map():
    """Returns the style's colours for numbers (image.cmap): viridis unless a user's says others."""
    return matplotlib.colormaps[matplotlib.rcParams["image.cmap"]]


def _ink() -> str:
    """Returns the style's colour of lines that stand for no value."""
    return matplotlib.rcParams["text.color"]


def _coarse_groups(values: np.ndarray) -> np.ndarray:
    """Returns the group (N,) of each value; groups are so coarse that there are at most
    `_MOST_LINES`.
    """
    tolerance = 0.02
    while (group := groups(values, tolerance)).max() >= _MOST_LINES:
        tolerance *= 1.5
    return group


def _draw_points(axes, x, y, colour, held) -> None:
    """Draws points, those held out as open circles."""
    style = {"s": 14, "linewidths": 0.8, "zorder": 3}
    colour = np.asarray(colour)
    axes.scatter(x[~held], y[~held], color=colour[~held], **style)
    axes.scatter(x[held], y[held], facecolors="none", edgecolors=colour[held], **style)


def _held_out(found: Fit) -> np.ndarray:
    """Returns a mask (N,) of the points that are held out."""
    out = np.zeros(len(found.results), bool)
    out[found.held] = True
    return out


def _draw_band(axes, x, band: Band, colour=None, label=None) -> None:
    """Draws a curve and its band."""
    colour = colour or _ink()
    axes.plot(x, band.at, color=colour, label=label, zorder=4)
    axes.fill_between(x, band.low, band.high, color=colour, alpha=0.15, linewidth=0, zorder=1)


def _draw_planned(axes, x: str, y: str, planned: dict | None) -> None:
    """Marks the planned run with a star, and with the interval of its loss."""
    if not planned or planned.get(x) is None or planned.get(y) is None:
        return
    if y == "loss":
        low, high = planned["interval"]
        error = [[max(planned[y] - low, 0)], [max(high - planned[y], 0)]]
        axes.errorbar(planned[x], planned[y], error, color=SECOND, capsize=2, linewidth=1)
    axes.plot(planned[x], planned[y], "*", color=SECOND, markersize=10, zorder=5, label="planned")


def _draw_legend(axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")


def _by_size(axes, found: Fit, planned) -> None:
    """Draws loss against compute: a line for each dictionary size, and the frontier."""
    columns, loss = found.results.columns, found.results.loss
    n, tokens, compute = columns["d_sae"], columns["tokens"], found.results.compute
    colour = _colour_scale(axes, n, labels.axis("d_sae"))
    _draw_points(axes, compute, loss, [colour(size) for size in n], _held_out(found))
    group = _coarse_groups(n)
    for line in range(group.max() + 1):
        of = group == line
        size = np.exp(np.log(n[of]).mean())
        data = np.geomspace(tokens[of].min(), tokens[of].max(), 50)
        at = {"d_sae": np.full(50, size), "tokens": data}
        if found.k is not None:
            at["k"] = np.full(50, found.k)
        cost = found.frontier.cost.flops(size, data)
        axes.plot(cost, found.estimate.loss(at), color=colour(size), linewidth=0.9, alpha=0.8)
    budgets = curves.budgets(compute, planned)
    label = "frontier" if found.k is None else f"frontier at k = {found.k:.3g}"
    band = curves.along_compute(found, budgets)["loss"]
    _draw_band(axes, budgets, band, label=f"{label}, 95% band")
    _draw_planned(axes, "flops", "loss", planned)
    _log_axes(axes, _compute(found), _loss(found))
    _draw_legend(axes)


def _power(axes, found: Fit, planned) -> None:
    """Draws loss against compute with the power law."""
    compute, loss = found.results.compute, found.results.loss
    _draw_points(axes, compute, loss, [FIRST] * len(loss), _held_out(found))
    budgets = curves.budgets(compute, planned)
    band = curves.along_compute(found, budgets)["loss"]
    _draw_band(axes, budgets, band, label="fit, 95% band")
    _draw_planned(axes, "flops", "loss", planned)
    _log_axes(axes, _compute(found), _loss(found))
    _draw_legend(axes)


def _optimal_sizes(axes, found: Fit | IsoflopFit, planned) -> None:
    """Draws n* and D* against compute."""
    isoflop = isinstance(found, IsoflopFit)
    budgets = curves.budgets(found.minima.flops if isoflop else found.results.compute, planned)
    bands = curves.along_compute(found, budgets)
    for i, (name, colour) in enumerate((("d_sae", FIRST), ("tokens", SECOND))):
        if isoflop:
            best = np.exp(found.minima.log[:, i])
            axes.scatter(found.minima.flops, best, s=14, color=colour, zorder=3)
        exponent = np.polyfit(np.log(budgets), np.log(bands[name].at), 1)[0]
        label = f"{labels.short(name)}, exponent {exponent:.3f}"
        _draw_band(axes, budgets, bands[name], colour, label)
        if planned and planned.get(name):
            axes.plot(planned["flops"], planned[name], "*", color=colour, markersize=10, zorder=5)
    _log_axes(axes, _compute(found), f"{labels.short('d_sae')}, tokens")
    _draw_legend(axes)


def _by_budget(axes, found: Fit, planned) -> None:
    """Draws the law at some budgets, with the runs near them."""
    columns, compute = found.results.columns, found.results.compute
    n = columns["d_sae"]
    colour = _colour_scale(axes, compute, _compute(found))
    group = _coarse_groups(compute)
    _draw_points(axes, n, found.results.loss, [colour(c) for c in compute], _held_out(found))
    sizes = curves.log_range(n)
    for line in range(group.max() + 1):
        budget = np.exp(np.log(compute[group == line]).mean())
        cost = found.frontier.cost.flops(sizes, 1) if found.frontier else sizes
        data = budget / cost
        seen = (data >= columns["tokens"].min() / 3) & (data <= columns["tokens"].max() * 3)
        at = {"d_sae": sizes[seen], "tokens": data[seen]}
        if seen.sum() > 1:
            axes.plot(sizes[seen], found.estimate.loss(at), color=colour(budget), linewidth=0.9)
    if found.frontier is not None:
        best = found.frontier.at(curves.log_range(compute))
        axes.plot(best["d_sae"], best["loss"], color=_ink(), linestyle="--")
    axes.set_xlim(sizes[0] / 1.2, sizes[-1] * 1.2)
    _log_axes(axes, labels.axis("d_sae"), _loss(found))


def _by_k(axes, found: Fit, planned) -> None:
    """Draws loss against size with a line for each k; of the joint law, for the runs of most
    tokens.
    """
    columns, loss = found.results.columns, found.results.loss
    colour = _colour_scale(axes, columns["k"], labels.axis("k"))
    shown = np.ones(len(loss), bool)
    if "tokens" in found.law.columns:
        shown = columns["tokens"] >= 0.999 * columns["tokens"].max()
    colours = np.array([colour(k) for k in columns["k"]])
    _draw_points(
        axes, columns["d_sae"][shown], loss[shown], colours[shown], _held_out(found)[shown]
    )
    for at, band in curves.along_size(found):
        _draw_band(axes, at["d_sae"], band, colour(at["k"][0]))
    _log_axes(axes, labels.axis("d_sae"), _loss(found))


def _surface(axes, found: Fit, planned) -> None:
    """Draws the loss as a surface over d_sae and k."""
    columns = found.results.columns
    n, k = np.meshgrid(curves.log_range(columns["d_sae"]), curves.log_range(columns["k"]))
    loss = found.estimate.loss({"d_sae": n.ravel(), "k": k.ravel()}).reshape(n.shape)
    filled = axes.contourf(n, k, loss, 24, cmap=_colour_map())
    filled.set_rasterized(True)
    lines = axes.contour(n, k, loss, 8, colors="white", linewidths=0.6)
    axes.clabel(lines, fontsize=7, fmt="%.3g")
    axes.scatter(
        columns["d_sae"], columns["k"], s=10, color="white", edgecolors=_ink(), linewidths=0.6
    )
    axes.figure.colorbar(filled, ax=axes, pad=0.02, aspect=30).set_label(_loss(found))
    _log_axes(axes, labels.axis("d_sae"), labels.axis("k"))


def _residuals(axes, found: Fit, planned) -> None:
    """Draws residuals against the fitted loss; those of held-out points are by the fit without
    them.
    """
    expected = curves.expected(found)
    percent = 100 * (found.results.loss / expected - 1)
    held = _held_out(found)
    axes.axhline(0, color=_ink(), linewidth=0.7)
    axes.scatter(expected[~held], percent[~held], s=12, color=FIRST, label="fitted")
    if held.any():
        axes.scatter(
            expected[held],
            percent[held],
            s=14,
            facecolors="none",
            edgecolors=SECOND,
            linewidths=0.9,
            label="held out, by the fit without them",
        )
    _residual_axes(axes, f"expected {labels.short(found.results.loss_column)}")


def _residual_axes(axes, x: str, y: str = "seen over expected, %") -> None:
    axes.set_xscale("log")
    log_ticks(axes.xaxis)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _draw_legend(axes)


def _isoflop_curves(axes, found: IsoflopFit, planned) -> None:
    """Draws the runs of each budget, the parabola through them and its minimum."""
    flops = np.array([curve.flops for curve in found.minima.curves])
    colour = _colour_scale(axes, flops, _compute(found))
    for curve in found.minima.curves:
        own = colour(curve.flops)
        n, loss = np.exp(curve.log_n), np.exp(curve.log_loss)
        axes.plot(n, loss, color=own, linewidth=0.5, alpha=0.5)
        _draw_points(axes, n, loss, [own] * len(n), ~curve.near)
        near = np.linspace(curve.log_n[curve.near][0], curve.log_n[curve.near][-1], 60)
        style = "-" if curve.rejected is None else ":"
        axes.plot(
            np.exp(near), np.exp(curve.fitted(near)), color=own, linewidth=1.1, linestyle=style
        )
    best = np.exp(found.minima.log)
    axes.plot(best[:, 0], best[:, 2], "x", color=_ink(), markersize=6, zorder=5, label="minimum")
    _log_axes(axes, labels.axis("d_sae"), _loss(found))
    _draw_legend(axes)


def _loss_at_minima(axes, found: IsoflopFit, planned) -> None:
    """Draws the power law of the losses at the minima."""
    budgets = curves.budgets(found.minima.flops, planned)
    held = np.isin(found.minima.flops, found.holdout["flops"])
    loss = np.exp(found.minima.log[:, 2])
    _draw_points(axes, found.minima.flops, loss, [FIRST] * len(loss), held)
    label = f"exponent {found.theta[2, 1]:.3f}, 95% band"
    _draw_band(axes, budgets, curves.along_compute(found, budgets)["loss"], label=label)
    _draw_planned(axes, "flops", "loss", planned)
    _log_axes(axes, _compute(found), _loss(found))
    _draw_legend(axes)


def _minima_residuals(axes, found: IsoflopFit, planned) -> None:
    """Draws how far the minima lie from their power laws."""
    axes.axhline(0, color=_ink(), linewidth=0.7)
    expected = found.at(found.minima.flops)
    for i, name, colour in ((0, "d_sae", FIRST), (2, "loss", SECOND)):
        percent = 100 * (np.exp(found.minima.log[:, i]) / expected[:, i] - 1)
        axes.plot(found.minima.flops, percent, "o", markersize=4, color=colour, label=name)
    _residual_axes(axes, _compute(found), "at the minimum over expected, %")
