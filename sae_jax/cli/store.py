from absl import flags

SUMMARY = """Show what an activation store holds; with --check, read all of it.

  sae-jax store --path=STORE           sites, statistics, what is excluded and why, provenance
  sae-jax store --path=STORE --check   also compares every byte with its checksum
"""


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("path", None, "Directory of the store.", flag_values=values, required=True)
    flags.DEFINE_bool("check", False, "Read everything, and verify it.", flag_values=values)


def run(args: flags.FlagValues, overrides: dict[str, str]) -> None:
    from sae_jax.activations import Store

    store = Store.open(args.path)
    print(describe(store))
    if args.check:
        store.check(_progress)
        print(f"checked {store.meta.num_chunks} chunks: all as written, no unmarked NaN")


def describe(store) -> str:
    meta, tokens = store.meta, store.tokens()
    lines = [
        f"{store.path}: format {meta.format_version}, {meta.num_sequences:,} sequences of "
        f"{meta.context_length} tokens = {meta.num_rows:,} rows",
        f"{meta.num_chunks:,} chunks of {meta.chunk_rows:,} rows in {meta.num_shards:,} shards",
        f"model {meta.model}, tokenizer {meta.tokenizer}, "
        + ("no tokens" if tokens is None else f"tokens sha256 {meta.tokens_sha256[:12]}"),
        "",
        f"{'site':24}{'width':>7}{'dtype':>10}{'GB':>9}{'|mean|':>10}{'rms norm':>10}"
        f"{'NaN rows':>10}",
    ]
    for name, site in sorted(meta.sites.items()):
        gigabytes = meta.num_rows * site.width * store.site(name).dtype.numpy_dtype.itemsize / 1e9
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


def _progress(chunks):
    import sys

    import tqdm

    return tqdm.tqdm(chunks, "checking", unit="chunk", disable=not sys.stderr.isatty())
