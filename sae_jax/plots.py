"""The look of every figure, and its output as PNG, PDF and SVG.

Figures of reports are drawn within `matplotlib.rc_context(STYLE)`. `save` writes a PNG.
`inline_svg` returns the text of an SVG whose ink is the page's text colour, for light and dark
pages alike.

Figures for papers are drawn within `paper(style)` and made by `rendered`: as wide as a column, with
the user's own matplotlib style over ours.
"""

import contextlib
import html
import io
import logging
import re
import warnings
from collections.abc import Callable

import matplotlib
import matplotlib.style
from absl import logging as absl_logging
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from sae_jax import paths
from sae_jax.errors import UserError, nearest, on_one_line, one_line

INK = "#1a1a1b"  # stands for the page's text colour in inline_svg
BLUE, ORANGE = "#3b7dd8", "#e07b39"
# Told apart by the colour-blind, and in grey by their lightness as far as that goes.
CYCLE = (BLUE, ORANGE, "#1b8a6b", "#a33a8e", "#56b4e9", "#8c6d1f", "#c0392b", "#5c5f66")
FORMATS = ("pdf", "svg", "png")
STYLE = {
    "axes.prop_cycle": cycler(color=CYCLE),
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
    "lines.linewidth": 1.3,
    "pdf.fonttype": 42,  # journals refuse type 3
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 8,
    "ytick.color": INK,
    "ytick.labelsize": 8,
}
_PAPER = STYLE | {
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "figure.figsize": (3.35, 2.5),  # inches: a column of two
    "legend.fontsize": 7,
    "savefig.dpi": 300,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
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
    """Writes a figure of a report as a PNG at `path`, whole or not at all."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE), _any_glyphs():
        figure.savefig(buffer, format="png", dpi=200)
    paths.write(paths.path(path), buffer.getvalue())


def check_file(file: str) -> str:
    """Returns the format, one of `FORMATS`, that the name of a figure's file says.

    Raises UserError where it says none, or where the name is a folder's.
    """
    ending = file.rpartition(".")[2].lower()
    if ending not in FORMATS:
        raise UserError(f"--figure={file}: its name must end in .pdf, .svg or .png")
    if paths.path(file).is_dir():
        raise UserError(f"--figure={file} is a directory; give a file in it")
    return ending


def check_style(style: str | None) -> None:
    """Raises UserError unless `style` is one that `paper` takes.

    A name that matplotlib does not know, a file that is no matplotlib style, and a file with a line
    that matplotlib would pass over are refused.
    """
    if style is None or style in matplotlib.style.available:
        return
    file, wrong = paths.local(style), None
    if not file.is_file():
        hint = nearest(style, matplotlib.style.available)
        raise UserError(f"--style={style} is neither a file nor a style of matplotlib; {hint}")
    with _said_by_matplotlib() as said:
        try:
            if not matplotlib.rc_params_from_file(file, True, use_default_template=False):
                wrong = "it sets nothing"
        except (ValueError, OSError) as error:  # no text, or a value that is none
            wrong = on_one_line(error)
    if said:
        wrong = next(iter(said)).splitlines()[0]
    if wrong:
        raise UserError(f"--style={style} is no matplotlib style: {wrong}")


@contextlib.contextmanager
def paper(style: str | None = None):
    """Gives figures that are made within it the look for papers: a column wide, letters of 7 to 8
    points.

    Args:
      style: a .mplstyle file, or the name of one of matplotlib's own styles, which goes over ours.
        Sizes, fonts, colours (axes.prop_cycle, image.cmap), grids and resolution are its to set.
    """
    with matplotlib.rc_context(_PAPER):
        if style in matplotlib.style.available:
            matplotlib.style.use(style)
        elif style is not None:
            matplotlib.style.use(paths.local(style))
        yield


def rendered(draw: Callable[[], Figure], file: str, style: str | None = None) -> bytes:
    """Returns a figure for papers as the content of `file`, whose name says the format.

    The same figure gives the same bytes, whenever it is drawn.

    Args:
      draw: makes the figure, in the look of `paper(style)`.
      file: the name of a file that `check_file` allows.
      style: one that `check_style` allows.

    Raises UserError where matplotlib cannot draw it in that style, for want of LaTeX for example.
    """
    ending, buffer = check_file(file), io.BytesIO()
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}[ending]
    in_svg = {"svg.hashsalt": "sae_jax"}
    with paper(style), matplotlib.rc_context(in_svg), _any_glyphs(), _said_by_matplotlib() as said:
        figure = draw()
        try:
            figure.savefig(buffer, format=ending, metadata=undated)
        except (RuntimeError, ValueError, OSError) as error:
            how = f" in the style {style}" if style else ""
            raise UserError(f"{file} cannot be drawn{how}: {on_one_line(error)}") from None
    for text in said:
        absl_logging.warning("%s", text)
    return buffer.getvalue()


def log_ticks(axis) -> None:
    """Gives a logarithmic axis few ticks with plain numbers: 0.05, 200, and powers of ten where the
    axis goes beyond 100,000.

    It is for when all is drawn, because the ticks follow from the limits.
    """
    low, high = sorted(axis.get_view_interval())
    if high >= 100 * low:  # each decade a number, and ticks in between that have none
        axis.set_major_locator(LogLocator())
    else:
        few = LogLocator(subs=(1, 2, 5) if high >= 10 * low else (1, 2, 3, 4, 6, 8))
        axis.set_major_locator(MaxNLocator(6) if high < 4 * low else few)
        axis.set_minor_locator(NullLocator())
    if 1e-4 <= low and high < 2e5:
        axis.set_major_formatter("{x:g}")
    else:
        axis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axis.set_minor_formatter(NullFormatter())


def _power(value: float) -> str:
    """Returns a number as the label 2 times a power of ten."""
    digits, _, power = f"{value:.3e}".partition("e")
    digits = digits.rstrip("0").rstrip(".")
    times = "" if digits == "1" else rf"{digits}{{\times}}"
    return rf"${times}10^{{{int(power)}}}$"


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


@contextlib.contextmanager
def _said_by_matplotlib():
    """Keeps warnings that matplotlib logs, a missing font's for every letter, from being shown.

    Yields a dict that gets their texts as keys, each once.
    """
    said: dict[str, None] = {}
    loggers = [logging.getLogger(name) for name in ("matplotlib", "matplotlib.font_manager")]

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            said[record.getMessage().strip()] = None
        return record.levelno < logging.WARNING

    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield said
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
