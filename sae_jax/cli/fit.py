"""Fits scaling laws to the results of runs: `sae-jax fit`."""

import math
import shlex

from absl import flags

from sae_jax.cli import counts, figure_flags
from sae_jax.errors import UserError
from sae_jax.tables import as_number

SUMMARY = f"""Fit a scaling law to runs, with intervals, held-out error and the next run.

  sae-jax fit --results=sweeps/a --law=chinchilla --out=fits/a
  sae-jax fit --results=runs.csv --law=isoflop --loss=eval_fvu --out=fits/fvu --predict_flops=1e18
  sae-jax fit --results=sweeps/a --results=sweeps/b --select="architecture=topk lr<0.01" \\
      --law=openai_nk --predict_at="d_sae=16384 k=32" --out=fits/topk
  sae-jax fit --results=sweeps/a --law=chinchilla --by=architecture --out=fits/by

--results is a sweep's directory, a .csv or a .jsonl file, with columns d_sae, tokens, k, flops and
loss (or eval_loss), as far as the law needs them; --d_sae=NAME and the like say what a foreign file
calls them. Of several the rows are joined. --select keeps the rows that meet all of its terms (a
column, one of = != < <= > >=, a value). What varies among the runs and is not in the law is told.
--by=architecture (or site, k, several with commas) fits a law to each group: OUT/by.png shows all,
by.csv, table.md and table.tex their parameters, by.json whether their exponents differ and how one
law for all, common exponents and a law for each compare; OUT/architecture=topk and the like have
each fit. Settings in which the groups differ beside that are told.
Laws, for n latents, D tokens, C FLOPs:

  power       L = E + A C^-alpha, of the runs on the compute frontier
  isoflop     a parabola of log L in log n for each budget C; power laws of its minima in C
  chinchilla  L = E + A n^-alpha + B D^-beta
  openai_nk   L = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)
  joint       openai_nk's n and k, and B D^-delta

OUT gets fit.json (parameters, ci95, held-out error, frontier, warnings), fit.png, curve.csv
(points, curve, band and residuals), table.md and table.tex (the numbers, to copy), report.html, and
state.json, which `sae_jax.laws.load(OUT)` reads in Python; with --predict_flops also next_run.py, a
config for sae-jax train.

  sae-jax fit --results=sweeps/a --law=chinchilla --out=fits/a --figure=paper/sizes.pdf \\
      --panel=optimal --style=paper/mine.mplstyle

{figure_flags.HELP}
--panel says which panel of fit.png it is; the first by default.

The published replication of Chinchilla (Besiroglu et al. 2024), whose file gives C = 6 n D instead
of D:

  sae-jax fit --results=chinchilla_replication.csv --law=chinchilla --out=fits/chinchilla \\
      --d_sae="Model Size" --flops="Training FLOP" --flops_factor=6 --drop_largest_losses=5
"""

