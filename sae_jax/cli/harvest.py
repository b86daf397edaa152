"""Writes a language model's activations over text to a store: `sae-jax harvest`."""

import sys

from absl import flags

from sae_jax.cli import counts, distributed, path_lists

SUMMARY = """Write a language model's activations over text to a store.

Reads a Hugging Face directory (config.json, model.safetensors, tokenizer.json), or one on the hub
(--model=hf://org/name, with pip install "sae-jax[hub]"), and text; packs the
text into contexts, each starting with BOS; runs the model on this machine's devices; writes the
activations of the sites you name. Several processes (--distributed) share the store's shards out,
each with the model on its own devices. Stopped at any moment and started again with the same flags,
it goes on at the first shard that is missing.

The progress shows tokens/s, GB/s and how near that is to the FLOP floor: the time that the model's
matrix products take at the devices' published peak (on a CPU: at the rate of a product timed here).

With --live the store keeps all but the activations: training and evaluation read it as any other,
and have the model compute the rows as they go. The model runs once over all the text at first, for
the statistics; --statistics_tokens makes that a sample of so many.

Sites are NAME.LAYER, NAME being resid_pre, z, attn_out, resid_mid, mlp_in, mlp_act, mlp_out or
resid_post; TransformerLens' names of the same tensors, such as blocks.2.hook_resid_post, stand for
them. A model of a family that we do not know runs by transformers' own code (pip install
"sae-jax[hf]") as --model=torch:DIRECTORY; its sites are these, where its modules show them, and
any module by its path: hf:model.layers.3.mlp (what comes out of it), hf:model.layers.3.mlp:in.
For example:

  sae-jax harvest --model=stories260K --text=stories.json --collapse_newlines \\
      --sites=resid_post.2,mlp_act.1 --context_length=128 --tokens=1000000 --out=stories_store
  sae-jax harvest --model=hf://openai-community/gpt2 --text=datasets:NeelNanda/pile-10k \\
      --sites=blocks.8.hook_resid_pre --max_bytes=200e9 --out=s3://bucket/gpt2_store
"""


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax harvest`."""

    def string(name, default, text, required=False):
        flags.DEFINE_string(name, default, text, flag_values=values, required=required)

    def integer(name, default, text, least=1):
        flags.DEFINE_integer(name, default, text, lower_bound=least, flag_values=values)

    string(
        "model",
        "demo",
        "Directory of the model, or hf://ORG/REPOSITORY[@REVISION] of the Hugging Face hub; demo: "
        "the one-layer model that ships here; torch: before either: run by transformers.",
    )
    path_lists.define(
        "text",
        "Files (.txt and the like: a document each; .json, .jsonl: a document for each item or "
        "line; all also .gz, .bz2, .xz, .zst), directories, or datasets:NAME[@CONFIG][:SPLIT] for "
        "a Hugging Face dataset: its name, a directory of save_to_disk's or of data files, or a "
        ".parquet file.",
        values,
        required=True,
    )
    string("field", "text", "Where a document's text is in .json, .jsonl and datasets.")
    flags.DEFINE_bool(
        "collapse_newlines",
        False,
        "Make one newline of several, for models that never saw an empty line.",
        flag_values=values,
    )
    flags.DEFINE_list("sites", None, "What to harvest.", flag_values=values, required=True)
    string("out", None, "Directory of the store.", required=True)
    integer("context_length", None, "Tokens of a context, BOS included; the model's own, <= 1024.")
    counts.define("tokens", None, "Stop after so many tokens (1e9, 1B); all the text's.", values)
    counts.define("max_bytes", None, "Stop where the store would have more bytes (50e9).", values)
    integer("batch_size", None, "Contexts in a batch; 2k tokens per CPU, 8k per other device.")
    string("dtype", "bfloat16", "Of the store: bfloat16, float16 or float32.")
    string("model_dtype", "float32", "In which the model computes: float32 or bfloat16.")
    flags.DEFINE_bool(
        "scan_layers",
        False,
        "Compile the layers that have no site as one loop: for deep models, in less time.",
        flag_values=values,
    )
    integer("mesh_data", -1, "Devices that share a batch; -1: all that are left.", least=-1)
    integer("mesh_model", 1, "Devices that share the model's heads, MLP and vocabulary.")
    flags.DEFINE_bool(
        "live", False, "Store no activations: the model computes them whenever they are read.",
        flag_values=values,
    )  # fmt: skip
    counts.define(
        "statistics_tokens", None, "With --live: take the statistics from so many; all.", values
    )
    distributed.define(values)


def run(args, overrides) -> int:
    """Harvests what the flags say, and returns the exit code."""
    del overrides
    from sae_jax.train import preemption

    try:
        with distributed.joined(args, stops_at_a_step=False):
            _harvest(args)
    except preemption.PreemptedError:
        print("sae-jax harvest: stopped by SIGTERM; start it again to go on", file=sys.stderr)
        return preemption.EXIT_CODE
    return 0


def _harvest(args) -> None:
    import jax

    from sae_jax import lm
    from sae_jax.errors import UserError, choose

    for name, parts in {"text": args.text, "sites": args.sites, "out": [args.out]}.items():
        if not parts or "" in parts:
            raise UserError(f"--{name} is empty; see sae-jax harvest --help")
    choose(args.dtype, ("bfloat16", "float16", "float32"), "--dtype")
    choose(args.model_dtype, ("bfloat16", "float32"), "--model_dtype")
    devices = jax.local_devices()
    model = args.mesh_model
    data = len(devices) // max(model, 1) if args.mesh_data == -1 else args.mesh_data
    if model < 1 or data < 1 or data * model > len(devices):
        raise UserError(
            f"--mesh_data={args.mesh_data} --mesh_model={model} does not fit the {len(devices)} "
            "devices here"
        )
    mesh = jax.make_mesh((data, model), ("data", "model"), devices=devices[: data * model])
    store = lm.harvest(
        lm.DEMO_MODEL if args.model == "demo" else args.model,
        lm.read_texts(args.text, args.field, args.collapse_newlines),
        args.out,
        sites=tuple(args.sites),
        context_length=args.context_length,
        tokens=args.tokens,
        max_bytes=args.max_bytes,
        batch_size=args.batch_size,
        dtype=args.dtype,
        model_dtype=args.model_dtype,
        mesh=mesh,
        peak_flops=_peak_flops(mesh, args.model_dtype),
        provenance={"text": args.text, "collapse_newlines": args.collapse_newlines},
        live=args.live,
        statistics_tokens=args.statistics_tokens,
        scan_layers=args.scan_layers,
    )
    if jax.process_index() != 0:
        return
    meta = store.meta
    rows = meta.num_sequences * meta.context_length
    print(f"{args.out}: {rows:,} rows ({meta.num_sequences:,} contexts of {meta.context_length})")
    usable = int(store.usable_rows[:, 0].sum())
    for name, site in meta.sites.items():
        print(f"  {name:16}width {site.width}, {site.dtype}, {usable:,} rows to train on")
    if meta.live:
        print(f"Live: {meta.live.model} computes them when they are read.")
    print(f"Left out of training: {meta.excluded_why}.")


def _peak_flops(mesh, dtype: str) -> float | None:
    """Returns the published FLOP/s of all devices, or None for chips that `plan` does not know."""
    from absl import logging

    from sae_jax.plan.chips import chip_from_kind

    chip = chip_from_kind(mesh.devices.flat[0].device_kind)
    if chip is None:
        logging.info(
            "the FLOP floor is at the rate of a product timed here, not at a published one"
        )
        return None
    return mesh.size * getattr(chip, dtype)
