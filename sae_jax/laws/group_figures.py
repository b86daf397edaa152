"""The figure of one law for each group: all on one pair of axes, and their exponents."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sae_jax.laws import labels, predict
from sae_jax.laws.fitting import Fit
from sae_jax.laws.isoflop import IsoflopFit
from sae_jax.plots import INK, STYLE, log_ticks, plain


def overview(found: dict[str, Fit | IsoflopFit], by: str, exponents: dict) -> Figure:
    """Draws the laws of all groups, and beside them each exponent with its 95% interval.

    Args:
      found: the fit of each group, by its label.
      by: what tells the groups.
      exponents: by exponent and label, a `groups.Exponent`.
    """
    with matplotlib.rc_context(STYLE):
        height = max(3.6, 1.2 + 0.22 * len(exponents) * (len(found) + 1))
        figure = Figure(figsize=(9.6, height), layout="constrained")
        laws, side = figure.subplots(1, 2)
        _draw_laws(laws, found, by)
        laws.set_title("Loss and 95% band of each law")
        _draw_exponents(side, exponents, _colours(found))
        return figure


def laws_alone(found: dict[str, Fit | IsoflopFit], by: str) -> Figure:
    """Draws the laws of all groups in the look that is set, for papers."""
    figure = Figure(layout="constrained")
    _draw_laws(figure.subplots(), found, by)
    return figure


def _colours(found: dict) -> dict[str, str]:
    """Returns the colour of each group, in turn those of the style."""
    cycle = matplotlib.rcParams["axes.prop_cycle"].by_key().get("color", [INK])
    return {label: cycle[place % len(cycle)] for place, label in enumerate(found)}


def _draw_laws(axes, found: dict[str, Fit | IsoflopFit], by: str) -> None:
    """Draws the runs of each group, and its law with the 95% band.

    It is the least loss of a budget where the laws know compute, else the loss against dictionary
    size at the middle of the group's k and tokens.
    """
    colours = _colours(found)
    by_size = any(
        one.name in ("openai_nk", "chinchilla", "joint") and one.frontier is None
        for one in found.values()
    )
    for label, one in found.items():
        results = one.results
        x = results.columns["d_sae"] if by_size else results.compute
        axes.scatter(x, results.loss, s=12, color=colours[label], alpha=0.5, linewidths=0)
        line = np.geomspace(x.min(), x.max(), 60)
        columns = _columns(one, line, by_size)
        middle = {name: columns[name][0] for name in ("tokens", "k") if by_size and name in columns}
        at = "".join(f", {name} {value:.3g}" for name, value in middle.items())
        expected = predict.losses(one, columns)
        axes.plot(line, expected.loss, color=colours[label], label=plain(label + at))
        axes.fill_between(
            line, expected.law_low, expected.law_high, color=colours[label], alpha=0.15, linewidth=0
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    log_ticks(axes.xaxis)
    log_ticks(axes.yaxis)
    known = all("flops" in one.results.columns for one in found.values())
    axes.set_xlabel(labels.axis("d_sae") if by_size else labels.compute(known))
    axes.set_ylabel(labels.axis(next(iter(found.values())).results.loss_column))
    axes.legend(loc="best", title=plain(by))


def _draw_exponents(axes, exponents: dict, colours: dict[str, str]) -> None:
    """Draws each exponent of each group with its 95% interval."""
    places, names, place = [], [], 0
    for name, of in exponents.items():
        places.append(place + (len(of) - 1) / 2)
        names.append(name)
        for label, one in of.items():
            error = [[max(one.value - one.low, 0)], [max(one.high - one.value, 0)]]
            axes.errorbar(
                one.value, place, xerr=error, fmt="o", markersize=4, capsize=2, color=colours[label]
            )
            place += 1
        place += 1
    # An interval that the data do not bound is drawn to the edge.
    middle = [one.value for of in exponents.values() for one in of.values()]
    if middle:
        reach = max(1.0, 1.5 * max(abs(value) for value in middle))
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -reach), min(high, reach))
    axes.axvline(0, color=INK, linewidth=0.6)
    axes.set_yticks(places, [plain(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("exponent, 95% interval")
    axes.set_title("Exponents")


def _columns(found: Fit | IsoflopFit, x: np.ndarray, by_size: bool) -> dict[str, np.ndarray]:
    """Returns the columns at which a group's law is drawn."""
    if isinstance(found, IsoflopFit) or found.name == "power":
        return {"flops": x}
    if not by_size:
        best = found.frontier.at(x)
        columns = {"d_sae": best["d_sae"], "tokens": best["tokens"]}
        return columns if found.k is None else columns | {"k": np.full(len(x), found.k)}
    middle = {
        name: np.full(len(x), np.exp(np.median(np.log(found.results.columns[name]))))
        for name in found.law.columns
    }
    return middle | {"d_sae": x}
