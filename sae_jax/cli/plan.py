"""Estimates what a run takes of each device, without the devices: `sae-jax plan`."""

import dataclasses
import re
import sys

from absl import flags

from sae_jax import config as configs
from sae_jax.config import Config
from sae_jax.errors import UserError

SUMMARY = """Tell what a run takes of each device, before there is one: memory, work, time.

  sae-jax plan --config=scaling_monosemanticity:34m --topology=v5p:4x4x4 \\
      --mesh=1,1,64 --config.train.tokens=10e9
  sae-jax plan --config=scaling_monosemanticity:4m --topology=h100:8x8 --find=time

The training step is compiled ahead of time for the mesh: for a TPU slice by the TPU compiler (pip
install "sae-jax[tpu]"; no TPU is needed), for GPUs by the CPU's, which fuses less, so that the
traffic through memory is rather too high. Times are those of published peaks, without any latent
dead. The width of the activations is the store's, or --config.sae.d_in.

Exit codes: 0 it fits, 1 it does not, and a mesh that does is named, 2 a mistake in the input.
"""

_DEFAULT_D_IN = 4096


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax plan`."""
    flags.DEFINE_string(
        "config",
        None,
        "A recipe, NAME[:ARGUMENT], or FILE.py[:arg] with get_config(arg).",
        flag_values=values,
    )
    flags.DEFINE_string(
        "topology",
        None,
        "v5p:4x4x4 (a TPU slice), h100:8x8 (nodes x GPUs of a node), or cpu:8. Default: so many "
        "CPUs as --mesh has devices.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "mesh", None, "RUN,DATA,MODEL; default: the config's mesh.", flag_values=values
    )
    flags.DEFINE_enum(
        "find",
        None,
        ["memory", "time"],
        "Try every mesh of the topology, with and without ZeRO, and take the one of least memory "
        "or time.",
        flag_values=values,
    )
    flags.DEFINE_bool("json", False, "Print JSON instead of a table.", flag_values=values)


def run(args: flags.FlagValues, overrides: dict[str, str]) -> int:
    """Prints the estimate, and returns 0 if the run fits the devices, else 1."""
    config = configs.load_file(args.config) if args.config else Config()
    config = configs.override(config, overrides)
    if args.mesh:
        config = dataclasses.replace(config, mesh=_mesh(args.mesh, config.mesh.zero))
    if args.find and args.mesh:
        raise UserError("--find tries every mesh: leave --mesh out")

    from sae_jax.paths import as_json
    from sae_jax.plan import chips, table

    name = args.topology or _cpus(config.mesh)
    if args.find == "time" and name.startswith("cpu"):
        raise UserError("--find=time needs a --topology of TPUs or GPUs")
    topology = chips.find(name)
    config = _resolve(config)
    if args.find:
        best = _find(config, topology, args.find)
        if best is None:
            print(_nothing_fits(config, topology), file=sys.stderr)
            return 1
    else:
        best = _estimate(config, topology)
    print(as_json(table.as_dict(best)).rstrip() if args.json else table.text(best))
    if best.fits:
        return 0
    print(_fitting_mesh(config, topology), file=sys.stderr)
    return 1


def _mesh(text: str, zero: bool) -> configs.MeshConfig:
    match = re.fullmatch(r"(-1|[1-9][0-9]{0,8}),(-1|[1-9][0-9]{0,8}),(-1|[1-9][0-9]{0,8})", text)
    if not match:
        raise UserError(f"--mesh={text} is not RUN,DATA,MODEL, such as 1,8,8")
    run, data, model = map(int, match.groups())
    return configs.MeshConfig(run=run, data=data, model=model, zero=zero)


def _cpus(mesh: configs.MeshConfig) -> str:
    return f"cpu:{max(1, mesh.data) * max(1, mesh.model)}"


def _resolve(config: Config) -> Config:
    """Returns the config with all fields filled in, by the widths of its store if it has one."""
    from sae_jax.plan import estimate

    if config.data.store:
        from sae_jax.lm.live import open_stream
        from sae_jax.train import preparation

        return preparation.resolve(config, open_stream(config.data))
    d_in = config.sae.d_in
    if d_in is None:
        d_in = _DEFAULT_D_IN
        print(f"no store and no --config.sae.d_in: taken to be {d_in}", file=sys.stderr)
    sites = config.sae.site_widths or (d_in,)
    target = None
    if config.sae.kind in ("transcoder", "skip_transcoder"):
        target = config.sae.d_out or d_in
    return estimate.resolve(config, sites, target)


def _estimate(config: Config, topology):
    """Logs that the step is compiled, which takes seconds, and returns the estimate."""
    from absl import logging

    from sae_jax.plan import estimate

    logging.info("compiling the step for %d devices", len(topology.devices))
    return estimate.estimate(config, topology)


def _find(config: Config, topology, by: str):
    """Prints the estimates of all meshes, and returns the best, or None if none fits."""
    import tqdm

    from sae_jax.plan import estimate, table

    tried = []
    possible = [
        c for c in estimate.candidates(config, len(topology.devices))
        if estimate.least_bytes(c) <= topology.capacity
    ]  # fmt: skip
    for candidate in tqdm.tqdm(possible, desc="meshes", disable=not sys.stderr.isatty()):
        tried.append(_estimate(candidate, topology))
    print("\n".join([table.HEADER, *map(table.row, tried), ""]), file=sys.stderr)
    fitting = [e for e in tried if e.fits]
    return min(fitting, key=lambda e: e.total if by == "memory" else e.step_seconds, default=None)


def _fitting_mesh(config: Config, topology) -> str:
    """Says which mesh fits this topology, with the fewest shards of the dictionary."""
    from sae_jax.plan import estimate

    for candidate in estimate.candidates(config, len(topology.devices)):
        if candidate.mesh == config.mesh or estimate.least_bytes(candidate) > topology.capacity:
            continue
        found = _estimate(candidate, topology)
        if found.fits:
            mesh = candidate.mesh
            zero = f" --config.mesh.zero={str(mesh.zero).lower()}"
            return (
                f"It would fit with --mesh=1,{mesh.data},{mesh.model}{zero}: "
                f"{found.total / 1e9:.1f} GB of {topology.capacity / 1e9:.1f}."
            )
    return _nothing_fits(config, topology)


def _nothing_fits(config: Config, topology) -> str:
    from sae_jax.plan import estimate

    count = len(topology.devices)
    least = min(map(estimate.least_bytes, estimate.candidates(config, count)))
    return (
        f"No mesh of {count} devices fits: parameters, Adam's moments and gradients alone take "
        f"{least / 1e9:.1f} GB of each, which have {topology.capacity / 1e9:.1f}. Take more "
        "devices, or fewer latents."
    )
