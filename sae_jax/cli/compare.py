"""Compares sweeps by two metrics of their runs: `sae-jax compare`."""

from absl import flags

from sae_jax.cli import figure_flags

SUMMARY = f"""Compare groups of runs: FVU, CE recovered or any score against L0.

  sae-jax compare --results=sweeps/a --out=compared/a
  sae-jax compare --results=sweeps/topk --results=sweeps/jumprelu --y=ce_recovered_zero \\
      --out=compared/ce --figure=paper/ce.pdf
  sae-jax compare --results=runs.csv --y=probe_f1 --x=l0 --by=d_sae --select="architecture=topk" \\
      --at=16,32,64 --out=compared/probe

--results is a sweep, a .csv or a .jsonl file; of several the rows are joined. --y and --x are
columns of theirs, or numbers of the eval.json that `sae-jax eval --run` leaves in a sweep's runs
(ce_recovered_zero, kl_spliced, ...). --by says whose values make the groups, by default the first
of architecture, kind, results, site, d_sae and (unless x is L0) k that varies.

Runs that differ by their seed alone are one setting, with mean and standard deviation. Settings
that no other of their group beats in both metrics are its frontier, which the figure draws as a
line; the others are faint. Of settings with the same x, within 1%, only the best is on it. The
table compares the groups at equal x: a setting there, its ends up to 5% away, and in between an
interpolation in the logarithm, seed by seed; each seed is moved from its own x to that of the
table, none is left out for it. A cell of fewer seeds than its group has says of how many. What
groups do not share, what varies within them, targets of L0 that were missed, and what the table
lacks is said.

OUT gets compare.png, compare.csv (every setting) and table.md; table.tex has the groups at equal x,
frontier.tex the settings on their frontiers.
{figure_flags.HELP}

In Python: sae_jax.laws.compare("sweeps/a").
"""


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax compare`."""

    def string(name, text):
        flags.DEFINE_string(name, None, text, flag_values=values)

    flags.DEFINE_multi_string(
        "results", None, "A sweep, a .csv or a .jsonl file", flag_values=values
    )
    string("out", "Directory for figure and tables, made if absent.")
    string("y", "The metric that is compared; eval_fvu.")
    string("x", "Against which one, of which less is better; eval_l0.")
    string("by", "Columns, with commas between them, whose values make the groups.")
    string("select", 'Conditions that runs must meet, as in "d_sae=16384 eval_l0<60".')
    flags.DEFINE_enum(
        "best", None, ["low", "high"], "Values of y that are better, where its name does not say.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list(
        "at", None, "Values of x for the table; powers of two that all groups reach within 5%.",
        flag_values=values,
    )  # fmt: skip
    string(
        "alike",
        "Columns in which runs of one setting are alike; all settings that are known, but seeds.",
    )
    figure_flags.define(values)


def run(args: flags.FlagValues, overrides: dict[str, str]) -> None:
    """Compares the runs, writes figure and tables to --out, and prints the table."""
    del overrides
    from sae_jax.errors import UserError
    from sae_jax.laws import comparison

    for name in ("results", "out"):
        if args[name].value in (None, "", [""]):
            raise UserError(f"--{name} is needed; sae-jax compare --help has examples")
    figures = figure_flags.read(args)
    comparison.check_out(args.out)
    compared = comparison.compare(
        args.results,
        args.y,
        args.x,
        by=args.by,
        select=args.select or "",
        best=args.best,
        at=args.at and [_place(text) for text in args.at],
        alike=args.alike,
    )
    compared.save(args.out, figures, args.style)
    print(compared)
    for file in (f"{args.out}/{', '.join(comparison.FILES)}", *figures):
        print(f"written: {file}")


def _place(text: str) -> float:
    from sae_jax.errors import UserError

    try:
        return float(text)
    except ValueError:
        raise UserError(f"--at: {text!r} is no number") from None
