"""Evaluates an SAE, alone and inside its language model: `sae-jax eval`."""

import re
import sys

from absl import flags

from sae_jax.cli import counts, distributed, opened_saes, opened_sources, path_lists
from sae_jax.errors import UserError

SUMMARY = """Evaluate an SAE, alone and inside its language model.

On a run, the store, sites and held-out rows are the run's own:

  sae-jax eval --run=runs/a --model=stories260K

writes runs/a/eval.json, eval_latents.npz (density, mean and maximal activation of every latent),
eval_dead_latents.txt (the indices of those that never fired) and figures, and prints a table.
Without --model there is no cross-entropy, except where the store is from the shipped model or from
one on the hub. Any SAE that sae_jax reads, on tokens of your own:

  sae-jax eval --sae=saelens_folder --model=stories260K --tokens_file=tokens.npz --out=eval.json

Of a sweep, all done runs that meet every term of --select (as of `sae-jax export`):

  sae-jax eval --results=sweeps/a --select="d_sae=16384 k<64" --model=stories260K

writes RUN/eval.json, eval_latents.npz and eval_dead_latents.txt of each, and sweeps/a/evals.csv:
results.csv with more columns, eval_fvu, eval_l0, eval_ce_recovered_zero and the like, which
`sae-jax fit --results=sweeps/a/evals.csv` reads. eval_rows says on how many held-out rows these
are; eval_loss is still the run's own, of up to 65,536. Runs on the same sites share one reading of
the rows, and of a batch the runs of the language model but for one with each SAE in its place. The
same command again goes on where it was; what is evaluated with these settings is left as it is,
unless the run was trained further since, or again. What has other settings is refused, unless
--overwrite is given, which makes evaluations of different --tokens alike:

  sae-jax eval --results=sweeps/a --tokens=200e3 --overwrite

A run on a synthetic world (config.data.store=world:...) is evaluated on rows of the world that it
did not train on, with how much of the world's features it found.

Excluded positions (BOS and other high-norm ones) are neither counted nor replaced, unless you give
--include_excluded. Several processes (--distributed) share the batches out, each on its first
device; process 0 writes. What each number is: `python -m pydoc sae_jax.evaluate.metrics`.
"""


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax eval`."""

    def string(name, text):
        flags.DEFINE_string(name, None, text, flag_values=values)

    string("run", "Directory of a run.")
    string("results", "A sweep, of which many runs are evaluated.")
    string("select", 'Of the sweep, as in "d_sae=16384 k=32"; all that are done.')
    string("sae", "Any SAE instead: what sae_jax.load reads, such as hf://ORG/REPOSITORY/FOLDER.")
    string("kind", "Of a Gemma Scope file, which does not say it: autoencoder or transcoder.")
    string("store", "Evaluate on this store's held-out rows; the run's.")
    string("site", "Site of the store or of the model; the run's, or what the SAE's file says.")
    string("target_site", "The site that a transcoder predicts; the run's.")
    counts.define("tokens", 1_000_000, "Evaluate on at most about so many tokens.", values)
    counts.define(
        "lm_tokens", 262_144, "Run the language model on at most about so many tokens.", values
    )
    opened_sources.define_model(values)
    string("tokens_file", "An .npy or .npz of token ids (sequences, length), instead of a store.")
    path_lists.define("text", "Text files instead of a store, as for harvest.", values)
    flags.DEFINE_integer(
        "context_length", None, "With --text: tokens of a context; the model's own, <= 1024.",
        lower_bound=1, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "collapse_newlines", False, "With --text: make one of several newlines.", flag_values=values
    )
    flags.DEFINE_bool(
        "include_excluded",
        None,
        "Count and replace all positions, BOS too; as the run was trained.",
        flag_values=values,
    )
    counts.define_float(
        "holdout_fraction", None, "Of the store's sequences, 0 to 1; the run's.", values,
        lower_bound=0.0, upper_bound=1.0,
    )  # fmt: skip
    string("sequences", "START:STOP of --tokens_file or --text for the SAE alone; all.")
    string("lm_sequences", "START:STOP for the language model's part; as --sequences.")
    string(
        "out",
        "Where the JSON goes; RUN/eval.json, and nowhere for --sae. With --results a "
        "directory, for RUN_ID/eval.json of each and evals.csv.",
    )
    flags.DEFINE_bool(
        "overwrite", False, "Replace an evaluation with other settings that is there.",
        flag_values=values,
    )  # fmt: skip
    distributed.define(values)


def run(args, overrides) -> int:
    """Evaluates the SAE that the flags name, and returns the exit code."""
    del overrides
    from sae_jax.train import preemption

    try:
        with distributed.joined(args, stops_at_a_step=False):
            _evaluate_sweep(args) if args.results else _evaluate(args)
    except preemption.PreemptedError:
        left = "start it again to go on" if args.results else "nothing was written"
        print(f"sae-jax eval: stopped by SIGTERM; {left}", file=sys.stderr)
        return preemption.EXIT_CODE
    return 0


def _evaluate(args) -> None:
    from sae_jax import lm, paths
    from sae_jax.activations import is_world
    from sae_jax.evaluate import figures
    from sae_jax.evaluate.report import (
        dead_latents_file,
        evaluate,
        full_settings,
        read_saved,
        save,
    )
    from sae_jax.evaluate.sources import check_sites
    from sae_jax.train.directory import is_writer

    if bool(args.run) == bool(args.sae):
        raise UserError("give either --run=RUN or --sae=PATH, or --results=SWEEP")
    if args.select:
        raise UserError("--select chooses among the runs of --results=SWEEP; give that too")
    chosen = opened_sources.chosen(args)
    opened = opened_saes.open_sae(args.run, args.sae, args.kind, chosen)
    sae, path = opened.sae, opened.path
    source, model, settings = _open(args, opened.data, lm.open_model)
    settings = {"sae": opened.name, **opened.about, **settings}
    out = args.out or (path / "eval.json" if args.run else None)
    if out is not None:  # so that it is refused before the work
        check_sites(sae, source)
        about = full_settings(sae.config.kind, source, model, args.lm_tokens, settings)
        read_saved(paths.path(out), about, args.overwrite)
    evaluation = evaluate(sae, source, model, args.lm_tokens, settings)
    if not is_writer():
        return
    print(evaluation.table())
    if model is None and not is_world(opened.data.store):
        print("No cross-entropy: it needs --model=DIR, the language model's directory.")
    if out is None:
        print("Nothing was written; --out=FILE.json keeps it.")
        return
    save(evaluation, out, args.overwrite)
    files = figures.save_all(evaluation, out, path / "metrics.jsonl" if opened.is_run else None)
    print(f"Written: {', '.join(map(str, [out, dead_latents_file(out), *files]))}")


def _evaluate_sweep(args) -> None:
    """Evaluates the runs of a sweep that the flags select, and writes the table of them."""
    import dataclasses
    import functools

    from sae_jax import interop, lm, paths
    from sae_jax.evaluate import many, report
    from sae_jax.interop.select import select, still_done
    from sae_jax.sweep.directory import SweepDirectory
    from sae_jax.train.directory import find_store, is_writer
    from sae_jax.train.evaluated_rows import unlike_evaluations
    from sae_jax.train.watching import at_once

    for name in ("run", "sae", "kind"):
        if getattr(args, name):
            raise UserError(f"--{name} is of one SAE, and --results of many; leave one out")
    if args.out and args.out.endswith(".json"):
        raise UserError(f"--out={args.out}: with --results it is a directory, of many files")
    sweep = paths.path(args.results)
    selected = still_done(sweep, select(sweep, args.select or ""))
    rows = {row["run_id"]: row for row in selected}
    directory = SweepDirectory(sweep)
    runs = {run.id: run for run in directory.runs}
    if strange := sorted(rows.keys() - runs.keys()):
        raise UserError(f"{sweep}/results.csv has a run {strange[0]!r} that sweep.json has not")
    out = paths.path(args.out) if args.out else None
    groups: dict[tuple, list[str]] = {}
    for run_id in rows:
        config = runs[run_id].config
        data = dataclasses.replace(config.data, **opened_sources.chosen(args))
        same = (data.store, data.site, data.target_site, data.holdout_fraction)
        groups.setdefault((config.sae.kind, *same, data.include_excluded), []).append(run_id)
    open_model = functools.cache(lm.open_model)
    work, done = [], {}
    for (kind, *_), names in groups.items():
        first = runs[names[0]]
        data = find_store(directory.run_path(first), first.config.data)
        source, model, about = _open(
            args, dataclasses.replace(data, **opened_sources.chosen(args)), open_model
        )
        jobs = []
        places = [directory.run_path(runs[name]).absolute() for name in names]
        latest = at_once(opened_saes.latest, places)
        for name, path, (checkpoint, which) in zip(names, places, latest, strict=True):
            settings = {"sae": str(path), **which, **about}
            jobs.append(
                many.Job(
                    name,
                    runs[name].config.sae,
                    functools.partial(interop.load, checkpoint),
                    (out / name if out else path) / "eval.json",
                    report.full_settings(kind, source, model, args.lm_tokens, settings),
                    args.overwrite,
                )
            )
        done |= many.read_done(jobs)
        work.append(([job for job in jobs if job.name not in done], source, model))
    there = len(done)
    table = (out or sweep) / "evals.csv"
    finished = {name for name, state in directory.states().items() if state == "done"}

    @functools.cache
    def is_there(name: str) -> bool:
        path = directory.run_path(runs[name]) if name in finished else None
        return path is not None and report.is_of((out / name if out else path) / "eval.json", path)

    for jobs, source, model in work:
        for found in many.evaluate_jobs(jobs, source, model, args.lm_tokens):
            done |= found
            if is_writer():
                _write_table(table, rows, done, is_there)
    if not is_writer():
        return
    written = _write_table(table, rows, done, is_there)
    print(_shown({run.id: directory.name(run) for run in directory.runs}, done))
    print(f"Written: {table}; eval.json of {len(done) - there} runs, {there} were there")
    if unlike := unlike_evaluations(written):
        print(f"note: of {table}, {unlike}; one --tokens with --overwrite makes them alike")


def _write_table(file, rows: dict[str, dict], done: dict[str, dict], is_there) -> list[dict]:
    """Writes the table, and returns its rows, with what is in it of other runs.

    Args:
      file: the table.
      rows: those of results.csv, by the run's id.
      done: the evaluations, by the run's id.
      is_there: whether a run, by its id, is finished and has an evaluation of what it is now.
    """
    from sae_jax import paths
    from sae_jax.evaluate.many import columns
    from sae_jax.tables import as_csv, read_csv
    from sae_jax.train.watching import at_once

    before = [row for _, row in read_csv(file)] if file.is_file() else []
    new = {name: rows[name] | columns(done[name]) for name in rows if name in done}
    others = [row for row in before if row.get("run_id") not in new]
    there = at_once(lambda row: is_there(row.get("run_id")), others)
    kept = [row for row, is_kept in zip(others, there, strict=True) if is_kept]
    written = [*kept, *new.values()]
    file.parent.mkdir(parents=True, exist_ok=True)
    paths.write(file, as_csv(written), by=paths.this_process())
    return written


def _shown(names: dict[str, str], done: dict[str, dict]) -> str:
    """Returns a few columns of all runs for people, whose names are by the run's id."""
    from sae_jax.evaluate.many import columns

    shown = ["eval_fvu", "eval_l0", "eval_dead_fraction", "eval_ce_recovered_zero", "eval_mcc"]
    values = {name: columns(found) for name, found in done.items()}
    shown = [name for name in shown if any(name in found for found in values.values())]
    lines = [f"{'run':18}" + "".join(f"{name.removeprefix('eval_'):>18}" for name in shown)]
    for run_id, found in values.items():
        cells = (found.get(column) for column in shown)
        text = "".join(f"{'' if cell is None else f'{cell:.5g}':>18}" for cell in cells)
        lines.append(f"{run_id:18}{text}  {names[run_id]}")
    return "\n".join(lines)


def _open(args, data, open_model) -> tuple:
    """Returns (source, model or None, settings), as `opened_sources.open_source` does."""
    slices = _slice(args.sequences, "--sequences"), _slice(args.lm_sequences, "--lm_sequences")
    if slices != (None, None) and not opened_sources.has_own_text(args):
        raise UserError("--sequences and --lm_sequences are of --tokens_file or --text; give one")
    return opened_sources.open_source(args, data, open_model, *slices)


def _slice(text: str | None, flag: str) -> slice | None:
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,15}):([0-9]{1,15})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"{flag} is START:STOP, such as 0:64, not {text!r}")
    return slice(int(match[1]), int(match[2]))
