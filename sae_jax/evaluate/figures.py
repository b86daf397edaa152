"""Draws figures of a run and of an evaluation.

There are training curves, a histogram of how often latents fire, how strongly they fire against how
often, and how much of a synthetic world's features was found. Functions that draw return a
matplotlib Figure, for `save` and `inline_svg` of sae_jax.plots.
"""

import dataclasses

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.evaluate.recovery import Recovery
from sae_jax.evaluate.report import Evaluation
from sae_jax.json_files import checked, parse_json
from sae_jax.paths import AnyPath
from sae_jax.plots import BLUE, INK, ORANGE, STYLE, save


def save_all(evaluation: Evaluation, out, metrics_file=None) -> list[AnyPath]:
    """Writes the figures of an evaluation beside its JSON file `out`, and returns their paths.

    They are STEM_density.png and STEM_strength.png, on a synthetic world STEM_recovery.png, and,
    given a run's metrics.jsonl, STEM_training.png. STEM is the name of `out` without .json.
    """
    rows = evaluation.rows
    drawn = {
        "density": density_histogram(rows.density, rows.rows),
        "strength": density_against_activation(rows.density, rows.mean_activation),
    }
    if evaluation.recovery is not None:
        drawn["recovery"] = recovery_by_rate(evaluation.recovery)
    if metrics_file is not None:
        drawn["training"] = training_curves(metrics_file)
    out, files = paths.path(out), []
    for name, figure in drawn.items():
        files.append(out.with_name(f"{out.stem}_{name}.png"))
        save(figure, files[-1])
    return files


def training_curves(metrics_file) -> Figure:
    """Draws FVU, L0, dead latents and learning rate against tokens, from a run's metrics.jsonl.

    Raises UserError if there is no such file, or no line in it.
    """
    steps = read_metrics(metrics_file)
    tokens = np.array([step["tokens"] for step in steps], float)
    unit, name = (1e6, "million") if tokens[-1] >= 1e6 else (1e3, "thousand")
    panels = [
        ("fvu", "Fraction of variance unexplained", "log"),
        ("l0", "Latents active a token (L0)", "linear"),
        ("dead_fraction", "Dead latents, % of all", "linear"),
        ("lr", "Learning rate", "linear"),
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        for axes, (field, title, scale) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            values = [step[field] for step in steps]
            values = np.array([np.nan if v is None else v for v in values], float)
            if field == "dead_fraction":
                values = 100 * values
            axes.plot(tokens / unit, values, color=BLUE, linewidth=1.4)
            axes.set_title(title)
            axes.set_xlabel(f"tokens, {name}")
            if scale == "log":
                _log_scale(axes)
            else:
                known = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
                low, high = known.min(), known.max()
                margin = 0.08 * (high - low) or 0.1 * high or 1.0
                axes.set_ylim(max(low - margin, 0), high + margin)
        return figure


def density_histogram(density: np.ndarray, rows: int) -> Figure:
    """Draws a histogram of how often latents fire.

    `density` (d_sae,) is the part of the `rows` rows on which each latent fires.
    """
    alive = density[density > 0]
    never = len(density) - len(alive)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.5, 2.6), layout="constrained")
        axes = figure.subplots()
        lowest = np.floor(np.log10(1 / rows) * 4) / 4
        bins = np.arange(lowest, 0.251, 0.25)
        axes.hist(np.log10(alive), bins=bins, color=BLUE, edgecolor="white", linewidth=0.3)
        axes.set_xlabel("density (part of tokens)")
        axes.set_ylabel("latents")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        _log10_ticks(axes, lowest)
        axes.set_xlim(bins[0], max(np.log10(alive.max()) + 0.25, bins[1]) if len(alive) else 0)
        title = f"{len(alive):,} of {len(density):,} latents fire"
        axes.set_title(title + (f"; {never:,} never do" if never else ""))
        return figure


