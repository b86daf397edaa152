"""Tells what a run, a sweep or a harvest takes, and suggests a mesh: `sae-jax plan`."""

import dataclasses
import functools
import re
import sys

from absl import flags

from sae_jax import config as configs
from sae_jax import python_files
from sae_jax.cli import counts, suggestions
from sae_jax.config import Config
from sae_jax.errors import UserError

SUMMARY = """Tell what a run takes of each device, before there is one, and the mesh to take.

  sae-jax plan --config=scaling_monosemanticity:34m --topology=v5p:4x4x4 \\
      --mesh=1,1,64 --config.train.tokens=10e9
  sae-jax plan --config=openai_topk --topology=h200:1x1 --top=10     which operations cost most
  sae-jax plan --config=scaling_monosemanticity:4m --topology=h100:8x8 --find=time --price=2.5
  sae-jax plan --config=openai_topk --topology=h100:1x8 --batch_sizes=32768,131072 \\
      --dtypes=float32,bfloat16                     the fastest of all these, by tokens/s
  sae-jax plan --config=scaling_laws:frontier --topology=h100:1x8 --passes=6 --price=2.5
                                                    a whole sweep: hours of devices, bytes, cost
  sae-jax plan --harvest --model=hf://google/gemma-2-2b --sites=resid_post.12 --tokens=4e9 \\
      --model_dtype=bfloat16 --topology=h100:1x8 --out=stores/gemma

The training step is compiled ahead of time for the mesh: for a TPU slice by the TPU compiler (pip
install "sae-jax[tpu]"), for GPUs by the CUDA compiler (pip install "sae-jax[cuda]"); no TPU or GPU
is needed. Without the latter CPUs stand for GPUs: their compiler fuses less, so that bytes and
times are rather too high. The time of a step is the sum over its operations, each the longest of
its products, its bytes and what it sends at the published peaks, with loops as often as they run
and no latent dead; what the compiler itself expects is beside it. The width of the activations is
the store's, or --config.sae.d_in.

Where a run does not fit, and with --find, every mesh is traced, which takes a second each, and only
the best are compiled (--compiles): the fastest that fits and the one of least memory are named,
each with the line to paste. Where a run fits but another mesh would be faster, that is said too.
For a sweep --find=time looks for the mesh, and the data and model axes are those of one of the
mesh's run groups.

Exit codes: 0 it fits, 1 it does not, and what does is named, 2 a mistake in the input.
"""