_LEAST, _MOST = 1e-50, 1e50  # FLOPs
_RENAMES = {
    "loss": "The column that is fitted: eval_fvu, ... By default loss, or eval_loss.",
    "d_sae": "What the file calls the dictionary size.",
    "tokens": "What the file calls the number of training tokens.",
    "k": "What the file calls k.",
    "flops": "What the file calls the training FLOPs.",
}


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax fit`."""
    flags.DEFINE_multi_string(
        "results", None, "A .csv or .jsonl file, or SWEEP", flag_values=values
    )
    flags.DEFINE_string(
        "select", None, 'Of the rows, as in "architecture=topk k=32".', flag_values=values
    )
    flags.DEFINE_string(
        "by", None, "A law for each value of this column, or columns.", flag_values=values
    )
    flags.DEFINE_string(
        "law", None, "power, isoflop, chinchilla, openai_nk or joint.", flag_values=values
    )
    flags.DEFINE_string("out", None, "Directory for the fit, made if absent.", flag_values=values)
    flags.DEFINE_string(
        "estimator",
        None,
        "huber (sum of Huber's function of log-loss residuals, delta 1e-3; the default), "
        "log_least_squares (openai_nk's default, as in the paper) or lad.",
        flag_values=values,
    )
    for name, text in _RENAMES.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    counts.define_float(
        "flops_factor",
        None,
        "F of C = F d_sae tokens, to compute a missing column of flops or tokens; by default "
        "12 d_in where there is a column d_in.",
        values,
    )
    flags.DEFINE_enum(
        "accounting",
        "flops",
        ["flops", "flops_executed"],
        "Compute: 12 n d a token, or what the step executes.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "holdout",
        None,
        "How many of the largest budgets are held out to measure extrapolation; by default the "
        "fewest that hold a tenth of the points.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "bootstrap", 400, "Resamples of runs.", lower_bound=50, upper_bound=100_000,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("seed", 0, "Of the bootstrap.", lower_bound=0, flag_values=values)
    flags.DEFINE_integer(
        "drop_largest_losses",
        0,
        "Keep only losses strictly below the N-th largest.",
        lower_bound=0,
        flag_values=values,
    )
    counts.define_float(
        "predict_flops",
        None,
        "A budget: its best d_sae and tokens, the loss to expect, and next_run.py.",
        values,
    )
    flags.DEFINE_multi_string(
        "predict_at",
        None,
        'What a run would lose, as in "d_sae=16384 k=32 tokens=1e9" (what the law needs) or '
        '"flops=1e18", the least of a budget',
        flag_values=values,
    )
    figure_flags.define(values)
    flags.DEFINE_string(
        "panel",
        None,
        "What --figure shows: loss, optimal, size, surface, isoflop or residuals, as the law has.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "config",
        None,
        "The recipe or FILE.py[:arg] that next_run.py starts from; by default the sweep's run that "
        "is nearest to it.",
        flag_values=values,
    )


def run(args: flags.FlagValues, overrides: dict[str, str]) -> None:
    """Fits the law, writes the results to --out, and prints a summary."""
    from sae_jax import laws
    from sae_jax.errors import choose
    from sae_jax.laws import fitting, group_report, next_run, outputs, report
    from sae_jax.laws.estimators import ESTIMATORS

    for name in ("results", "law", "out"):
        if args[name].value in (None, "", [""]):
            raise UserError(f"--{name} is needed; sae-jax fit --help has examples")
    choose(args.law, fitting.LAW_NAMES, "--law")
    if args.estimator:
        choose(args.estimator, ESTIMATORS, "--estimator")
    for name in ("predict_flops", "flops_factor"):
        value = args[name].value
        if value is not None and not _LEAST <= value <= _MOST:
            raise UserError(
                f"--{name} is {value:g}; it must be a positive number, {_LEAST:g} to {_MOST:g}"
            )
    if (args.config or overrides) and args.predict_flops is None:
        raise UserError("--config is of the next run; add --predict_flops=C to plan one")
    names = {name: args[name].value for name in _RENAMES}
    asked = [_assignments(text, names) for text in args.predict_at or []]
    base = next_run.base(args.config, overrides) if args.config or overrides else None
    papers = figure_flags.read(args)
    if args.panel and not papers:
        raise UserError("--panel is of the figures of --figure=NAME.pdf; give one")
    if args.panel and args.by:
        raise UserError("--panel is of one law's figures; with --by it is the laws of all groups")
    (outputs.check_groups if args.by else outputs.check_fit)(args.out)

    runs = laws.read(
        args.results, **names, flops_factor=args.flops_factor, select=args.select or ""
    )
    options = {
        "estimator": args.estimator,
        "accounting": args.accounting,
        "holdout": args.holdout,
        "drop_largest_losses": args.drop_largest_losses,
        "resamples": args.bootstrap,
        "seed": args.seed,
    }
    asked = {"flops": args.predict_flops, "start": base, "at": asked, "style": args.style}
    if args.by:
        found = laws.fit_by(runs, args.law, args.by, **options)
        values = found.save(args.out, papers=papers, **asked)
        print(group_report.text(values))
        print(f"\nwritten: {args.out}/{', '.join(outputs.GROUPS)}, and the fit of each group")
        for of in values["groups"].values():
            _say_next(of, f"{args.out}/{of['directory']}", f"runs/{of['directory']}")
    else:
        found = laws.fit(runs, args.law, **options)
        values = found.save(args.out, papers=papers, panel=args.panel, **asked)
        print(f"{report.text(values)}\n\nwritten: {args.out}/{', '.join(outputs.FIT)}")
        _say_next(values, args.out, "runs/next")
    for file in papers:
        print(f"written: {file}")
    if values["refused"]:
        refused = "; ".join(values["refused"])
        raise UserError(f"{args.out} has the fit, but not all that was asked: {refused}")


def _say_next(values: dict, out: str, workdir: str) -> None:
    """Prints the command of the next run where a fit planned one."""
    from sae_jax import paths
    from sae_jax.laws import next_run

    if (values["prediction"] or {}).get("d_sae"):
        file = shlex.quote(f"--config={paths.path(out) / next_run.FILE}")
        print(f"next: sae-jax train {file} {shlex.quote(f'--workdir={workdir}')}")


def _assignments(text: str, names: dict[str, str | None]) -> dict[str, float]:
    """Returns the numbers of NAME=NUMBER with spaces between them.

    Raises UserError for what is none, and for a name that is neither ours nor the table's.

    Args:
      text: what the user wrote.
      names: what the table calls columns, by our names, where it is not the same.
    """
    from sae_jax.errors import choose
    from sae_jax.laws.api import quantity_names

    out = {}
    for term in text.split():
        name, _, value = term.partition("=")
        number = as_number(value)
        if not name or number is None or not math.isfinite(number) or name in out:
            raise UserError(
                f"--predict_at: {term!r} is not NAME=NUMBER, once for each name, as in "
                '"d_sae=16384 k=32"'
            )
        out[choose(name, list(quantity_names(names)), "--predict_at: the name")] = number
    if not out:
        raise UserError('--predict_at is empty; write NAME=NUMBER, as in "d_sae=16384 k=32"')
    return out
