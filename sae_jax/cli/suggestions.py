"""Words about the meshes that `sae-jax plan` searched, and the command to paste for the best."""

import dataclasses
import shlex

from sae_jax.config import Config

_WORTH_SAYING = 0.9  # a mesh that takes less than this part of the time is named


def tried_table(found) -> str:
    """Returns the meshes of a `plan.search.Found` as lines, with compiled estimates in place of
    traced ones where there are any.
    """
    from sae_jax.plan import table

    compiled = {_tried(e.config): e for e in found.compiled}
    shown = [compiled.get(_tried(e.config), e) for e in found.screened]
    said = [] if all(e.compiled for e in shown) else [table.TRACED]
    said += [table.COMPILED] if said and compiled else []
    return "\n".join([table.HEADER, *map(table.row, shown), *said, ""])


def _tried(config: Config) -> tuple:
    """Returns in what the configs of a search differ."""
    return config.mesh, config.data.batch_size, config.sae.compute_dtype


def if_faster(found, config: Config):
    """Returns `found`, or None where its fastest mesh is not much faster than the config's."""
    from sae_jax.train.mesh import make_mesh

    devices = found.screened[0].topology.devices if found.screened else []
    sizes = dict(make_mesh(config, devices).shape) if found.fastest else {}
    own = [e for e in found.screened if e.mesh == sizes and e.config.mesh.zero == config.mesh.zero]
    if own and found.fastest.token_seconds < _WORTH_SAYING * own[0].token_seconds:
        return dataclasses.replace(found, least_memory=None)
    return None


def of_search(args, overrides: dict[str, str], config: Config, found) -> dict[str, dict]:
    """Returns what a search found, by name: the words that say what it is, the fields that differ
    from the config, and the command to paste.
    """
    from sae_jax.plan import table

    if found is None:
        return {}
    named = {
        "fastest": ("The fastest that fits", found.fastest),
        "least_memory": ("The least memory", found.least_memory),
    }
    if found.fastest is not None and found.fastest is found.least_memory:
        both = "The fastest that fits, and the least memory"
        named = dict.fromkeys(named, (both, found.fastest))
    suggested = {}
    for name, (what, estimate) in named.items():
        if estimate is None:
            continue
        fields, store = chosen_fields(estimate.config, config), estimate.config.data.store
        suggested[name] = {
            "words": f"{what}: {table.short(estimate)}",
            "fields": fields,
            "command": command_line("train", args, overrides, fields, store, estimate.topology),
            "bytes": estimate.total,
            "step_seconds": estimate.step_seconds,
        }
    return suggested


def chosen_fields(chosen: Config, config: Config) -> dict[str, object]:
    """Returns the fields that a search chose: the mesh, and what else differs from the config."""
    mesh = chosen.mesh
    fields = {"mesh.data": mesh.data, "mesh.model": mesh.model, "mesh.zero": mesh.zero}
    if mesh.run != 1:
        fields = {"mesh.run": mesh.run} | fields
    if chosen.data.batch_size != config.data.batch_size:
        fields["data.batch_size"] = chosen.data.batch_size
    if chosen.sae.compute_dtype != config.sae.compute_dtype:
        fields["sae.compute_dtype"] = chosen.sae.compute_dtype
    return fields


def command_line(name: str, args, overrides: dict, fields: dict, store: str, topology) -> str:
    """Returns the command that trains with what was chosen; STORE and DIRECTORY are to be filled
    in.
    """
    values = {"mesh.run": None, **overrides} | fields
    values |= {} if store else {"data.store": "STORE"}
    shown = {k: str(v).lower() if isinstance(v, bool) else v for k, v in values.items()}
    words = ["sae-jax", name, *([f"--config={args.config}"] if args.config else [])]
    words += [f"--config.{k}={v}" for k, v in shown.items() if v is not None]
    if topology.has_hosts:
        words.append("--distributed")  # on each of them; launch/ starts them
    return shlex.join([*words, "--workdir=DIRECTORY"])


def nothing_fits(tried: list[Config], found, topology) -> str:
    """Returns a sentence about the memory that configs need, none of which fits."""
    from sae_jax.plan import estimate

    least = min(map(estimate.least_bytes, tried))
    what = "parameters, Adam's moments and gradients alone take"
    if least <= topology.capacity:
        estimates = found.compiled or found.screened
        least, what = min(e.total for e in estimates), "the least memory is"
    return (
        f"No mesh of {len(topology.devices)} devices fits: {what} {least / 1e9:.1f} GB of each, "
        f"which have {topology.capacity / 1e9:.1f}. Take more devices, or fewer latents."
    )
