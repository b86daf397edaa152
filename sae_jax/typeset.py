"""Sets tables as text: CSV for programs, Markdown for notes and LaTeX for papers."""

import csv
import io
import re
from collections.abc import Iterable, Sequence

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "…": r"\ldots{}",
} | {char: "\\" + char for char in "&%$#_{}"}
_GREEK = "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|lambda|mu|sigma"


class Math(str):
    """A number or a short formula in plain text, such as "-1.2e+05", "0.31 ± 0.02" or "beta_k".

    In a LaTeX table it is set as mathematics.
    """


def as_csv(names: Sequence[str], rows: Iterable[dict]) -> str:
    """Returns the text of a .csv file of rows, which may lack some of the columns `names`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table, aligned so that it reads well as plain text too.

    Args:
      head: the names of the columns.
      rows: the cells; the first column is words, and the others are aligned to the right.
    """
    cells = [[_markdown(cell) for cell in row] for row in [head, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        for row in [cells[0], rule, *cells[1:]]
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_latex(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a LaTeX tabular of the same arguments as `as_markdown`; it needs the package
    booktabs.
    """
    lines = [" & ".join(map(_latex, row)) + r" \\" for row in [head, *rows]]
    columns = "l" + "r" * (len(head) - 1)
    rules = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*rules, *lines[1:], r"\bottomrule", r"\end{tabular}", ""])


def latex_math(text: str) -> str:
    """Returns LaTeX's mathematics of a number or formula in plain text, without dollar signs.

    Greek letters are written by name, powers with ^ and no brackets, as in "E + A n^-alpha".
    """
    text = re.sub(r"(\d)e([+-])0*(\d+)", lambda m: _power_of_ten(*m.groups()), text)
    text = re.sub(r"\^(-?\w+)", r"^{\1}", text.replace("*", "^*"))
    text = re.sub(r"_(\w\w+)", r"_{\1}", text)
    text = re.sub(rf"(?<![A-Za-z])({_GREEK})(?![A-Za-z])", r"\\\1", text)
    text = re.sub(r"\b(exp|ln|log)\b", r"\\\1", text)
    return text.replace("±", r"\pm").replace("×", r"\times").replace("%", r"\%")


def _power_of_ten(digit: str, sign: str, power: str) -> str:
    return rf"{digit} \times 10^{'-' * (sign == '-')}{power}"


def _latex(cell: str) -> str:
    if isinstance(cell, Math):
        return f"${latex_math(cell)}$" if cell else ""
    return "".join(_LATEX.get(char, char) for char in " ".join(cell.split()))


def _markdown(cell: str) -> str:
    """Returns a cell as Markdown shows it literally: a name such as d_sae needs no escapes."""
    special = r"([\\`*<>|&$~#]|(?<=\])\(|(?<!\w)_|_(?!\w))"
    return re.sub(special, r"\\\1", " ".join(cell.split()))