def density_against_activation(density: np.ndarray, mean_activation: np.ndarray) -> Figure:
    """Draws the mean activation of each latent that fires against how often it fires.

    Both arrays are (d_sae,). The mean is over the tokens on which the latent fires.
    """
    fires = density > 0
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.5, 2.6), layout="constrained")
        axes = figure.subplots()
        x, y = np.log10(density[fires]), mean_activation[fires]
        _points(axes, x, y, ORANGE)
        _log_scale(axes)
        axes.set_xlabel("density (part of tokens)")
        axes.set_ylabel("mean activation where it fires")
        if len(x):
            _log10_ticks(axes, x.min())
            axes.set_xlim(x.min() - 0.2, x.max() + 0.2)
        axes.set_title("Strength against density")
        return figure


def recovery_by_rate(recovery: Recovery) -> Figure:
    """Draws how well each feature of a world was found, in three panels.

    The first two show the feature's largest cosine to a latent, and the F1 of its matched latent,
    against the rate at which the feature fires. The third shows the latent's mean activation
    against the feature's mean magnitude.
    """
    features = recovery.features
    fires = features["rate"] > 0
    rate = np.log10(features["rate"][fires])
    against_rate = [
        ("cosine", "Largest cosine to a latent", f"{(features['cosine'] > 0.9).sum():,} above 0.9"),
        ("f1", "F1 of the matched latent", f"{(features['match'] >= 0).sum():,} matched"),
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 2.8), layout="constrained")
        *panels, last = figure.subplots(1, 3)
        for axes, (name, title, found) in zip(panels, against_rate, strict=True):
            _points(axes, rate, features[name][fires], BLUE)
            axes.set_ylim(-0.03, 1.03)
            axes.set_xlabel(f"rate of the feature; of {len(fires):,}, {found}")
            axes.set_title(title)
            if len(rate):
                _log10_ticks(axes, rate.min())
                axes.set_xlim(rate.min() - 0.2, rate.max() + 0.2)
        magnitude, activation = features["magnitude"], features["activation"]
        most = 1.05 * np.nanmax([1e-9, *magnitude, *activation])
        last.plot([0, most], [0, most], color=INK, linewidth=0.7, linestyle=":")
        _points(last, magnitude, activation, ORANGE)
        last.set_xlim(0, most)
        last.set_ylim(0, most)
        last.set_xlabel("mean magnitude where both are on")
        last.set_ylabel("mean activation")
        last.set_title("Learned against true magnitude")
        return figure


def read_metrics(file) -> list[dict]:
    """Returns the lines of a metrics.jsonl, without a last line that was cut by a kill.

    Raises UserError, which names the line, if there is no such file, no line in it, or one that is
    no step of a run.
    """
    file = paths.path(file)
    if not file.is_file():
        raise UserError(f"no {file.name} in {file.parent}; it is not a run's directory")
    lines = file.read_bytes().splitlines(keepends=True)
    whole = lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]
    steps = []
    for number, line in enumerate(whole, 1):
        where = f"{file}, line {number}"
        steps.append(parse_json(line, where))
        checked(steps[-1], _Drawn, where)
    if not steps:
        raise UserError(f"{file} holds no step yet")
    return steps


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """What is drawn of a line of metrics.jsonl; NaN is written as null."""

    tokens: float
    fvu: float | None
    l0: float | None
    dead_fraction: float | None
    lr: float | None


def _points(axes, x: np.ndarray, y: np.ndarray, color: str) -> None:
    alpha = min(1.0, 0.15 + 150 / max(len(x), 1))
    axes.scatter(x, y, s=5, color=color, alpha=alpha, linewidths=0, rasterized=True)


def _log_scale(axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _log10_ticks(axes, lowest: float) -> None:
    ticks = np.arange(np.ceil(lowest), 0.5)
    axes.set_xticks(ticks, [f"$10^{{{int(t)}}}$" if t else "1" for t in ticks])
