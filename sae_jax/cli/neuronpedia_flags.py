"""Defines the flags of `sae-jax dashboard` that bring latents to Neuronpedia, and does it."""

from absl import flags, logging

from sae_jax.errors import UserError

flags.disclaim_key_flags()  # --help shows them with those of the command

HELP = """\
--neuronpedia=DIR writes what Neuronpedia and SAEDashboard take instead of a page:

  sae-jax dashboard --run=runs/a --neuronpedia=np --np_model=gpt2-small --np_source=6-mine-res

writes np/batch-N.json, the requests that add latents to a source set of your own (make it at
neuronpedia.org/source-set/new: here mine-res, of which 6-mine-res is layer 6). The labels of
--labels, and what `sae-jax explain` found, become explanations. With --push they are sent, with
your key from the environment:

  NEURONPEDIA_API_KEY=... sae-jax dashboard --run=runs/a ... --push     (--dry_run: only shown)

The same command again goes on where it stopped. Latents that never fired have no page there.
--np_layout=saedashboard writes batch-N.json as SAEDashboard does, and bulk the layout that its
neuronpedia_export makes of them, which Neuronpedia imports by arrangement. What differs from
SAEDashboard: `python -m pydoc sae_jax.interpret.neuronpedia.export`."""

_KEY = "NEURONPEDIA_API_KEY"
_RELEASE = {  # fields of a Release, with what they are
    "release": "Name of the release that the source set belongs to; the set's.",
    "title": "What it is called.",
    "creator": "Who made it.",
    "creator_id": "The creator's id at Neuronpedia.",
    "link": "An address where more is told.",
}


def define(values: flags.FlagValues) -> None:
    """Defines the flags."""

    def string(name, text, default=None):
        flags.DEFINE_string(name, default, text, flag_values=values)

    string("neuronpedia", "Write what Neuronpedia takes to this directory, instead of a page.")
    string("np_model", "Neuronpedia's name of the language model, such as gpt2-small.")
    string(
        "np_source",
        "Neuronpedia's name of the SAE, such as 6-mine-res: the layer and the name of the set, "
        "and perhaps __ and what tells SAEs of one layer apart.",
    )
    flags.DEFINE_enum(
        "np_layout", "upload", ["upload", "bulk", "saedashboard"], "What to write.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "np_batch", None, "Latents of a file; 32 of an upload, else 128.", 1, 128,
        flag_values=values,
    )  # fmt: skip
    string("np_dataset", "What text the examples are from, in words or as a name on the hub.")
    string("np_method", "Neuronpedia's name of the method that made --labels.")
    string("np_labeller", "Neuronpedia's name of the model that wrote --labels.")
    for name, text in _RELEASE.items():
        string(f"np_{name}", f"Of --np_layout=bulk: {text}")
    string("np_weights", "Of --np_layout=bulk: hf://ORG/REPOSITORY/FOLDER of the SAE.")
    flags.DEFINE_bool("push", False, "Send the upload.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "With --push: show the requests.", flag_values=values)
    string("np_key_env", "Name of the environment variable with your key.", _KEY)
    string("np_server", "Where --push sends to; https://www.neuronpedia.org.")


def check(args) -> None:
    """Raises UserError for flags that do not go together, before any work."""
    given = [name for name in args if name.startswith("np_") and args[name].present]
    if not args.neuronpedia:
        if stray := [*given, *(name for name in ("push", "dry_run") if args[name].value)]:
            raise UserError(f"--{stray[0]} is of --neuronpedia=DIR; give that too")
        return
    if args.serve is not None or args.single:
        raise UserError("--neuronpedia is instead of --serve and --single; give one of them")
    if not args.np_model or not args.np_source:
        raise UserError(
            "--neuronpedia needs Neuronpedia's names: --np_model, such as gpt2-small, and "
            "--np_source, such as 6-mine-res"
        )
    from sae_jax.interpret import neuronpedia

    neuronpedia.check_names(args.np_model, args.np_source)
    if args.push and args.np_layout != "upload":
        raise UserError(f"--push is of --np_layout=upload; {args.np_layout} cannot be sent")
    if args.dry_run and not args.push:
        raise UserError("--dry_run shows what --push would send; give that too")
    for name in (*_RELEASE, "weights"):
        if args[f"np_{name}"].value is not None and args.np_layout != "bulk":
            raise UserError(f"--np_{name} is of --np_layout=bulk; leave it out")
    for name in ("method", "labeller"):
        if args[f"np_{name}"].value is not None and not args.labels:
            raise UserError(f"--np_{name} is of the labels of --labels=FILE; give these too")


def write(args, latents, model, site: str | None) -> None:
    """Writes what the flags say, sends it, and says so.

    Args:
      args: the flags.
      latents: the `dashboard.Latents` of the SAE.
      model: the language model, or None.
      site: the site that the SAE writes to, None where there are several.
    """
    from sae_jax.interpret import neuronpedia

    layer = args.np_source.partition("-")[0]
    if site is not None and layer != site.rpartition(".")[2]:
        logging.warning("--np_source says layer %s; the SAE writes %s", layer, site)
    export = neuronpedia.Export(
        latents.collection,
        latents.sae,
        latents.tokenizer,
        site,
        args.np_model,
        args.np_source,
        model=model,
        labels=latents.labels.names if args.labels else {},
        explanations=latents.explained.said if latents.explained else {},
        method=args.np_method,
        labeller=args.np_labeller,
        dataset=args.np_dataset or "",
    )
    batch = {"batch": args.np_batch} if args.np_batch else {}
    if args.np_layout == "bulk":
        written = neuronpedia.write_bulk(args.neuronpedia, export, _release(args), **batch)
    elif args.np_layout == "saedashboard":
        written = neuronpedia.write_saedashboard(args.neuronpedia, export, **batch)
    else:
        written = neuronpedia.write_upload_batches(args.neuronpedia, export, **batch)
    without = f"; {written.left_out:,} that never fired are left out" if written.left_out else ""
    print(f"Written: {written.path}, {written.latents:,} latents{without}")
    if not args.push:
        return
    server = {"url": args.np_server} if args.np_server else {}
    server["key_variable"] = args.np_key_env
    if args.dry_run:
        print(neuronpedia.planned(args.neuronpedia, **server))
        return
    pushed = neuronpedia.push(args.neuronpedia, **server)
    print(
        f"Sent: {len(pushed.sent)} files, {pushed.size:,} bytes, to {pushed.address}; "
        f"{pushed.there} were there before"
    )


def _release(args):
    """Returns what the flags say of the release."""
    from sae_jax import hub
    from sae_jax.interpret import neuronpedia

    given = {name: args[f"np_{name}"].value for name in _RELEASE}
    given["name"], given["url"] = given.pop("release"), given.pop("link")
    fields = {name: value for name, value in given.items() if value is not None}
    if args.np_weights:
        weights = hub.parse(args.np_weights)
        fields |= {"repository": weights.repo, "folder": weights.folder}
    return neuronpedia.Release(**fields)
