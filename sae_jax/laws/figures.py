"""Figures of a fit: its data, its curve with a 95% band, and the points held out."""

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from sae_jax.laws.fitting import Fit
from sae_jax.laws.holdout import groups
from sae_jax.laws.isoflop import IsoflopFit
from sae_jax.laws.results import distinct
from sae_jax.plots import BLUE, INK, ORANGE, STYLE, plain

_COLOURS = matplotlib.colormaps["viridis"].resampled(256)
_MOST_LINES = 9  # sizes or budgets that get a line
_DRAWN_BEYOND = 3.0  # times the range of compute that is drawn


def panels(found: Fit | IsoflopFit, planned: dict | None = None) -> dict[str, Figure]:
    """Draws each panel of a fit as a figure of its own, as report.html shows them.

    Args:
      found: the fit.
      planned: the prediction of `predict.predict`, drawn as a star; None for none.

    Returns:
      The figures by title.
    """
    out = {}
    for title, draw in _panels(found):
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(4.8, 3.6), layout="constrained")
            draw(figure.subplots(), found, planned)
            out[title] = figure
    return out


def overview(found: Fit | IsoflopFit, planned: dict | None = None) -> Figure:
    """Draws all panels of a fit side by side in one figure, which is saved as fit.png."""
    drawn = _panels(found)
    columns = 2 if len(drawn) in (2, 4) else min(len(drawn), 3)
    rows = -(-len(drawn) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * columns, 3.5 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for (title, draw), one in zip(drawn, axes, strict=True):
            draw(one, found, planned)
            one.set_title(title)
        return figure


def _panels(found: Fit | IsoflopFit):
    """Returns (title, function that draws it on axes) of every panel of a fit."""
    if isinstance(found, IsoflopFit):
        return [
            ("IsoFLOP curves and their minima", _isoflop_curves),
            ("Loss at the minima", _loss_at_minima),
            ("Compute-optimal size and tokens", _optimal_sizes),
            ("Residuals of the minima", _minima_residuals),
        ]
    if found.law.name == "power":
        return [("Loss against compute", _power), ("Residuals", _residuals)]
    if found.law.name == "openai_nk":
        return [
            ("Loss against dictionary size", _by_k),
            ("L(n, k)", _surface),
            ("Residuals", _residuals),
        ]
    out = []
    if found.frontier is not None:
        out = [
            ("Loss against compute", _by_size),
            ("Compute-optimal size and tokens", _optimal_sizes),
        ]
    if found.law.name == "joint":
        out += [("Loss against dictionary size, most tokens", _by_k)]
    else:
        out += [("Loss against dictionary size, by budget", _by_budget)]
    return [*out, ("Residuals", _residuals)]


def _log_axes(axes, x: str, y: str) -> None:
    """Makes both axes logarithmic, labels them, and thins out their ticks."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    low, high = axes.get_ylim()
    if high / low < 30:  # decades are too far apart to say where one is
        near = high / low < 4
        axes.yaxis.set_major_locator(MaxNLocator(6) if near else LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _compute(found) -> str:
    """Returns the label of the axis of compute."""
    return "compute, FLOPs" if "flops" in found.results.columns else "d_sae × tokens"


def _loss(found) -> str:
    """Returns the label of the axis of losses."""
    return plain(found.results.loss_column)


def _log_range(values: np.ndarray, beyond: float = 1.0, planned: dict | None = None) -> np.ndarray:
    """Returns 100 values, evenly spaced in the logarithm, over the range of `values` and up to
    `beyond` times its end.
    """
    high = values.max() * beyond
    if planned:
        high = max(high, 1.3 * planned["flops"])
    return np.geomspace(values.min(), high, 100)


def _colour_scale(axes, values: np.ndarray, label: str):
    """Adds a colour bar for `values` and returns the function from value to colour."""
    low, high = values.min(), values.max()
    norm = LogNorm(low, high if high > low else low * 1.01)
    bar = axes.figure.colorbar(
        matplotlib.cm.ScalarMappable(norm, _COLOURS), ax=axes, pad=0.02, aspect=30
    )
    bar.outline.set_visible(False)
    if high < 100 * low:
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.set_label(label)
    return lambda value: _COLOURS(norm(value))


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


def _draw_band(axes, x, at, draws, factor, colour=INK, label=None) -> None:
    """Draws a curve and the 95% band of its draws (R, X), of which those that are not finite are
    left out.
    """
    axes.plot(x, at, color=colour, linewidth=1.3, label=label, zorder=4)
    draws = np.log(draws[np.isfinite(draws).all(axis=1)])
    if len(draws):
        low, high = np.percentile(draws, [2.5, 97.5], axis=0) - np.log(at)
        ends = at * np.exp(factor * low), at * np.exp(factor * high)
        axes.fill_between(x, *ends, color=colour, alpha=0.15, linewidth=0, zorder=1)


def _draw_planned(axes, x: str, y: str, planned: dict | None) -> None:
    """Marks the planned run with a star, and with the interval of its loss."""
    if not planned or planned.get(x) is None or planned.get(y) is None:
        return
    if y == "loss":
        low, high = planned["interval"]
        error = [[max(planned[y] - low, 0)], [max(high - planned[y], 0)]]
        axes.errorbar(planned[x], planned[y], error, color=ORANGE, capsize=2, linewidth=1)
    axes.plot(planned[x], planned[y], "*", color=ORANGE, markersize=10, zorder=5, label="planned")


def _draw_legend(axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")


def _by_size(axes, found: Fit, planned) -> None:
    """Draws loss against compute: a line for each dictionary size, and the frontier."""
    columns, loss = found.results.columns, found.results.loss
    n, tokens, compute = columns["d_sae"], columns["tokens"], found.results.compute
    colour = _colour_scale(axes, n, "d_sae")
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
    budgets = _log_range(compute, _DRAWN_BEYOND, planned)
    draws = found.frontiers().at(budgets)["loss"]
    label = "frontier" if found.k is None else f"frontier at k = {found.k:.3g}"
    _draw_band(axes, budgets, found.at(budgets), draws, found.factor, label=f"{label}, 95% band")
    _draw_planned(axes, "flops", "loss", planned)
    _log_axes(axes, _compute(found), _loss(found))
    _draw_legend(axes)


def _power(axes, found: Fit, planned) -> None:
    """Draws loss against compute with the power law."""
    compute, loss = found.results.compute, found.results.loss
    _draw_points(axes, compute, loss, [BLUE] * len(loss), _held_out(found))
    budgets = _log_range(compute, _DRAWN_BEYOND, planned)
    draws = found.at(budgets, found.drawn.theta)
    _draw_band(axes, budgets, found.at(budgets), draws, found.factor, label="fit, 95% band")
    _draw_planned(axes, "flops", "loss", planned)
    _log_axes(axes, _compute(found), _loss(found))
    _draw_legend(axes)


def _optimal_sizes(axes, found: Fit | IsoflopFit, planned) -> None:
    """Draws n* and D* against compute."""
    budgets = _log_range(found.results.compute, _DRAWN_BEYOND, planned)
    if isinstance(found, IsoflopFit):
        at, draws, factor = found.at(budgets), found.at(budgets, found.drawn), 1.0
        curves = [(at[:, i], draws[..., i]) for i in (0, 1)]
        for i, colour in ((0, BLUE), (1, ORANGE)):
            axes.scatter(
                found.minima.flops, np.exp(found.minima.log[:, i]), s=14, color=colour, zorder=3
            )
    else:
        at, draws, factor = found.frontier.at(budgets), found.frontiers().at(budgets), found.factor
        curves = [(at[name], draws[name]) for name in ("d_sae", "tokens")]
    for (line, drawn), colour, name in zip(
        curves, (BLUE, ORANGE), ("d_sae", "tokens"), strict=True
    ):
        exponent = np.polyfit(np.log(budgets), np.log(line), 1)[0]
        _draw_band(axes, budgets, line, drawn, factor, colour, f"{name} ~ C^{exponent:.3f}")
        if planned and planned.get(name):
            axes.plot(planned["flops"], planned[name], "*", color=colour, markersize=10, zorder=5)
    _log_axes(axes, _compute(found), "d_sae, tokens")
    _draw_legend(axes)


def _by_budget(axes, found: Fit, planned) -> None:
    """Draws the law at some budgets, with the runs near them."""
    columns, compute = found.results.columns, found.results.compute
    n = columns["d_sae"]
    colour = _colour_scale(axes, compute, _compute(found))
    group = _coarse_groups(compute)
    _draw_points(axes, n, found.results.loss, [colour(c) for c in compute], _held_out(found))
    sizes = _log_range(n)
    for line in range(group.max() + 1):
        budget = np.exp(np.log(compute[group == line]).mean())
        cost = found.frontier.cost.flops(sizes, 1) if found.frontier else sizes
        data = budget / cost
        seen = (data >= columns["tokens"].min() / 3) & (data <= columns["tokens"].max() * 3)
        at = {"d_sae": sizes[seen], "tokens": data[seen]}
        if seen.sum() > 1:
            axes.plot(sizes[seen], found.estimate.loss(at), color=colour(budget), linewidth=0.9)
    if found.frontier is not None:
        best = found.frontier.at(_log_range(compute))
        axes.plot(best["d_sae"], best["loss"], color=INK, linewidth=1.3, linestyle="--")
    axes.set_xlim(sizes[0] / 1.2, sizes[-1] * 1.2)
    _log_axes(axes, "d_sae", _loss(found))


def _by_k(axes, found: Fit, planned) -> None:
    """Draws loss against size with a line for each k; of the joint law, for the runs of most
    tokens.
    """
    columns, loss = found.results.columns, found.results.loss
    colour = _colour_scale(axes, columns["k"], "k")
    shown = np.ones(len(loss), bool)
    if "tokens" in found.law.columns:
        shown = columns["tokens"] >= 0.999 * columns["tokens"].max()
    colours = np.array([colour(k) for k in columns["k"]])
    _draw_points(
        axes, columns["d_sae"][shown], loss[shown], colours[shown], _held_out(found)[shown]
    )
    sizes = _log_range(columns["d_sae"])
    for k in distinct(columns["k"]):
        at = {"d_sae": sizes, "k": np.full(100, k)}
        if "tokens" in found.law.columns:
            at["tokens"] = np.full(100, columns["tokens"].max())
        axes.plot(sizes, found.estimate.loss(at), color=colour(k), linewidth=1.1)
    _log_axes(axes, "d_sae", _loss(found))


def _surface(axes, found: Fit, planned) -> None:
    """Draws the loss as a surface over d_sae and k."""
    columns = found.results.columns
    n, k = np.meshgrid(_log_range(columns["d_sae"]), _log_range(columns["k"]))
    loss = found.estimate.loss({"d_sae": n.ravel(), "k": k.ravel()}).reshape(n.shape)
    filled = axes.contourf(n, k, loss, 24, cmap=_COLOURS)
    filled.set_rasterized(True)
    lines = axes.contour(n, k, loss, 8, colors="white", linewidths=0.6)
    axes.clabel(lines, fontsize=7, fmt="%.3g")
    axes.scatter(
        columns["d_sae"], columns["k"], s=10, color="white", edgecolors=INK, linewidths=0.6
    )
    axes.figure.colorbar(filled, ax=axes, pad=0.02, aspect=30).set_label(_loss(found))
    _log_axes(axes, "d_sae", "k")


def _residuals(axes, found: Fit, planned) -> None:
    """Draws residuals against the fitted loss; those of held-out points are by the fit without
    them.
    """
    fitted = found.estimate.loss(found.results.columns)
    percent = 100 * (found.results.loss / fitted - 1)
    held = _held_out(found)
    axes.axhline(0, color=INK, linewidth=0.7)
    axes.scatter(fitted[~held], percent[~held], s=12, color=BLUE, label="fitted")
    if held.any():
        theta = found.law.internal(found.holdout["params"])
        out = found.results.take(held)
        expected = np.exp(found.law.log_loss(theta, out.columns))
        axes.scatter(
            expected,
            100 * (out.loss / expected - 1),
            s=14,
            facecolors="none",
            edgecolors=ORANGE,
            linewidths=0.9,
            label="held out, by the fit without them",
        )
    _residual_axes(axes, f"expected {_loss(found)}")


def _residual_axes(axes, x: str, y: str = "seen over expected, %") -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(MaxNLocator(6) if high / low < 4 else LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
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
    axes.plot(best[:, 0], best[:, 2], "x", color=INK, markersize=6, zorder=5, label="minimum")
    _log_axes(axes, "d_sae", _loss(found))
    _draw_legend(axes)


def _loss_at_minima(axes, found: IsoflopFit, planned) -> None:
    """Draws the power law of the losses at the minima."""
    budgets = _log_range(found.minima.flops, _DRAWN_BEYOND, planned)
    held = np.isin(found.minima.flops, found.holdout["flops"])
    loss = np.exp(found.minima.log[:, 2])
    _draw_points(axes, found.minima.flops, loss, [BLUE] * len(loss), held)
    draws = found.at(budgets, found.drawn)[..., 2]
    label = f"L* ~ C^{found.theta[2, 1]:.3f}, 95% band"
    _draw_band(axes, budgets, found.at(budgets)[:, 2], draws, 1.0, label=label)
    _draw_planned(axes, "flops", "loss", planned)
    _log_axes(axes, _compute(found), _loss(found))
    _draw_legend(axes)


def _minima_residuals(axes, found: IsoflopFit, planned) -> None:
    """Draws how far the minima lie from their power laws."""
    axes.axhline(0, color=INK, linewidth=0.7)
    expected = found.at(found.minima.flops)
    for i, name, colour in ((0, "d_sae", BLUE), (2, "loss", ORANGE)):
        percent = 100 * (np.exp(found.minima.log[:, i]) / expected[:, i] - 1)
        axes.plot(found.minima.flops, percent, "o", markersize=4, color=colour, label=name)
    _residual_axes(axes, _compute(found), "at the minimum over expected, %")
