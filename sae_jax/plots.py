"""The look of every figure, and its output as PNG and SVG.

Figures are drawn within `matplotlib.rc_context(STYLE)`. `save` writes a PNG. `inline_svg` returns
the text of an SVG whose ink is the page's text colour, for light and dark pages alike.
"""

import contextlib
import html
import io
import re
import warnings

import matplotlib
from matplotlib.figure import Figure

from sae_jax import paths
from sae_jax.errors import one_line

INK = "#1a1a1b"  # stands for the page's text colour in inline_svg
BLUE, ORANGE = "#3b7dd8", "#e07b39"
STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "font.family": "sans-serif",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 8,
    "ytick.color": INK,
    "ytick.labelsize": 8,
}


_LONGEST = 60  # characters of a text that is not ours


def plain(text: str) -> str:
    """Returns what draws as `text`, cut where it is long: dollar signs do not make a formula of it.

    Names that users and files give go through this before they label anything.
    """
    text = one_line(" ".join(text.split()))
    short = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return short.replace("$", r"\$")


def save(figure: Figure, path) -> None:
    """Writes a figure as a PNG at `path`, whole or not at all."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE), _any_glyphs():
        figure.savefig(buffer, format="png", dpi=200)
    paths.write(paths.path(path), buffer.getvalue())


def inline_svg(figure: Figure, label: str) -> str:
    """Returns a figure as an `<svg>` element for an HTML page, without a fixed size.

    Args:
      figure: the figure.
      label: what it shows, for screen readers.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}), _any_glyphs():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None}, dpi=200)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    attributes = f'<svg role="img" aria-label="{html.escape(label)}"'
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    return attributes + svg.removeprefix("<svg")


@contextlib.contextmanager
def _any_glyphs():
    """Lets names have letters that the font lacks: a browser shows them, a PNG has boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield
