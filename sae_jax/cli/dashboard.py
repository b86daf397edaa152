"""Shows every latent of an SAE on a page: `sae-jax dashboard`."""

from absl import flags

from sae_jax.cli import (
    counts,
    made_before,
    neuronpedia_flags,
    opened_saes,
    opened_sources,
    path_lists,
    ports,
)
from sae_jax.errors import UserError

SUMMARY = f"""Show every latent of an SAE on a page: what it fires on, promotes, and does.

  sae-jax dashboard --run=runs/a --serve

looks at a million tokens of the run's store, once, which takes a few minutes and goes on where it
was stopped, keeps what it found in runs/a/dashboard/collection, and opens http://127.0.0.1:PORT for
this machine only, until Ctrl-C. The next time it opens at once. The page has an index of all
latents to sort, filter and search, and of each the texts on which it is most and less active, the
output tokens that it promotes, and its neighbours. With the language model (the store's, if it is
the shipped one or on the hub; else --model=DIR) it takes any sentence of yours, shows the latents
of each token, finds those that are active in some texts and not in others, clamps latents while the
model writes, and shows what ablating one does.

  sae-jax dashboard --run=runs/a --out=site

writes it as files instead, which any web server serves and which need none of us: it has all but
what needs the model. About 6 to 30 kB a latent; what there will be is said before.

  sae-jax dashboard --sae=hf://ORG/REPOSITORY/FOLDER --model=hf://ORG/MODEL --text=books.txt \\
      --site=resid_post.6 --out=boards/a --serve

is for any SAE that sae_jax reads, on text of yours; or with --store, on a store's rows.

  sae-jax dashboard --run=runs/a --labels=labels.csv       names of latents: latent,label[,score]
  sae-jax dashboard --run=runs/a --explanations=DIR        what sae-jax explain found; RUN/explain
  sae-jax dashboard --run=runs/a --latents=1,5,9 --single=page.html    one file that needs no other

From another machine: ssh -L 8422:127.0.0.1:8422 HOST is safest. --host=0.0.0.0 listens to all who
can reach this machine, and prints an address with a secret, without which nothing is answered; what
is sent is not encrypted. A latent's activation is the length of what it adds, in the model's units.

{neuronpedia_flags.HELP}
"""

_PORT = 8422
_ASKED = (  # the flags that a collection is made by
    "store text tokens_file context_length collapse_newlines site target_site include_excluded "
    "tokens top intervals per_interval before after seed"
).split()


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax dashboard`."""

    def string(name, text):
        flags.DEFINE_string(name, None, text, flag_values=values)

    def integer(name, default, text, lowest, most):
        flags.DEFINE_integer(
            name, default, text, lower_bound=lowest, upper_bound=most, flag_values=values
        )

    string("run", "Directory of a run.")
    string("sae", "Any SAE instead: what sae_jax.load reads, such as hf://ORG/REPOSITORY/FOLDER.")
    string("kind", "Of a Gemma Scope file, which does not say it: autoencoder or transcoder.")
    string(
        "out",
        "Directory of the files that are written without --serve; RUN/dashboard/page. With --sae, "
        "and of a run in an object store, OUT/collection is what was collected.",
    )
    ports.define("serve", _PORT, "Serve the page", values)
    string("host", "With --serve: the address to listen at, such as 0.0.0.0; this machine alone.")
    string("store", "Look for texts in this store; the run's.")
    string("site", "Site of the store or of the model; the run's, or what the SAE's file says.")
    string("target_site", "The site that a transcoder predicts; the run's.")
    opened_sources.define_model(values)
    string("tokenizer", "Directory of a tokenizer, where there is no model.")
    path_lists.define("text", "Text files instead of a store, as for harvest.", values)
    string("tokens_file", "An .npy or .npz of token ids (sequences, length), instead of a store.")
    integer("context_length", None, "With --text: tokens of a context; at most 1024.", 1, 2**20)
    flags.DEFINE_bool(
        "collapse_newlines", False, "With --text: make one of several newlines.", flag_values=values
    )
    flags.DEFINE_bool(
        "include_excluded", None, "Look at all positions, BOS too; as the run was trained.",
        flag_values=values,
    )  # fmt: skip
    counts.define("tokens", 1_000_000, "Look at about so many tokens, spread evenly.", values)
    integer("top", 20, "Examples of a latent with its highest activations.", 1, 1000)
    integer("intervals", 12, "Parts of 0 to the maximum that examples are drawn from.", 0, 100)
    integer("per_interval", 5, "Examples to draw from each.", 1, 1000)
    integer("before", 28, "Tokens of an example before the peak.", 0, 4096)
    integer("after", 14, "Tokens of an example after the peak.", 0, 4096)
    integer("seed", 0, "Seed of what is drawn.", 0, 2**31 - 1)
    string("labels", "A .csv or .json of what latents are called: latent, label and perhaps score.")
    string(
        "explanations",
        "Directory of what sae-jax explain found: labels, and all that was said; RUN/explain.",
    )
    string("latents", 'With --single: which, such as "1,5,9"; by default 30 across the densities.')
    string("single", "Write one page that needs no other file, of up to 200 latents, here.")
    flags.DEFINE_bool(
        "overwrite", False, "Replace a collection or files with other settings.", flag_values=values
    )
    neuronpedia_flags.define(values)


def run(args, overrides) -> None:
    """Makes or opens the collection, and serves or writes the page."""
    del overrides
    import dataclasses

    from sae_jax import lm
    from sae_jax.interpret import dashboard
    from sae_jax.local_server import LOCAL

    if bool(args.run) == bool(args.sae):
        raise UserError("give either --run=RUN or --sae=PATH")
    if args.sae and not args.out:
        raise UserError("--sae needs --out=DIR, for what is collected about its latents")
    if args.host and args.serve is None:
        raise UserError("--host is where --serve listens; give --serve too")
    if args.latents and not args.single:
        raise UserError("--latents chooses those of --single=FILE.html; give that too")
    if args.single and args.serve is not None:
        raise UserError("give either --serve or --single")
    if args.single and not args.run:
        raise UserError("--single shows the evaluation of a run besides; give --run=RUN")
    neuronpedia_flags.check(args)
    numbers = _numbers(args.latents)
    home, out = _directories(args)
    chosen = opened_sources.chosen(args)
    found = opened_saes.open_sae(args.run, args.sae, args.kind, chosen)
    which = {"sae": found.name, **found.about}
    there = _there(args, home, which, found.sae.config.d_sae)
    labels = args.labels and dashboard.read_labels(args.labels, found.sae.config.d_sae)
    explained = _explained(args, found)
    data = dataclasses.replace(found.data, **opened_sources.chosen(args))
    store, model, settings = opened_sources.open_store_and_model(args, data, lm.open_model)
    tokenizer = opened_sources.open_tokenizer(args, model)
    if args.single:
        _check_single(args, found, store, numbers)
    elif args.serve is None and not args.neuronpedia:
        dashboard.check_folder(out)
    collection, neurons = _collected(
        args,
        home,
        found.sae,
        there,
        lambda: opened_sources.make_source(args, data, store, model, heldout=False),
        {**which, **settings},
    )
    if args.single:
        _write_single(args.single, found, collection, store, tokenizer, model, numbers)
        return
    sites = tuple(collection.about.settings["site"].split(","))
    written_site = None if found.sae.config.kind == "crosscoder" else sites[-1]
    latents = dashboard.Latents(
        collection,
        found.sae,
        tokenizer,
        model,
        written_site=written_site,
        labels=labels,
        neurons=neurons,
        explained=explained,
    )
    if args.neuronpedia:
        neuronpedia_flags.write(args, latents, model, written_site)
        return
    about = {
        "title": f"Latents of {found.path.name}",
        "model": tokenizer.name,
        "metrics": _metrics(found.path) if found.is_run else (),
    }
    if args.serve is None:
        page = dashboard.export(out, latents, dashboard.about(latents, **about), args.overwrite)
        print(f"Written: {page}. A browser needs a web server for it, such as\n"
              f"  python -m http.server --bind 127.0.0.1 --directory {page.parent}")  # fmt: skip
        return
    live = dashboard.Live(latents, model, sites)
    known = dashboard.about(latents, **about, shard=dashboard.SHARD, can=live.can)
    host = args.host or LOCAL
    server, address = dashboard.open_server(latents, known, live, args.serve, host)
    with server:
        print(f"{found.sae.config.d_sae:,} latents at {address}; Ctrl-C ends it", flush=True)
        server.serve_forever()


def _directories(args) -> tuple:
    """Returns where what is collected lies, and where files are written: of a run on this machine
    --out is for the latter alone, since a web server needs no more."""
    from sae_jax import interop, paths

    run = args.run and interop.locate(args.run)
    if args.out and (not run or paths.is_remote(str(run))):
        return (paths.local(args.out),) * 2
    home = paths.local(run / "dashboard")
    return home, paths.local(args.out) if args.out else home / "page"


def _explained(args, found):
    """Returns what was said of the latents, None where nothing was and nothing is asked for."""
    from sae_jax import paths
    from sae_jax.interpret import dashboard
    from sae_jax.interpret.explain import records

    place = args.explanations
    if place is None and found.is_run and not paths.is_remote(str(found.path)):
        there = found.path / "explain"
        place = there if (there / records.EXPLANATIONS).is_file() else None
    return place and dashboard.read_explanations(place, found.sae.config.d_sae)


def _numbers(text: str | None) -> list[int] | None:
    """Returns the numbers in a list such as "1,5,9"."""
    from sae_jax.interpret.page import MOST_LATENTS

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 16 for part in parts):
        raise UserError(f'--latents={text}: write the numbers of latents, such as "1,5,9"')
    if len(parts) > MOST_LATENTS:
        raise UserError(f"--latents has {len(parts)}; one page shows up to {MOST_LATENTS}")
    return list(dict.fromkeys(map(int, parts)))


def _check_single(args, found, store, chosen) -> None:
    """Raises UserError where one page cannot be made of the latents `chosen`, or None."""
    from sae_jax.evaluate import report

    if wrong := [i for i in chosen or () if i >= found.sae.config.d_sae]:
        raise UserError(f"no latent {wrong[0]}: there are 0 to {found.sae.config.d_sae - 1:,}")
    if store is None or opened_sources.has_own_text(args):
        raise UserError("--single is of a store's texts; leave it out, and the folder is written")
    if not report.is_of(found.path / "eval.json", found.path):
        raise UserError(
            f"--single shows {found.path / 'eval.json'}, which is not there, or not of the run as "
            f"it ended; make it with: sae-jax eval --run={found.path}"
        )


def _write_single(file, found, collection, store, tokenizer, model, chosen) -> None:
    """Writes one page of some latents, with the run's evaluation and training curves."""
    from sae_jax import interpret, paths
    from sae_jax.evaluate import report

    out, evaluation = paths.local(file), found.path / "eval.json"
    metrics = found.path / "metrics.jsonl"
    interpret.write_page(
        out,
        found.sae,
        report.load(evaluation),
        store,
        tokenizer,
        model,
        metrics_file=metrics if metrics.is_file() else None,
        latents=chosen,
        collection=collection,
        title=f"Latents of {found.path.name}",
    )
    print(f"Written: {out}")


def _there(args, home, settings: dict, d_sae: int):
    """Returns the collection that is in `home`, None if there is none, and takes from it what flags
    that are not given were when it was made.

    Raises UserError if it is of another SAE, or was made by other flags than those given, and may
    not be made again.
    """
    from sae_jax.interpret.collection import Collection

    place = home / "collection"
    if not (place / "collection.json").is_file():
        return None
    there = Collection(place)
    same = made_before.check(args, place, there, settings | {"d_sae": d_sae}, _ASKED)
    return there if same else None


def _collected(args, home, sae, there, make_source, settings: dict) -> tuple:
    """Returns the collection and the neurons, or None, and makes them where they are missing.

    Args:
      args: the flags.
      home: the directory of both.
      sae: the SAE.
      there: the collection that is there, or None.
      make_source: makes what rows are read of.
      settings: what the collection is to say of the SAE and its model.
    """
    from sae_jax.interpret import dashboard
    from sae_jax.interpret.collect import collect
    from sae_jax.interpret.collection import Collection

    beside = home / "neurons.npz"
    wanted = sae.config.d_in <= dashboard.WIDEST
    if there is not None and (beside.is_file() or not wanted):
        return there, dashboard.Neurons.load(beside) if wanted else None
    source = make_source()
    if there is None:
        home.mkdir(parents=True, exist_ok=True)
        asked = {name: args[name].value for name in _ASKED}
        names = ("tokens", "top", "intervals", "per_interval", "before", "after", "seed")
        place = home / "collection"
        with made_before.replacing(place) as made:
            collect(
                sae,
                source,
                made,
                **{name: asked[name] for name in names},
                settings=settings | {"asked": asked},
                overwrite=args.overwrite,
            )
            beside.unlink(missing_ok=True)
        there = Collection(place)
    neurons = dashboard.correlated_neurons(sae, source) if wanted else None
    if neurons is not None:
        neurons.save(beside)
    return there, neurons


def _metrics(run) -> list[tuple[str, float, str]]:
    """Returns the metrics of a run's evaluation, if there is one of the run as it ended."""
    from sae_jax.evaluate import report

    file = run / "eval.json"
    if not report.is_of(file, run):
        return []
    return [line for _, lines in report.load(file).sections() for line in lines]
