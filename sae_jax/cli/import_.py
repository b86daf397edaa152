"""Reads an SAE of another framework and writes it in our own format: `sae-jax import`."""

from absl import flags

SUMMARY = """Read an SAE of another framework, and write it as a folder of our own.

  sae-jax import --path=their_sae --out=imported
  sae-jax import --path=hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 --out=a
  sae-jax import --path=saelens://gpt2-small-res-jb/blocks.8.hook_resid_pre --out=b
  sae-jax eval --sae=imported --store=STORE

Formats: saelens, dictionary_learning, sparsify, gemma_scope, gemma_scope_2, openai, sae_jax; which
one it is is seen from the files. `sae_jax.load(PATH)` reads any of them without this. Files of
PyTorch are read as tensors only: nothing in them is run.
"""


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax import`."""

    def string(name, text):
        flags.DEFINE_string(name, None, text, flag_values=values)

    string(
        "path",
        "The folder that the other framework wrote, or its .pt file; hf://ORG/REPOSITORY/FOLDER on "
        "the Hugging Face hub; saelens://RELEASE/SAE_ID of SAELens' public releases.",
    )
    string("format", "Refuse it if it is of another format than this.")
    string("kind", "Of a Gemma Scope file, which does not say it: autoencoder or transcoder.")
    string("out", "A new directory.")


def run(args: flags.FlagValues, overrides: dict[str, str]) -> None:
    """Reads the SAE at --path and writes it to --out."""
    del overrides
    from sae_jax import interop, paths
    from sae_jax.errors import UserError, choose

    if not args.path or not args.out:
        raise UserError("--path and --out are needed; see sae-jax import --help")
    path = interop.locate(args.path)
    found = interop.format_of(path)
    if args.format and choose(args.format, interop.FORMATS, "--format") != found:
        what = f"it looks like {found}" if found else "it is of no format that is known here"
        raise UserError(f"{args.path} is not of the format {args.format}: {what}")
    sae = interop.load(args.path, kind=args.kind)
    out = paths.local(args.out)
    provenance = interop.read_provenance(path) | {"imported_from": found or "sae_jax"}
    interop.export(sae, "sae_jax", out, provenance)
    config = sae.config
    print(f"Written: {out}: {config.architecture} {config.kind}, {config.d_sae:,} latents, "
          f"d_in {config.d_in:,}")  # fmt: skip
