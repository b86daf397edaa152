"""Formats of other frameworks, one file each, and one door to all of them.

Each has `FILES` that it consists of, `recognises(path)`, `read(path)`, `write(sae, directory,
about)`, `USAGE`, how its own framework is asked for latents, and `EXPRESSES`: what each
(architecture, kind) of ours is called there. What is not in it is refused, never approximated.
"""

from sae_jax.errors import UserError, choose
from sae_jax.interop import formats, sae_jax_format, saelens
from sae_jax.interop.card import Hub, model_card
from sae_jax.interop.formats import FORMATS
from sae_jax.interop.locate import is_fetched, locate
from sae_jax.interop.provenance import read_provenance
from sae_jax.sae import SAE, SAEConfig
from sae_jax.sae.files import new_folder
from sae_jax.train.checkpoints import load_sae


def load(path, sae_id: str | None = None, trust_code: bool = True) -> SAE:
    """Returns the SAE at `path`: a run of ours (its last checkpoint), one of its checkpoints
    (RUN/checkpoints/STEP), or what any of `FORMATS` describes.

    `path` may be of another machine too: s3:// and gs:// for runs; hf://org/repository/folder on
    the Hugging Face hub; and of SAELens' public releases saelens://RELEASE/SAE_ID, or RELEASE
    together with `sae_id` (`locate`).

    trust_code: whether the user's file that defines the SAE's own architecture may be run, where
    `path` names one and it is not imported yet. A file within `path` never is, nor any for what
    is fetched from a hub.

    Raises UserError if there is no SAE at `path`, or it cannot be read."""
    trust_code = trust_code and not is_fetched(path, sae_id)
    path = locate(path, sae_id)
    name = formats.format_of(path)
    if name == "sae_jax":
        return sae_jax_format.read(path, trust_code)
    if name:
        return FORMATS[name].read(path)
    if (path / "config.json").is_file():
        return load_sae(path, trust_code=trust_code)
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return load_sae(path.parent.parent, int(path.name), trust_code)
    raise UserError(
        f"no SAE at {path}: neither a run (config.json, checkpoints/) nor one of the formats "
        f"{', '.join(FORMATS)}"
    )


def format_of(path) -> str | None:
    """Returns the format of what another framework, or `export`, wrote, None for a run.

    `path` is any that `load` takes; UserError as there."""
    return formats.format_of(locate(path))


def site(path) -> str | None:
    """Our name of the site that the SAE at `path` reads, where its format says so."""
    path = locate(path)
    name = formats.format_of(path)
    if name == "saelens":
        return saelens.site(path)
    return sae_jax_format.read_provenance(path).get("site") if name == "sae_jax" else None


def export(
    sae: SAE, format: str, directory, about: dict | None = None, hub: Hub | None = None
) -> None:
    """Writes the SAE to a new `directory` in the named format, as the same function of activations
    in the model's own units: normalisation and, where the architecture allows it, the norms of the
    decoder's rows are folded in, in float32. Beside it a README.md, the hub's model card. about:
    what `origin` knows of it.

    UserError for a format that cannot express it exactly, naming those that can, and for a
    directory that is there."""
    check_expressible(sae.config, format)
    about, module = about or {}, FORMATS[format]
    with new_folder(directory) as folder:
        module.write(sae if format == "sae_jax" else sae.fold(), folder, about)
        readme = model_card(sae, format, module.USAGE, about, hub or Hub())
        (folder / "README.md").write_text(readme, encoding="utf-8")


def check_expressible(config: SAEConfig, format: str) -> None:
    choose(format, FORMATS, "--format")
    module, what = FORMATS[format], (config.architecture, config.kind)
    if what not in module.EXPRESSES:
        able = [name for name, one in FORMATS.items() if what in one.EXPRESSES]
        raise UserError(
            f"{format} cannot express a {what[0]} {what[1]}: {module.WHY_NOT}. These can: "
            f"{', '.join(able)}"
        )


__all__ = [
    "FORMATS",
    "Hub",
    "check_expressible",
    "export",
    "format_of",
    "load",
    "locate",
    "read_provenance",
    "site",
]
