"""Saves a fit as fit.json, fit.png and report.html, and tells it as text for a terminal."""

import pathlib
from collections.abc import Sequence

from sae_jax import pages, paths, plots
from sae_jax.errors import UserError
from sae_jax.json_files import read_json
from sae_jax.laws import figures, predict
from sae_jax.paths import AnyPath


def check_out(out: str | AnyPath) -> None:
    """Raises UserError where the fit's directory cannot be made, or holds a fit.json of another
    program.
    """
    out = paths.path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; give a directory")
    theirs = out / "fit.json"
    if theirs.exists() and "law" not in read_json(theirs):
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


def save(found, values: dict, out: str | AnyPath) -> None:
    """Writes a fit and its `summary` to the directory `out`, each file under a temporary name
    first.
    """
    out = paths.path(out)
    check_out(out)
    out.mkdir(parents=True, exist_ok=True)
    planned = values["prediction"]
    paths.save_json(values, out / "fit.json")
    plots.save(figures.overview(found, planned), out / "fit.png")
    paths.write(out / "report.html", _page(found, values))


def text(values: dict, out: str | AnyPath) -> str:
    """Returns what a user wants to know first, as lines for a terminal."""
    lines = [f"{values['law']}: {values['formula']}", ""]
    for name, value in values["params"].items():
        low, high = values["ci95"][name]
        lines.append(f"  {name:16}{value:<12.5g}95% {low:.5g} to {high:.5g}")
    lines += [
        "",
        f"{values['n_points']} points, rms error of log-loss {values['rms_log_error']:.3g}",
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
    return "\n".join([*lines, "", f"written: {out}/fit.json, fit.png, report.html"])


def _page(found, values: dict) -> str:
    """Returns the HTML of report.html."""
    drawn = figures.panels(found, values["prediction"])
    return pages.render(
        pathlib.Path(__file__).with_name("report.html"),
        fit=values,
        figures=[(title, plots.inline_svg(figure, title)) for title, figure in drawn.items()],
    )