_DEFAULT_D_IN = 4096
_OF_HARVESTS = ("model", "sites", "tokens", "context_length", "dtype", "model_dtype", "out")
_OF_SEARCHES = ("find", "batch_sizes", "dtypes")
_OF_RUNS = ("config", "mesh", "compiles", "passes", "sweep", "top", *_OF_SEARCHES)


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax plan`."""

    def string(name, text):
        flags.DEFINE_string(name, None, text, flag_values=values)

    def names(name, text):
        flags.DEFINE_list(name, None, text, flag_values=values)

    string("config", "A recipe, NAME[:ARGUMENT], or FILE.py[:arg] with get_config(arg).")
    string(
        "topology",
        "v5p:4x4x4 (a TPU slice), h100:8x8 (nodes x GPUs of a node), or cpu:8. Default: so many "
        "CPUs as --mesh has devices.",
    )
    string("mesh", "RUN,DATA,MODEL; default: the config's mesh.")
    flags.DEFINE_enum(
        "find",
        None,
        ["memory", "time"],
        "Try every mesh of the topology, with and without ZeRO, and take the one of least memory "
        "or time.",
        flag_values=values,
    )
    names("batch_sizes", "Try these for data.batch_size too; the time is then that of a token.")
    names("dtypes", "Try these for sae.compute_dtype too: float32,bfloat16.")
    flags.DEFINE_integer(
        "compiles",
        4,
        "The most meshes to compile for each suggestion, once one fits; 0: none, the traced "
        "programs decide, in seconds.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "top",
        0,
        "List so many of the dearest operations of the step.",
        lower_bound=0,
        flag_values=values,
    )
    counts.define_float(
        "price", None, "Of a device for an hour: show costs.", values, lower_bound=0.0
    )
    flags.DEFINE_bool(
        "sweep",
        None,
        "Whether to plan the sweep of the file's get_sweep(), or one run. Default: the sweep, if "
        "the file has one.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "passes",
        1,
        "Of a sweep: its passes, as for sae-jax sweep.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "harvest",
        False,
        "Plan a harvest; the flags below are those of sae-jax harvest.",
        flag_values=values,
    )
    string("model", "Of a harvest: the model; its weights are not read.")
    names("sites", "Of a harvest: what to harvest.")
    counts.define("tokens", None, "Of a harvest: how many tokens (1e9, 1B).", values)
    flags.DEFINE_integer(
        "context_length",
        None,
        "Of a harvest: tokens of a context; the model's own, <= 1024.",
        lower_bound=1,
        flag_values=values,
    )
    string("dtype", "Of a harvest: that of the store, bfloat16 unless you say otherwise.")
    string("model_dtype", "Of a harvest: in which the model computes; float32.")
    string("out", "Of a harvest: the store's directory, on whose disk it must fit.")
    flags.DEFINE_bool("json", False, "Print JSON instead of a table.", flag_values=values)


def run(args: flags.FlagValues, overrides: dict[str, str]) -> int:
    """Prints the plan, and returns 0 if what is planned fits the devices, else 1."""
    wrong, what = (_OF_RUNS, "a run") if args.harvest else (_OF_HARVESTS, "--harvest")
    for name in wrong:
        if args[name].present:
            raise UserError(f"--{name} is for the plan of {what}: leave it out")
    if args.harvest:
        return _plan_harvest(args, overrides)
    searched = next((name for name in _OF_SEARCHES if args[name].present), None)
    if searched and args.mesh:
        raise UserError(f"--{searched} tries every mesh: leave --mesh out")
    if _is_sweep(args):
        return _plan_sweep(args, overrides)
    return _plan_run(args, overrides, searched is not None)


# ------------------------------------------------------------------------------- one run


def _plan_run(args, overrides: dict[str, str], searches: bool) -> int:
    if args["passes"].present:
        raise UserError("--passes is for the plan of a sweep, whose file has get_sweep()")
    config = configs.load_file(args.config) if args.config else Config()
    config = configs.override(config, overrides)
    if args.mesh:
        config = dataclasses.replace(config, mesh=_mesh(args.mesh, config.mesh.zero))
    if config.mesh.run != 1:
        raise UserError(
            "the plan of one run has no use for mesh.run: the groups of devices along it need the "
            "same each; give the data and model axes of one"
        )

    from absl import logging

    from sae_jax.paths import as_json
    from sae_jax.plan import estimate, search, table

    name = args.topology or _cpus(config.mesh)
    by_memory = args.find == "memory"
    if searches and not by_memory and name.startswith("cpu"):
        raise UserError(
            f"--{'find=time' if args.find else 'batch_sizes and --dtypes'} needs a --topology of "
            "TPUs or GPUs"
        )
    if args.top and searches and not args.compiles:
        raise UserError("--top lists operations of a compiled step: give --compiles=1 or more")
    batches = [_parsed(config, "data.batch_size", text) for text in args.batch_sizes or ()]
    dtypes = [_parsed(config, "sae.compute_dtype", text) for text in args.dtypes or ()]
    search.check_batch_sizes(config, batches or [config.data.batch_size])
    topology = _find(name)
    config = _resolve(config)

    def find(most: int):
        tried = search.variants(config, len(topology.devices), batches, dtypes)
        return tried, search.search(tried, topology, most)

    found = None
    if searches:
        tried, found = find(args.compiles)
        best = found.least_memory if by_memory else found.fastest
        print(suggestions.tried_table(found), file=sys.stderr)
    else:
        logging.info("compiling the step for %d devices", len(topology.devices))
        best = estimate.estimate(config, topology)
        if not best.fits:
            tried, found = find(args.compiles)
        elif args.topology and topology.chip:
            tried, found = find(0)
            found = suggestions.if_faster(found, config)
    suggested = suggestions.of_search(args, overrides, config, found)
    if best is not None and args.json:
        print(
            as_json(table.as_dict(best, args.price, args.top) | {"suggestions": suggested}).rstrip()
        )
    elif best is not None:
        print(table.text(best, args.price, args.top))
        for command, words in {s["command"]: s["words"] for s in suggested.values()}.items():
            print(f"\n{words}\n  {command}")
    if best is not None and best.fits:
        return 0
    if found.least_memory is None:
        print(suggestions.nothing_fits(tried, found, topology), file=sys.stderr)
    return 1


def _find(name: str):
    """Returns the topology of a name, and says what its compiler cannot."""
    from sae_jax.plan import chips

    topology = chips.find(name)
    if topology.note:
        print(topology.note, file=sys.stderr)
    return topology


def _mesh(text: str, zero: bool) -> configs.MeshConfig:
    match = re.fullmatch(r"(-1|[1-9][0-9]{0,8}),(-1|[1-9][0-9]{0,8}),(-1|[1-9][0-9]{0,8})", text)
    if not match:
        raise UserError(f"--mesh={text} is not RUN,DATA,MODEL, such as 1,8,8")
    run, data, model = map(int, match.groups())
    return configs.MeshConfig(run=run, data=data, model=model, zero=zero)


def _cpus(mesh: configs.MeshConfig) -> str:
    return f"cpu:{max(1, mesh.data) * max(1, mesh.model)}"


def _parsed(config: Config, field: str, text: str):
    """Returns the value of a config's field that a text stands for."""
    section, _, name = field.partition(".")
    return getattr(getattr(configs.override(config, {field: text}), section), name)


def _resolve(config: Config) -> Config:
    """Returns the config with all fields filled in, by the widths of its store if it has one."""
    from sae_jax.plan import estimate

    if config.data.store:
        from sae_jax.lm.live import open_stream
        from sae_jax.train import preparation

        return preparation.resolve(config, open_stream(config.data))
    d_in = config.sae.d_in or _default_width()
    sites = config.sae.site_widths or (d_in,)
    target = None
    if config.sae.kind in ("transcoder", "skip_transcoder"):
        target = config.sae.d_out or d_in
    return estimate.resolve(config, sites, target)


@functools.cache  # said once, not for each run of a sweep
def _default_width() -> int:
    print(f"no store and no --config.sae.d_in: taken to be {_DEFAULT_D_IN}", file=sys.stderr)
    return _DEFAULT_D_IN


# ------------------------------------------------------------------------------ a sweep


def _is_sweep(args) -> bool:
    """Whether a sweep is planned, and not one run."""
    if args.sweep is not None or not args.config:
        return bool(args.sweep)
    file, _ = python_files.split(args.config)
    return hasattr(python_files.load_module(file), "get_sweep")


def _plan_sweep(args, overrides: dict[str, str]) -> int:
    if args["top"].present:
        raise UserError("--top lists the operations of one run's step: give --nosweep too")
    for name in ("batch_sizes", "dtypes"):
        if args[name].present:
            raise UserError(f"--{name} is for the plan of one run; a sweep's grid says what varies")
    if args.find == "memory":
        raise UserError("--find=memory is for the plan of one run; a sweep has --find=time")
    if not args.config:
        raise UserError("--sweep needs --config=FILE.py, which has get_sweep()")
    if not args.topology or args.topology.lower().startswith("cpu"):
        raise UserError(
            "the plan of a sweep needs a --topology of TPUs or GPUs, those of one worker, such as "
            "--topology=h100:1x8; --nosweep plans one run"
        )

    from sae_jax.paths import as_json
    from sae_jax.plan import sweep

    topology = _find(args.topology)
    runs = sweep.load(args.config, overrides, _resolve)
    mesh = runs[0].mesh
    if args.find:
        mesh = None
    elif args.mesh:
        mesh = _mesh(args.mesh, mesh.zero)
    plan = sweep.plan(runs, topology, mesh, args.passes, args.compiles)
    if plan is None:
        print(
            f"No mesh of {len(topology.devices)} devices holds a pass of the sweep. Take more "
            "devices, more --passes, or fewer latents.",
            file=sys.stderr,
        )
        return 1
    chosen = dataclasses.replace(runs[0], mesh=plan.mesh)
    fields, store = suggestions.chosen_fields(chosen, runs[0]), runs[0].data.store
    command = suggestions.command_line("sweep", args, overrides, fields, store, topology)
    if args.passes > 1:
        command += f" --passes={args.passes}"
    if args.json:
        print(as_json(sweep.as_dict(plan, args.price) | {"command": command}).rstrip())
    else:
        print(f"{sweep.text(plan, args.price)}\n  {command}")
    return 0 if plan.fits else 1


# ------------------------------------------------------------------------------ a harvest


def _plan_harvest(args, overrides: dict[str, str]) -> int:
    if overrides:
        raise UserError(f"a harvest has no config: leave --config.{next(iter(overrides))} out")
    for name, value in {"sites": args.sites, "tokens": args.tokens}.items():
        if not value or value == [""]:
            raise UserError(f"--harvest needs --{name}; see sae-jax harvest --help")

    from sae_jax import lm
    from sae_jax.paths import as_json
    from sae_jax.plan import chips, harvest

    topology = chips.describe(args.topology or "cpu:1")
    plan = harvest.harvest(
        lm.DEMO_MODEL if args.model in (None, "demo") else args.model,
        args.sites,
        args.tokens,
        args.out or ".",
        topology,
        context_length=args.context_length,
        dtype=args.dtype or "bfloat16",
        model_dtype=args.model_dtype or "float32",
    )
    if args.json:
        print(as_json(harvest.as_dict(plan, args.price)).rstrip())
    else:
        print(harvest.text(plan, args.price))
    return 0 if plan.fits else 1
