"""Writes SAEs in the formats of other frameworks: `sae-jax export`."""

from absl import flags

SUMMARY = """Write a trained SAE in the format of another framework.

  sae-jax export --checkpoint=runs/a --format=saelens --out=exports/a
  sae-jax export --checkpoint=runs/a/checkpoints/5000 --format=sparsify --out=exports/b
  sae-jax export --results=sweeps/s --select="d_sae=16384 eval_l0<60" --format=saelens --out=many
  sae-jax export --out=exports/a --push_to=user/name

The export is the same function of activations in the model's own units: the normalisation, and
where the architecture allows it the norms of the decoder's rows, are folded in. What a format
cannot express exactly is refused, with the formats that can:

  format               autoencoder          transcoder           skip_transcoder
  saelens              all                  all but topk, gated  all but topk, gated
  dictionary_learning  all                  -                    -
  sparsify             topk                 topk                 topk
  gemma_scope          all but topk, gated  all but topk, gated  -
  gemma_scope_2        all but topk, gated  all but topk, gated  all but topk, gated
  openai               relu, relu_l1_unit   -                    -
  sae_jax              all                  all                  all

Crosscoders go into sae_jax only: a folder of safetensors and JSON, read by `sae_jax.load` like all
the others. PyTorch writes dictionary_learning and openai: pip install "sae-jax[torch]".

Beside the weights is a README.md, the model card of the Hugging Face hub: what the SAE reads, how
it was trained, its metrics (with those of eval.json, if `sae-jax eval --run` made one), how to use
it. It names a license only if you do.

Of a sweep, all done runs that meet every term of --select (COLUMN of results.csv, one of = != < <=
> >=, VALUE) go to OUT/SITE/width_16k/average_l0_32 and the like; OUT/index.json and index.csv list
width, L0, FVU and CE recovered of each. The same command again goes on where it was.

--push_to uploads OUT, what this command or an earlier one wrote, with your login of the hub
(pip install "sae-jax[hub]"; hf auth login, or HF_TOKEN). The repository is made private unless you
say --public.
"""


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax export`."""

    def string(name, text):
        flags.DEFINE_string(name, None, text, flag_values=values)

    string(
        "checkpoint",
        "A run, RUN/checkpoints/STEP, or any SAE that sae_jax.load reads.",
    )
    string("results", "A sweep instead, of which many are exported.")
    string("select", 'Of the sweep, as in "d_sae=16384 k=32"; all that are done.')
    string("format", "One of the table.")
    string("out", "A new directory; with --push_to alone, what is uploaded.")
    string("kind", "Of a Gemma Scope file, which does not say it: autoencoder or transcoder.")
    string(
        "model",
        "The language model's directory, or hf://ORG/REPOSITORY; demo: the one that ships here. "
        "For SAEs of mlp_in.L, where SAELens has no hook: its norm's weight is folded in.",
    )
    string("license", "For the model card, as the hub writes it: apache-2.0, mit, cc-by-4.0, ...")
    string("model_name", "The language model's name on the hub, or SAELens'; the store's.")
    string(
        "push_to",
        "Upload OUT to this repository of the Hugging Face hub: user/name or hf://user/name.",
    )
    flags.DEFINE_bool(
        "public", False, "A repository that --push_to makes is public.", flag_values=values
    )


def run(args: flags.FlagValues, overrides: dict[str, str]) -> None:
    """Writes the export or exports, and uploads them with --push_to."""
    del overrides
    from sae_jax import hub, paths
    from sae_jax.errors import UserError

    if not args.out:
        raise UserError("--out is needed; see sae-jax export --help")
    out = paths.local(args.out)
    if args.push_to:
        args.push_to = hub.check_repo(args.push_to)
    elif args.public:
        raise UserError("--public says how --push_to=user/name makes a repository; give that too")
    if args.push_to and not (args.checkpoint or args.results):
        if not (out / "README.md").is_file():
            raise UserError(
                f"{out} is no export; make it in the same command with --checkpoint or --results"
            )
    else:
        _write(args, out)
    if args.push_to:
        print(f"Uploaded: {hub.push(out, args.push_to, args.public)}")


def _write(args: flags.FlagValues, out) -> None:
    from sae_jax import interop, lm, paths
    from sae_jax.errors import UserError
    from sae_jax.interop.many import export_many

    if bool(args.checkpoint) == bool(args.results):
        raise UserError("give either --checkpoint=RUN or --results=SWEEP")
    if not args.format:
        raise UserError("--format is needed; see sae-jax export --help")
    if args.select and not args.results:
        raise UserError("--select chooses among the runs of --results=SWEEP; give that too")
    place = interop.Hub(args.license, args.push_to)
    named = {"model_name": args.model_name} if args.model_name else {}
    model = lm.DEMO_MODEL if args.model == "demo" else args.model
    if args.results:
        sweep = paths.path(args.results)
        saes = export_many(sweep, args.format, out, args.select or "", place, named, model)
        print(f"Written: {out}: {len(saes)} SAEs, listed in {out / 'index.csv'}")
    else:
        path = interop.locate(args.checkpoint)
        provenance = interop.read_provenance(path) | named
        sae = interop.load(args.checkpoint, kind=args.kind)
        interop.export(sae, args.format, out, provenance, place, model)
        print(f"Written: {out}")
    if not args.license:
        print("No license is stated; --license=apache-2.0, say, puts yours in the model card.")
