"""Tells what the laws of groups say, and what to doubt about them, as text and as tables to copy.

What is told of a group is the content of its fit.json.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from sae_jax import typeset
from sae_jax.errors import some
from sae_jax.laws import report
from sae_jax.laws.copyable import digits, interval, label_of
from sae_jax.laws.results import Results
from sae_jax.laws.settings import as_text, in_order, meant_column, shortened, varying
from sae_jax.typeset import Math

_APART = 0.25  # the part of a group's runs that would have to change to be as another's
_SHOWN = 4  # values of a group that a warning shows


def merged(said: Mapping[str, Iterable[str]]) -> list[str]:
    """Returns the warnings of all groups, each once, after the labels of the groups that have it.

    Args:
      said: the warnings of each group, by its label.
    """
    of: dict[str, list[str]] = {}
    for label, warnings in said.items():
        for warning in warnings:
            of.setdefault(warning, []).append(label)
    return [
        warning if len(labels) == len(said) else f"{', '.join(labels)}: {warning}"
        for warning, labels in of.items()
    ]


def apart(runs: Mapping[str, Results], columns: Iterable[str], by: str) -> list[str]:
    """Returns a warning, if any, of settings in which the groups' runs differ beside what tells the
    groups: a difference between their laws may be due to these.

    Args:
      runs: those of each group, by its label.
      columns: the columns that the law knows, by our names.
      by: what tells the groups, as the user says it.
    """
    every = list(runs.values())
    names = every[0].names
    cells = {name: np.concatenate([of.cells[name] for of in every]) for name in every[0].cells}
    known = {
        names.get(name, name): np.concatenate([of.columns[name] for of in every])
        for name in columns
    }
    axes = {names.get(name, name) for name in ("d_sae", "tokens")}  # of a law of compute
    own = {meant_column(name, cells) for name in by.split(",")}
    found = []
    for name, column in varying(cells, names, known).items():
        if column["is"] != "setting" or (column["follows"] and name not in axes) or name in own:
            continue
        texts = {label: [as_text(cell) for cell in of.cells[name]] for label, of in runs.items()}
        tells = all(set(of) <= set(label.split(", ")) for label, of in texts.items())
        # What a group does not have at all, as relu has no k, is part of what it is.
        texts = {label: of for label, of in texts.items() if set(of) != {"none"}}
        if tells or not _differ(list(texts.values())):
            continue
        shown = [
            f"{label}: {some([shortened(text) for text in in_order(of)], _SHOWN)}"
            for label, of in texts.items()
        ]
        found.append(f"{name} ({'; '.join(shown)})")
    if not found:
        return []
    return [
        f"the groups differ not only in {by}, but in {' and in '.join(found)}: that, too, may be "
        "why their laws differ; --select runs that are alike"
    ]


def _differ(groups: list[list[str]]) -> bool:
    """Whether the values of some group are distributed otherwise than those of the first."""
    shares = [{text: of.count(text) / len(of) for text in set(of)} for of in groups]
    return any(
        sum(max(share - other.get(text, 0.0), 0.0) for text, share in shares[0].items()) > _APART
        for other in shares[1:]
    )


def text(values: dict) -> str:
    """Returns what a user wants to know first, as lines for a terminal.

    Args:
      values: the content of by.json.
    """
    lines, groups = [f"{values['law']} by {values['by']}", ""], values["groups"]
    width = max(16, *(len(label) + 2 for label in groups))
    for name in _parameters(values):
        lines.append(f"  {name}")
        for label, of in groups.items():
            if name in of["numbers"]:
                value, low, high = of["numbers"][name]
                lines.append(f"    {label:{width}}{value:<12.5g}95% {low:.5g} to {high:.5g}")
    for name, one in values["differences"].items():
        verdict = "differ" if one["differ"] else "do not differ for certain"
        lines.append(f"{name}: the groups {verdict} (p = {one['p']:.2g})")
        for pair in one["pairs"]:
            low, high = pair["ci95"]
            lines.append(
                f"    {' - '.join(pair['of'])}: {pair['difference']:+.4g}, 95% {low:+.4g} to "
                f"{high:+.4g}"
            )
        if len(one["pairs"]) > 1:
            lines.append(
                f"    (95% for each of {len(one['pairs'])} pairs, not for all of them together; p "
                "is of all groups at once)"
            )
    for model in values["models"]:
        held = "" if model["holdout"] is None else f", held out {model['holdout']:.2%}"
        gain = "" if model["p"] is None else f"; better than the one before: p = {model['p']:.2g}"
        lines.append(
            f"{model['model']}: {model['parameters']} parameters, rms error of log-loss "
            f"{model['rms_log_error']:.3g}{held}{gain}"
        )
    for label, of in groups.items():
        lines += [f"{label}: {line}" for line in report.predictions(of)]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in values["warnings"])])


def as_markdown(values: dict) -> str:
    """Returns the numbers of all groups as a Markdown table, from the content of by.json."""
    return f"{_caption(values)}\n\n{typeset.as_markdown(*_table(values))}"


def as_latex(values: dict) -> str:
    """Returns the same table as LaTeX, which needs the package booktabs."""
    needs = f"% {_caption(values)}\n% needs \\usepackage{{booktabs}}\n"
    return needs + typeset.as_latex(*_table(values))


def _parameters(values: dict) -> list[str]:
    """Returns the names of the parameters and exponents of all groups."""
    return list(dict.fromkeys(name for of in values["groups"].values() for name in of["numbers"]))


def _table(values: dict) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the cells: a row for each number, with a column for each group and, if
    there are several, the probability of such differences where there are none.
    """
    groups, differences = values["groups"], values["differences"]
    head, body = ["", *groups], []
    for name in _parameters(values):
        numbers = [of["numbers"].get(name) for of in groups.values()]
        what = label_of(name, any(name in of["params"] for of in groups.values()))
        body.append([what, *map(_cell, numbers)])
        if differences:
            body[-1].append(Math(f"{differences[name]['p']:.2g}" if name in differences else ""))
    points = [Math(of["n_points"]) for of in groups.values()]
    errors = [digits(of["rms_log_error"]) for of in groups.values()]
    body += [["points", *points], ["rms error of log-loss", *errors]]
    if differences:
        head.append("p, if equal")
        body = [row + [""] * (len(head) - len(row)) for row in body]
    return head, body


def _cell(numbers: list[float] | None) -> str:
    """Returns a value with its interval for a table."""
    return Math(f"{digits(numbers[0])} {interval(numbers[1:])}" if numbers else "")


def _caption(values: dict) -> str:
    intervals = "estimates with 95% intervals"
    if len(values["groups"]) > 2:
        intervals += ", not corrected for the number of groups"
    return " ".join(f"{values['law']} by {values['by']}: {intervals}".split())
