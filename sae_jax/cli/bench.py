from absl import flags

from sae_jax.paths import path, save_json

SUMMARY = """Measure a training step, the reading of batches, or a harvest, on this machine.

  sae-jax bench                                         the top-k step at the default shape
  sae-jax bench --architecture=relu --d_in=512 --d_sae=8192
  sae-jax bench --peers                                 beside the installed peers, in turn
  sae-jax bench --reading                               the stream against a sequential read
  sae-jax bench --harvest --model=DIR --text=FILE       harvest beside transformers with hooks
  sae-jax bench --packs=8 --d_in=64 --d_sae=512         a pack of 8 runs against each alone
  sae-jax bench --packs=8 --d_sae=512 --store=STORE     a whole sweep of 3 sizes x 8 runs, as well

Every figure of one call comes from one run, so that its ratios hold on a machine whose speed
drifts. --peers, and transformers for --harvest, need: pip install "sae-jax[peers]".
"""


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("architecture", "topk", "topk or relu.", flag_values=values)
    flags.DEFINE_integer("batch", 2048, "Tokens a step.", flag_values=values)
    flags.DEFINE_integer("d_in", 768, "Width of the activations.", flag_values=values)
    flags.DEFINE_integer("d_sae", 24_576, "Dictionary size.", flag_values=values)
    flags.DEFINE_integer("k", 32, "Latents a token, for topk.", flag_values=values)
    flags.DEFINE_string(
        "dtype", "float32", "Of matmul operands: float32 or bfloat16.", flag_values=values
    )
    flags.DEFINE_integer("mesh_model", 1, "Devices that share the dictionary.", flag_values=values)
    flags.DEFINE_integer("rounds", 7, "Timed steps of each contestant.", flag_values=values)
    flags.DEFINE_bool("peers", False, "Time the installed peers too.", flag_values=values)
    flags.DEFINE_bool("reading", False, "Measure the stream instead.", flag_values=values)
    flags.DEFINE_bool("harvest", False, "Measure a harvest instead.", flag_values=values)
    flags.DEFINE_string("model", "demo", "With --harvest: as for harvest.", flag_values=values)
    flags.DEFINE_list("text", None, "With --harvest: as for harvest.", flag_values=values)
    flags.DEFINE_list(
        "sites", None, "With --harvest; five of the middle layer.", flag_values=values
    )
    flags.DEFINE_integer("context_length", 128, "With --harvest.", flag_values=values)
    flags.DEFINE_integer(
        "packs", None, "Measure packs of so many runs instead.", lower_bound=2, flag_values=values
    )
    flags.DEFINE_string(
        "store",
        None,
        "With --reading: this store, not a temporary one. With --packs: sweep over it, in one "
        "process and with each run in its own.",
        flag_values=values,
    )
    flags.DEFINE_string("site", "", "Of the store, where it has several.", flag_values=values)
    flags.DEFINE_integer(
        "tokens",
        204_800,
        "With --packs and --store: of each run. With --harvest: of a round.",
        flag_values=values,
    )
    flags.DEFINE_string("out", None, "Write the figures there as JSON.", flag_values=values)


def run(args: flags.FlagValues, overrides: dict[str, str]) -> int:
    if args.reading:
        from sae_jax.bench.reading import measure_reading

        figures = measure_reading(args.store)
        _print_reading(figures)
    elif args.harvest:
        figures = _measure_harvest(args)
        _print_harvest(figures)
    else:
        from sae_jax.bench.step import bench_config, measure_step

        shape = (args.batch, args.d_in, args.d_sae, args.k)
        config = bench_config(args.architecture, *shape, args.dtype, args.mesh_model)
        if args.packs:
            from sae_jax.bench import packs

            figures = {"step": packs.measure_pack_step(config, args.packs, args.rounds)}
            _print_pack_step(figures["step"])
            if args.store:
                runs = packs.sweep_of(config, args.store, args.site, args.packs, args.tokens)
                figures["sweep"] = packs.measure_sweep(runs)
                _print_sweep(figures["sweep"])
        else:
            figures = measure_step(config, args.rounds, args.peers)
            _print_step(figures)
    if args.out:
        save_json(figures, path(args.out))
    return 0


