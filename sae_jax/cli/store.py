"""Describes an activation store, or makes one from files: `sae-jax store`."""

from absl import flags

from sae_jax.errors import UserError

SUMMARY = """Show what an activation store holds, or make one from files of activations.

  sae-jax store --path=STORE           sites, statistics, what is excluded and why, provenance
  sae-jax store --path=STORE --check   also reads and verifies every byte
  sae-jax store --from=FOLDER --out=STORE --site=resid_post.8

--from: activations that SAELens cached (arrow files, with their tokens; pip install "sae-jax[lm]"),
or .npy or .safetensors files, each (rows, width), in the order of their names. Stopped, it goes on
when it is started again.
"""


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax store`."""

    def string(name, text):
        flags.DEFINE_string(name, None, text, flag_values=values)

    string("path", "Directory of the store.")
    flags.DEFINE_bool("check", False, "Read everything, and verify it.", flag_values=values)
    string("from", "Activations that others saved, to make a store of.")
    string("out", "With --from: directory of the new store.")
    string("site", "With --from: what to call it; the hook's name in our terms, else activations.")
    flags.DEFINE_integer(
        "context_length", None, "With --from: rows of a plain file that make one text; 1.",
        flag_values=values, lower_bound=1,
    )  # fmt: skip


def run(args: flags.FlagValues, overrides: dict[str, str]) -> None:
    """Prints what a store holds, after making it with --from."""
    from sae_jax.lm.live import open_store

    if bool(args.path) == bool(args["from"].value):
        raise UserError("give either --path=STORE, or --from=FILES and --out=STORE")
    store = open_store(args.path) if args.path else _convert(args)
    print(describe(store))
    if args.check:
        checked = store.check(lambda chunks: _progress(chunks, "checking", "chunk"))
        print(f"checked {store.meta.num_chunks} chunks: {checked}")


def describe(store) -> str:
    """Returns a description of a store as text: its sites, statistics, exclusions, provenance."""
    meta, tokens = store.meta, store.tokens()
    lines = [
        f"{store.path}: format {meta.format_version}, {meta.num_sequences:,} sequences of "
        f"{meta.context_length} tokens = {meta.num_rows:,} rows",
        f"{meta.num_chunks:,} chunks of {meta.chunk_rows:,} rows in {meta.num_shards:,} shards"
        + (f", live: computed by {meta.live.model} when they are read" if meta.live else ""),
        f"model {meta.model}, tokenizer {meta.tokenizer}, "
        + ("no tokens" if tokens is None else f"tokens sha256 {meta.tokens_sha256[:12]}"),
        "",
        f"{'site':24}{'width':>7}{'dtype':>10}{'GB':>9}{'|mean|':>10}{'rms norm':>10}"
        f"{'NaN rows':>10}",
    ]
    for name, site in sorted(meta.sites.items()):
        gigabytes = meta.num_rows * site.width * site.numpy_dtype.itemsize / 1e9
        mean_norm = sum(x * x for x in site.mean) ** 0.5
        lines.append(
            f"{name:24}{site.width:7}{site.dtype:>10}{gigabytes:9.3f}{mean_norm:10.4g}"
            f"{site.mean_squared_norm**0.5:10.4g}{site.nonfinite_rows:10}"
        )
    usable = int(store.usable_rows[:, 0].sum())
    lines += [
        "",
        f"usable rows: {usable:,} ({100 * usable / meta.num_rows:.1f} %); "
        f"excluded: {meta.excluded_why}",
    ]
    lines += [f"{key}: {value}" for key, value in meta.provenance.items()]
    return "\n".join(lines)


def _convert(args):
    from sae_jax.activations import convert
    from sae_jax.interop.saelens import site_of

    if not args.out:
        raise UserError("--from needs --out=STORE, a new directory")
    return convert(
        args["from"].value,
        args.out,
        site=args.site or "",
        context_length=args.context_length,
        site_of_hook=site_of,
        progress=lambda shards: _progress(shards, "converting", "shard"),
    )


def _progress(items, what: str, unit: str):
    from sae_jax.progress_bar import progress

    return progress(items, f"{what} {len(items):,} {unit}s", unit=unit)
