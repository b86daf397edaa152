"""Reads and writes SAEs in the formats of other frameworks.

Each format has a module of its own, which has

    FILES        the names of the files that an export consists of
    EXPRESSES    what each (architecture, kind) of sae_jax is called in the format
    WHY_NOT      a clause that says why all others cannot be expressed
    USAGE        a snippet of Python by which the format's own framework computes latents
    recognises(path), read(path), write(sae, directory, provenance)

A format whose files do not say what kind an SAE is has read(path, kind).

An SAE that a format cannot express exactly is refused, never approximated.
"""

import pathlib

from absl import logging

from sae_jax.errors import UserError, choose
from sae_jax.interop import formats, hooks, sae_jax_format, saelens
from sae_jax.interop.card import Hub, model_card
from sae_jax.interop.formats import FORMATS
from sae_jax.interop.locate import is_fetched, kind_of, locate
from sae_jax.interop.provenance import read_provenance
from sae_jax.sae import SAE, SAEConfig
from sae_jax.sae.config import KINDS
from sae_jax.sae.files import new_folder
from sae_jax.train.checkpoints import load_sae
from sae_jax.train.directory import refuse_sweep

_KINDLESS = ("gemma_scope", "gemma_scope_2")


def load(path, sae_id: str | None = None, trust_code: bool = True, kind: str | None = None) -> SAE:
    """Returns the SAE at `path`.

    Raises UserError if there is no SAE at `path`, if it cannot be read, or if it is of another kind
    than `kind`.

    Args:
      path: a run, of which the last checkpoint is read; a checkpoint, RUN/checkpoints/STEP; or an
        SAE in any of `FORMATS`. Runs may be on s3:// and gs://. An SAE on the Hugging Face hub is
        hf://org/repository/folder, and one of SAELens' public releases is
        saelens://RELEASE/SAE_ID, or RELEASE together with `sae_id`.
      sae_id: the SAE of a SAELens release that `path` names.
      trust_code: whether a user's file that defines the SAE's architecture may be run, if `path`
        names one that is not imported yet. A file in `path` itself is never run, and none is run
        for an SAE that is fetched from a hub.
      kind: what the SAE must be: autoencoder, transcoder or another of `sae.config.KINDS`. Files of
        Gemma Scope do not say whether an SAE whose inputs and outputs are of one width is a
        transcoder; it is taken for an autoencoder unless this or SAELens' table says so.
    """
    if kind is not None:
        choose(kind, KINDS, "the kind of SAE")
    trust_code = trust_code and not is_fetched(path, sae_id)
    named = kind or kind_of(path, sae_id)
    path = locate(path, sae_id)
    try:
        sae = _load(path, trust_code, named)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if kind not in (None, sae.config.kind):
        raise UserError(f"{path} is of kind {sae.config.kind}, not {kind}")
    return sae


def _load(path, trust_code: bool, kind: str | None) -> SAE:
    name = formats.format_of(path)
    if name == "sae_jax":
        return sae_jax_format.read(path, trust_code)
    if name in _KINDLESS:
        return FORMATS[name].read(path, kind)
    if name:
        return FORMATS[name].read(path)
    if (path / "config.json").is_file():
        return load_sae(path, trust_code=trust_code)
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return load_sae(path.parent.parent, int(path.name), trust_code)
    refuse_sweep(path)
    where = f"no SAE at {path}"
    relative = isinstance(path, pathlib.Path) and not path.is_absolute()
    if relative and len(path.parts) > 1 and not path.exists():
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
    sae: SAE,
    format: str,
    directory,
    provenance: dict | None = None,
    hub: Hub | None = None,
    model=None,
) -> None:
    """Writes an SAE to a new directory in the named format, with a README.md, the model card.

    The export is the same function of activations in the model's own units. The normalisation is
    folded into the weights in float32, and so are the norms of the decoder's rows where the
    architecture allows it. The format sae_jax keeps an SAE as it is.

    SAELens' format names the hook of TransformerLens where an SAE reads. There is none at mlp_in.L.
    Given the language model, an SAE of that site is written as one of ln2.hook_normalized
    (`interop.hooks`); otherwise no hook is named, and a warning says so.

    Raises UserError if the format cannot express the SAE exactly, naming those that can, if the
    directory exists already or cannot be written, and if the model is needed and cannot be read.

    Args:
      sae: the SAE.
      format: a name of `FORMATS`.
      directory: the directory to make.
      provenance: where the SAE comes from, as `read_provenance` gives it.
      hub: where on the hub the export will be, and its license, for the model card.
      model: the language model, as `lm.load_params` takes it.
    """
    check_expressible(sae.config, format)
    provenance, module = provenance or {}, FORMATS[format]
    sae = sae if format == "sae_jax" else sae.fold()
    if format == "saelens" and hooks.needs_norm(provenance):
        if model is None:
            logging.warning(
                "%s: the export names no hook, since TransformerLens has none at %s; with the "
                "language model (--model=DIR) it is written for ln2.hook_normalized",
                directory,
                provenance["site"],
            )
        else:
            sae, provenance = hooks.at_hook(sae, provenance, model)
    with new_folder(directory) as folder:
        module.write(sae, folder, provenance)
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
