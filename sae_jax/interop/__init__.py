"""Reads and writes SAEs in the formats of other frameworks.

Each format has a module of its own, which has

    FILES        the names of the files that an export consists of
    EXPRESSES    what each (architecture, kind) of sae_jax is called in the format
    WHY_NOT      a clause that says why all others cannot be expressed
    USAGE        a snippet of Python by which the format's own framework computes latents
    recognises(path), read(path), write(sae, directory, provenance)

An SAE that a format cannot express exactly is refused, never approximated.
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
    """Returns the SAE at `path`.

    Raises UserError if there is no SAE at `path`, or if it cannot be read.

    Args:
      path: a run, of which the last checkpoint is read; a checkpoint, RUN/checkpoints/STEP; or an
        SAE in any of `FORMATS`. Runs may be on s3:// and gs://. An SAE on the Hugging Face hub is
        hf://org/repository/folder, and one of SAELens' public releases is
        saelens://RELEASE/SAE_ID, or RELEASE together with `sae_id`.
      sae_id: the SAE of a SAELens release that `path` names.
      trust_code: whether a user's file that defines the SAE's architecture may be run, if `path`
        names one that is not imported yet. A file in `path` itself is never run, and none is run
        for an SAE that is fetched from a hub.
    """
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
    where = f"no SAE at {path}"
    if not path.exists():
        where += f", and on the Hugging Face hub it would be hf://{path}"
    raise UserError(
        f"{where}: neither a run (config.json, checkpoints/) nor one of the formats "
        f"{', '.join(FORMATS)}"
    )


def format_of(path) -> str | None:
    """Returns the name in `FORMATS` of the format of the SAE at `path`; None for a run.

    `path` is any that `load` takes. Raises UserError if it is on a hub and cannot be fetched.
    """
    return formats.format_of(locate(path))


def site(path) -> str | None:
    """Returns the site that the SAE at `path` reads, such as resid_post.3.

    It is None if the SAE's format does not say it, or names a hook that is no site of sae_jax.
    """
    path = locate(path)
    name = formats.format_of(path)
    if name == "saelens":
        return saelens.site(path)
    return sae_jax_format.read_provenance(path).get("site") if name == "sae_jax" else None


def export(
    sae: SAE, format: str, directory, provenance: dict | None = None, hub: Hub | None = None
) -> None:
    """Writes an SAE to a new directory in the named format, with a README.md, the model card.

    The export is the same function of activations in the model's own units. The normalisation is
    folded into the weights in float32, and so are the norms of the decoder's rows where the
    architecture allows it. The format sae_jax keeps an SAE as it is.

    Raises UserError if the format cannot express the SAE exactly, naming those that can, and if
    the directory exists already.

    Args:
      sae: the SAE.
      format: a name of `FORMATS`.
      directory: the directory to make.
      provenance: where the SAE comes from, as `read_provenance` gives it.
      hub: where on the hub the export will be, and its license, for the model card.
    """
    check_expressible(sae.config, format)
    provenance, module = provenance or {}, FORMATS[format]
    with new_folder(directory) as folder:
        module.write(sae if format == "sae_jax" else sae.fold(), folder, provenance)
        readme = model_card(sae, format, module.USAGE, provenance, hub or Hub())
        (folder / "README.md").write_text(readme, encoding="utf-8")


def check_expressible(config: SAEConfig, format: str) -> None:
    """Raises UserError if `format` is unknown or cannot express an SAE of this config exactly.

    The error names the formats that can.
    """
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
