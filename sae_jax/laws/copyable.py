"""The numbers of a fit as tables to copy: Markdown for notes, LaTeX for papers."""

from sae_jax import typeset
from sae_jax.errors import one_line
from sae_jax.typeset import Math

_HEAD = ("", "estimate", "95% interval")
_SYMBOLS = {  # of isoflop's parameters in its formula
    "d_sae_scale": "G_n", "d_sae_exponent": "a",
    "tokens_scale": "G_D", "tokens_exponent": "b",
    "loss_scale": "G_L", "loss_exponent": "c",
}  # fmt: skip
_EXPONENTS = {
    "d_sae_exponent": "exponent of n* in compute",
    "tokens_exponent": "exponent of D* in compute",
    "loss_exponent": "exponent of the loss above E in compute",
}


def as_markdown(values: dict) -> str:
    """Returns the formula and the table of a fit, from the content of its fit.json."""
    return f"{_caption(values)}\n\n`{_formula(values)}`\n\n" + typeset.as_markdown(
        _HEAD, rows(values)
    )


def as_latex(values: dict) -> str:
    """Returns the formula as an equation and the table as a tabular, from the content of a
    fit.json; the package booktabs is needed.
    """
    return "\n".join(
        [
            f"% {_caption(values)}",
            r"% needs \usepackage{booktabs}",
            r"\begin{equation}",
            f"  {typeset.latex_math(_formula(values))}",
            r"\end{equation}",
            typeset.as_latex(_HEAD, rows(values)),
        ]
    )


def rows(values: dict) -> list[tuple[str, str, str]]:
    """Returns (what, estimate, 95% interval) of every number of a fit, from the content of its
    fit.json.
    """
    out = [
        (Math(_SYMBOLS.get(name, name)), digits(value), interval(values["ci95"][name]))
        for name, value in values["params"].items()
    ]
    frontier = values["frontier"]
    for name, what in _EXPONENTS.items():
        if frontier[name] is not None and name not in values["params"]:
            out.append((what, digits(frontier[name]), interval(frontier["ci95"].get(name))))
    rms = f"rms error of log-loss, {values['rms_of']}"
    out.append((rms, digits(values["rms_log_error"]), ""))
    if values["holdout"]:
        error = digits(values["holdout"]["rms_relative_error"])
        out.append(("rms relative error, held out", error, ""))
    if planned := values["prediction"]:
        at = f"at {planned['flops']:.4g} FLOPs"
        for name, what in (("d_sae", "best dictionary size"), ("tokens", "best tokens")):
            if planned[name]:
                out.append((f"{what} {at}", digits(planned[name]), ""))
        out.append(
            (f"loss {at}, of one run", digits(planned["loss"]), interval(planned["interval"]))
        )
    return out


def digits(value: float) -> Math:
    """Returns a number of a table; one that is not whole has four significant digits."""
    return Math(str(value) if isinstance(value, int) else f"{value:.4g}")


def interval(ends: tuple[float, float] | None) -> str:
    """Returns an interval of a table; "" where there is none."""
    return "" if ends is None else Math(f"[{ends[0]:.4g}, {ends[1]:.4g}]")


def _formula(values: dict) -> str:
    return values["formula"].partition(", of ")[0]  # isoflop's ends in words


def _caption(values: dict) -> str:
    return one_line(
        f"{values['law']}: {values['n_points']} points of {values['n_runs']} runs in "
        f"{values['results']}, column {values['loss']}, estimator {values['estimator']}"
    )
