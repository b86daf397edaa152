"""Measures a training step, the reading of batches, or a harvest: `sae-jax bench`."""

from absl import flags

from sae_jax.cli import path_lists

SUMMARY = """Measure a training step, the reading of batches, or a harvest, on this machine.

  sae-jax bench                                         the top-k step at the default shape
  sae-jax bench --architecture=jumprelu --d_in=512 --d_sae=8192
  sae-jax bench --reading                               the stream against a sequential read
  sae-jax bench --harvest --model=DIR --text=FILE       the activations of a model
  sae-jax bench --packs=8 --d_in=64 --d_sae=512         a pack of 8 runs against each alone
  sae-jax bench --packs=8 --d_sae=512 --store=STORE     a whole sweep of 3 sizes x 8 runs, as well

Every figure of one call comes from one run, so that its ratios hold on a machine whose speed
drifts.
"""


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax bench`."""

    def integer(name, default, text, least=1):
        flags.DEFINE_integer(name, default, text, lower_bound=least, flag_values=values)

    flags.DEFINE_string(
        "architecture",
        "topk",
        "Any that `sae-jax train` has, such as batchtopk.",
        flag_values=values,
    )
    integer("batch", 2048, "Tokens a step.")
    integer("d_in", 768, "Width of the activations.")
    integer("d_sae", 24_576, "Dictionary size.")
    integer("k", 32, "Latents a token, where the architecture has a k.")
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "Of matmul operands.", flag_values=values
    )
    integer("mesh_model", 1, "Devices that share the dictionary.")
    integer("rounds", 7, "Timed steps of each contestant.")
    flags.DEFINE_bool("reading", False, "Measure the stream instead.", flag_values=values)
    flags.DEFINE_bool("harvest", False, "Measure a harvest instead.", flag_values=values)
    flags.DEFINE_string("model", "demo", "With --harvest: as for harvest.", flag_values=values)
    path_lists.define("text", "With --harvest: as for harvest.", values)
    flags.DEFINE_list(
        "sites", None, "With --harvest; five of the middle layer.", flag_values=values
    )
    integer("context_length", 128, "With --harvest.")
    integer("packs", None, "Measure packs of so many runs instead.", least=2)
    flags.DEFINE_string(
        "store",
        None,
        "With --reading: this store, not a temporary one. With --packs: sweep over it, in one "
        "process and with each run in its own.",
        flag_values=values,
    )
    flags.DEFINE_string("site", "", "Of the store, where it has several.", flag_values=values)
    integer("tokens", 204_800, "With --packs and --store: of each run. With --harvest: of a round.")
    flags.DEFINE_string("out", None, "Write the figures there as JSON.", flag_values=values)


def run(args: flags.FlagValues, overrides: dict[str, str]) -> int:
    """Measures what the flags say, prints a table and, with --out, writes the figures."""
    del overrides
    from sae_jax.bench import harvest, packs, reading, step
    from sae_jax.paths import path, save_json

    if args.reading:
        figures = reading.measure_reading(args.store)
        print(reading.table(figures))
    elif args.harvest:
        figures = _measure_harvest(args)
        print(harvest.table(figures))
    else:
        shape = (args.batch, args.d_in, args.d_sae, args.k)
        config = step.bench_config(args.architecture, *shape, args.dtype, args.mesh_model)
        if args.packs:
            figures = {"step": packs.measure_pack_step(config, args.packs, args.rounds)}
            print(packs.step_table(figures["step"]))
            if args.store:
                runs = packs.sweep_of(config, args.store, args.site, args.packs, args.tokens)
                figures["sweep"] = packs.measure_sweep(runs)
                print(packs.sweep_table(figures["sweep"]))
        else:
            figures = step.measure_step(config, args.rounds)
            print(step.table(figures))
    if args.out:
        save_json(figures, path(args.out))
    return 0


def _measure_harvest(args) -> dict:
    from sae_jax import lm
    from sae_jax.bench import harvest

    model = lm.DEMO_MODEL if args.model == "demo" else args.model
    return harvest.measure_harvest(
        model,
        lm.read_texts(args.text or lm.standard_library()),
        tuple(args.sites or harvest.default_sites(model)),
        args.context_length,
        args.tokens,
        rounds=args.rounds,
    )