def _measure_harvest(args) -> dict:
    from sae_jax import lm
    from sae_jax.bench.harvest import measure_harvest

    model = lm.DEMO_MODEL if args.model == "demo" else args.model
    middle = lm.load_config(model).num_layers // 2
    names = ("resid_pre", "attn_out", "mlp_act", "mlp_out", "resid_post")
    sites = tuple(args.sites or (f"{name}.{middle}" for name in names))
    texts = lm.read_texts(args.text or lm.standard_library())
    return measure_harvest(
        model, texts, sites, args.context_length, args.tokens, rounds=args.rounds
    )


def _print_harvest(figures: dict) -> None:
    print(
        f"{figures['tokens']:,} tokens in contexts of {figures['context_length']}, batches of "
        f"{figures['batch_size']}, {len(figures['sites'])} sites, {figures['device']}"
    )
    print(f"{'':28}{'tokens/s':>12}{'GB/s':>8}{'of floor':>10}{'processor s':>13}")
    for name, rate in figures["tokens_per_second"].items():
        print(
            f"{name:28}{rate:12,.0f}{figures['gb_per_second'][name]:8.3f}"
            f"{figures['fraction_of_floor'][name]:10.0%}{figures['processor_seconds'][name]:13.2f}"
        )
    if "times_faster" in figures:
        print(
            f"ours is {figures['times_faster']:.2f}x as fast as transformers, with "
            f"{1 / figures['times_less_processor']:.2f}x the processor time; largest difference "
            f"of an activation {figures['largest_difference']:.1e}"
        )


def _print_step(figures: dict) -> None:
    shape = " ".join(f"{name} {value}" for name, value in figures["shape"].items() if value)
    print(f"{figures['architecture']} {figures['compute_dtype']}, {shape}, {figures['device']}")
    print(f"{'':28}{'ms/step':>10}{'tokens/s':>12}{'ours is':>10}")
    for name, rate in figures["tokens_per_second"].items():
        ratio = figures["times_faster_than"].get(name)
        faster = f"{ratio:9.2f}x" if ratio else ""
        print(f"{name:28}{1e3 * figures['seconds'][name]:10.1f}{rate:12.0f}{faster:>10}")
    rate = figures["matmul_flops_per_second"] / 1e9
    print(
        f"matmul of the encoder in the same run: {rate:.0f} GFLOP/s; "
        f"the step is at {figures['fraction_of_floor']:.0%} of the floor"
    )


def _print_pack_step(figures: dict) -> None:
    shape = " ".join(f"{name} {value}" for name, value in figures["shape"].items())
    pack, alone = (1e3 * figures["seconds"][name] for name in ("pack", "alone"))
    print(
        f"a step of {figures['runs']} runs, {shape}, {figures['device']}: packed {pack:.1f} ms, "
        f"one by one {alone:.1f} ms; ratio {figures['pack_over_sum']:.2f}"
    )


def _print_sweep(figures: dict) -> None:
    print(f"{figures['runs']} runs{'':14}{'seconds':>10}{'GB read':>10}")
    for name, label in (("sweep", "one sweep"), ("alone", "a process each")):
        seconds, size = figures[name]["seconds"], figures[name]["bytes_read"] / 1e9
        print(f"{label:21}{seconds:10.1f}{size:10.2f}")
    print(
        f"{'times less':21}{figures['times_less_wall']:10.1f}{figures['times_less_read']:10.1f}\n"
        f"largest relative difference of an eval_loss: {figures['largest_loss_difference']:.1e}"
    )


def _print_reading(figures: dict) -> None:
    size = figures["bytes"] / 1e9
    print(f"{size:.2f} GB in chunks of {figures['chunk_rows']} rows; GB/s, medians")
    print(f"{'':12}{'plain read':>12}{'stream':>10}{'ratio':>8}")
    for state in ("warm", "cold"):
        if state not in figures:
            print(f"{state:12}only as root, who may drop the page cache")
            continue
        f = figures[state]
        plain, stream = f["plain_gb_per_second"], f["stream_gb_per_second"]
        print(f"{state:12}{plain:12.2f}{stream:10.2f}{f['stream_over_plain']:7.0%}")
