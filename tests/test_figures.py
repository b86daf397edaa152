"""Figures, tables and curves for papers: their formats, the user's style, what is escaped."""

import csv
import io
import re
import shutil

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from test_laws import runs, write

from sae_jax import cli, plots, typeset
from sae_jax.config import UserError
from sae_jax.laws.laws import LAWS
from sae_jax.typeset import Math

# Tables


NASTY = r"a_b & 50% of $x$ {~^} \ # <|> `c` *d* [e](f) _g_"


def unescaped(latex: str) -> str:
    """The text that LaTeX sets for escaped text."""
    words = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^",
             r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|"}  # fmt: skip
    pattern = "|".join(map(re.escape, words)) + r"|\\([&%$#_{}])"
    left = re.sub(pattern, "", latex)
    assert not set(left) & set("\\&%$#_{}~^<>|"), left  # nothing that means something to LaTeX
    return re.sub(pattern, lambda m: m[1] or words[m[0]], latex)


def test_any_text_is_set_as_it_is():
    latex = typeset.as_latex(["", "x"], [[NASTY, Math("-1.2e+05")]])
    row = latex.splitlines()[4]
    first, _, second = row.removesuffix(r" \\").rpartition(" & ")
    assert unescaped(first) == NASTY
    assert second == r"$-1.2 \times 10^{5}$"
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 1

    markdown = typeset.as_markdown(["", "x"], [[NASTY, Math("0.31 ± 0.02")], ["d_sae", ""]])
    lines = markdown.splitlines()
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [3] * 4  # cells, not text
    cell = lines[2].split(" | ")[0].removeprefix("| ")
    assert not re.search(r"(?<!\\)[`*<>|&$~#]|(?<![\w\\])_", cell.replace("\\\\", ""))
    assert re.sub(r"\\(\W|_)", r"\1", cell) == NASTY
    assert "0.31 ± 0.02" in markdown and "| d_sae" in markdown


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_formulas_are_latex_whose_parts_matplotlib_can_set(law):
    set_ = typeset.latex_math(law.formula)
    assert set_.count("{") == set_.count("}") and not re.search(r"(?<!\\)(alpha|beta|ln|exp)", set_)
    figure = Figure()
    figure.text(0, 0, f"${set_}$")
    figure.savefig(io.BytesIO(), format="png")  # raises where its parser cannot read it


# Styles


def test_a_style_goes_over_ours(tmp_path):
    style = tmp_path / "mine.mplstyle"
    style.write_text(
        "figure.figsize: 2, 1\nsavefig.dpi: 50\naxes.prop_cycle: cycler('color', 'r')\n"
    )
    colours = []

    def draw():
        figure = Figure()
        colours.append(figure.subplots().plot([1, 2])[0].get_color())
        return figure

    png = plots.rendered(draw, "x.png", str(style))
    assert matplotlib.image.imread(io.BytesIO(png)).shape[:2] == (50, 100)
    assert colours == ["r"]
    ours = matplotlib.image.imread(io.BytesIO(plots.rendered(draw, "x.png")))
    assert ours.shape[:2] == (750, 1005)
    for name, start in {"x.pdf": b"%PDF", "x.svg": b"<?xml"}.items():
        content = plots.rendered(draw, name)
        assert content.startswith(start) and content == plots.rendered(draw, name)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"axes.labelsze: 9\n", "Bad key axes.labelsze"),
        (b"axes.labelsize: huge\n", "not a valid font size"),
        (b"d_sae,loss\n1,2\n", "Missing colon"),
        (b"\xff\xfe", "utf-8"),
        (b"", "sets nothing"),
        (None, "neither a file nor a style"),
    ],
)
def test_a_style_that_is_none_is_refused(tmp_path, content, says):
    file = tmp_path / "mine.mplstyle"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="--style") as error:
        plots.check_style(str(file))
    assert says in str(error.value)


# Of a fit


def fit(tmp_path, *flags):
    file = write(tmp_path / "runs.csv", runs("chinchilla", noise=0.01) | {"d_in": np.full(25, 64)})
    out = f"--out={tmp_path / 'fit'}"
    return cli.main(["fit", f"--results={file}", "--law=chinchilla", out, "--bootstrap=50", *flags])


@pytest.mark.slow
def test_a_fits_figures_numbers_and_curve(tmp_path):
    names = [f"{tmp_path}/paper/{name}" for name in ("a.pdf", "b.svg", "c.png")]
    figures = [f"--figure={names[0]},{names[1]}", f"--figure={names[2]}"]
    assert fit(tmp_path, *figures, "--panel=optimal", "--predict_flops=1e15") == 0
    assert sorted(p.name for p in (tmp_path / "paper").iterdir()) == ["a.pdf", "b.svg", "c.png"]
    with (tmp_path / "fit/curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    of = {what: [r for r in rows if r["what"] == what] for what in {r["what"] for r in rows}}
    assert {what: len(these) for what, these in of.items()} == {
        "fitted": 21, "held out": 4, "curve": 100, "planned": 1,
    }  # fmt: skip
    for row in of["fitted"] + of["held out"]:
        ratio = float(row["loss"]) / float(row["fitted"])
        assert float(row["residual"]) == pytest.approx(ratio - 1, abs=1e-9)
    for row in of["curve"]:
        assert float(row["low"]) <= float(row["fitted"]) <= float(row["high"])
        flops = 12 * 64 * float(row["d_sae"]) * float(row["tokens"])
        assert flops == pytest.approx(float(row["flops"]))
    for name in ("table.md", "table.tex"):
        text = (tmp_path / "fit" / name).read_text()
        assert "alpha" in text and "exponent of n" in text and "1e+15 FLOPs" in text
        assert text.splitlines()[-2][:20] in (tmp_path / "fit/report.html").read_text()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--figure=a.docx"], ".pdf, .svg or .png"),
        (["--style=ggplot"], "--figure"),
        (["--panel=loss"], "--figure"),
        (["--figure=a.pdf", "--panel=surface"], "--panel of chinchilla"),
        (["--figure=a.pdf", "--style=ggplott"], "did you mean 'ggplot'"),
        (["--figure=a.pdf", "--style=tex.mplstyle"], "cannot be drawn"),
    ],
)
def test_what_cannot_be_drawn_leaves_everything_as_it_was(
    tmp_path, monkeypatch, capsys, flags, says
):
    if "tex" in says + "".join(flags) and shutil.which("latex"):
        pytest.skip("LaTeX is here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tex.mplstyle").write_text("text.usetex: True\n")
    assert fit(tmp_path, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs.csv", "tex.mplstyle"]


def test_files_of_others_are_not_written_over(tmp_path, capsys):
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit/curve.csv").write_text("mine")
    assert fit(tmp_path) == 2
    assert "curve.csv is not of sae-jax fit" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "fit").iterdir()] == ["curve.csv"]
