"""Saves a fit as JSON, figures, tables and a page, and tells it as text for a terminal.

OUT/fit.json      all that was found
OUT/fit.png       the figure
OUT/curve.csv     what the figure shows, as numbers (`curves.table`)
OUT/table.md, table.tex    parameters, exponents and errors, to copy
OUT/report.html   all of these on a page
OUT/state.json    what `api.load` reads; `saved` writes it
"""

import pathlib
from collections.abc import Sequence

from sae_jax import pages, paths, plots, typeset
from sae_jax.errors import UserError
from sae_jax.json_files import read_json
from sae_jax.laws import copyable, curves, figures, predict, saved
from sae_jax.paths import AnyPath

FILES = ("fit.json", "fit.png", "curve.csv", "table.md", "table.tex", "report.html", "state.json")


def check_out(out: str | AnyPath) -> None:
    """Raises UserError where the fit's directory cannot be made, or holds files of another program
    under the names of a fit's.
    """
    out = paths.path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; give a directory")
    theirs = next((out / name for name in FILES if (out / name).exists()), None)
    if theirs and (theirs.name != "fit.json" or "law" not in read_json(theirs)):
        raise UserError(f"{theirs} is not of sae-jax fit; give another --out")


def summary(
    found,
    planned: dict | None,
    accountings: dict[str, dict],
    predictions: Sequence[dict] = (),
    refused: Sequence[str] = (),
) -> dict:
    """Returns the content of fit.json.

    Args:
      found: a Fit or an IsoflopFit.
      planned: the prediction of `predict.predict`, or None.
      accountings: the result of `fitting.frontiers_by_accounting`.
      predictions: losses at given values, each a dict of `at`, which holds these by name, and the
        fields of `predict.Losses`.
      refused: what was asked and the law does not say, in words.
    """
    values = found.summary() | {"accountings": accountings, "prediction": planned}
    values |= {"predictions": list(predictions), "refused": list(refused)}
    if planned:
        values["warnings"] = values["warnings"] + predict.warnings(planned)
    return values


def save(
    found,
    values: dict,
    out: str | AnyPath,
    papers: Sequence[str] = (),
    style: str | None = None,
    panel: str | None = None,
) -> None:
    """Writes a fit and its `summary` to the directory `out`, each file under a temporary name
    first.

    Args:
      found: a Fit or an IsoflopFit.
      values: its `summary`.
      out: the directory, made if absent.
      papers: files that end in .pdf, .svg or .png, for a figure in the look of `plots.paper`.
      style: the user's matplotlib style for these.
      panel: which panel they show, the law's first by default.

    Raises UserError, before anything is written, where `out` holds files of another program, the
    law has no such panel, or the figures cannot be drawn in that style.
    """
    out = paths.path(out)
    check_out(out)
    figures.check_panel(found, panel)
    planned = values["prediction"]

    def draw():
        return figures.for_paper(found, planned, panel)

    drawn = {paths.path(file): plots.rendered(draw, file, style) for file in papers}
    out.mkdir(parents=True, exist_ok=True)
    saved.forget(out)  # the law of another fit
    paths.save_json(values, out / "fit.json")
    plots.save(figures.overview(found, planned), out / "fit.png")
    rows = curves.table(found, planned)
    columns = [name for name in curves.COLUMNS if any(name in row for row in rows)]
    paths.write(out / "curve.csv", typeset.as_csv(columns, rows))
    paths.write(out / "table.md", copyable.as_markdown(values))
    paths.write(out / "table.tex", copyable.as_latex(values))
    paths.write(out / "report.html", _page(found, values))
    for file, content in drawn.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        paths.write(file, content)


def text(values: dict, out: str | AnyPath) -> str:
    """Returns what a user wants to know first, as lines for a terminal."""
    lines = [f"{values['law']}: {values['formula']}", ""]
    for name, value in values["params"].items():
        low, high = values["ci95"][name]
        lines.append(f"  {name:16}{value:<12.5g}95% {low:.5g} to {high:.5g}")
    lines += [
        "",
        f"{values['n_points']} points; rms error of log-loss {values['rms_log_error']:.3g}, of "
        f"{values['rms_of']}",
    ]
    if values["holdout"]:
        error = values["holdout"]["rms_relative_error"]
        lines.append(f"held out: {values['holdout']['what']}: rms relative error {error:.2%}")
    shown = {n: values["frontier"].get(n) for n in ("d_sae_exponent", "tokens_exponent")}
    if None not in shown.values():
        n, tokens = shown.values()
        lines.append(f"compute-optimal: n* ~ C^{n:.3f}, D* ~ C^{tokens:.3f}")
    if planned := values["prediction"]:
        low, high = planned["interval"]
        what = ""
        if planned["d_sae"]:  # power says how much loss, not of which size
            what = f"{planned['d_sae']} latents, {planned['tokens']:,} tokens, "
        lines.append(
            f"for {planned['flops']:.4g} FLOPs: {what}loss {planned['loss']:.5g}, 95% of runs "
            f"{low:.5g} to {high:.5g}"
        )
    for one in values["predictions"]:
        at = " ".join(f"{name}={value:.6g}" for name, value in one["at"].items())
        lines.append(
            f"at {at}: loss {one['loss']:.5g}, 95% of runs {one['low']:.5g} to {one['high']:.5g}; "
            f"the law {one['law_low']:.5g} to {one['law_high']:.5g}"
        )
    lines += [f"warning: {warning}" for warning in values["warnings"]]
    return "\n".join([*lines, "", f"written: {out}/{', '.join(FILES)}"])


def _page(found, values: dict) -> str:
    """Returns the HTML of report.html."""
    drawn = figures.panels(found, values["prediction"])
    return pages.render(
        pathlib.Path(__file__).with_name("report.html"),
        fit=values,
        copyable={"Markdown": copyable.as_markdown(values), "LaTeX": copyable.as_latex(values)},
        figures=[(title, plots.inline_svg(figure, title)) for title, figure in drawn.items()],
    )
