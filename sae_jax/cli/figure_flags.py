"""Defines the flags for figures for papers, which several commands have."""

import re

from absl import flags

flags.disclaim_key_flags()  # --help shows them with those of the command

HELP = """\
--figure=NAME.pdf (or .svg, .png; given again, or several with commas) writes a figure for a
paper, as wide as one column of two, in colours that the colour-blind tell apart. With
--style=MINE.mplstyle your own matplotlib style goes over ours (sizes, fonts, axes.prop_cycle,
image.cmap, grids); the names of matplotlib's own styles are styles too."""


def define(values: flags.FlagValues) -> None:
    """Defines --figure and --style."""
    flags.DEFINE_multi_string(
        "figure", [], "A .pdf, .svg or .png for a paper; several are allowed.", flag_values=values
    )
    flags.DEFINE_string(
        "style",
        None,
        "A .mplstyle file, or the name of a style of matplotlib's, for --figure.",
        flag_values=values,
    )


def read(args: flags.FlagValues) -> list[str]:
    """Returns the files that --figure names, each once.

    Raises UserError for a name that says no format, for a style that is none, and for a style
    without a figure.
    """
    from sae_jax import plots
    from sae_jax.errors import UserError

    names = [name for text in args.figure for name in re.split(r"(?<=\.pdf|\.svg|\.png),", text)]
    for name in names:
        plots.check_file(name)
    if args.style is not None and not names:
        raise UserError("--style is of the figures of --figure=NAME.pdf; give one")
    plots.check_style(args.style)
    return list(dict.fromkeys(names))
