"""Opens the SAE and the language model that the flags of a command name."""

from typing import NamedTuple

from sae_jax.errors import UserError


class OpenedSAE(NamedTuple):
    """An SAE and where it is from.

    Attributes:
      sae: the SAE.
      path: the run's directory or the SAE's folder.
      is_run: whether it is a run's.
      about: of a run, the settings that tell its checkpoint from others.
      data: the data section of the run's config, or an empty one that has what the SAE's file says.
    """

    sae: object
    path: object
    is_run: bool
    about: dict
    data: object


def open_sae(run: str | None, sae: str | None, kind: str | None, chosen: dict) -> OpenedSAE:
    """Opens the SAE that --run or --sae names.

    Raises UserError if not one of them is given, and if there is no SAE.

    Args:
      run: the flag --run.
      sae: the flag --sae.
      kind: the flag --kind.
      chosen: fields of the data section that other flags give.
    """
    import dataclasses

    from sae_jax import interop
    from sae_jax.config import DataConfig
    from sae_jax.train.directory import find_store, read_config

    if bool(run) == bool(sae):
        raise UserError("give either --run=RUN or --sae=PATH")
    named = run or sae
    path, about = interop.locate(named), {}
    is_run = interop.format_of(path) is None and (path / "config.json").is_file()
    if is_run:
        checkpoint, about = latest(path)
        opened = interop.load(checkpoint, kind=kind)
    else:
        opened = interop.load(named, kind=kind)
    data = find_store(path, read_config(path).data) if is_run else DataConfig()
    data = dataclasses.replace(data, **chosen)
    if not data.site and not is_run:
        data = dataclasses.replace(data, site=interop.site(path) or "")
    return OpenedSAE(opened, path, is_run, about, data)


def latest(run) -> tuple:
    """Returns the path of a run's latest checkpoint, and the settings that tell it from others.

    The checkpoint is named, so that one that the run saves meanwhile is not taken for it. Raises
    UserError if there is none yet.
    """
    from sae_jax.evaluate.report import checkpoint_settings
    from sae_jax.train.checkpoints import saved_steps

    steps = saved_steps(run)
    if not steps:
        raise UserError(f"{run} holds no checkpoint yet; train it first")
    return run / "checkpoints" / str(steps[-1]), checkpoint_settings(run, steps[-1])


def model_of(asked: str | None, store):
    """Returns the model that the flag --model asks for, as `lm.open_model` takes it, or None.

    Without the flag it is the store's own model, if that is the one that ships here or on the hub.
    """
    from sae_jax import lm

    if asked is not None:
        return {"demo": lm.DEMO_MODEL, "none": None}.get(asked, asked)
    if store is None:
        return None
    made_by = store.meta.provenance.get("model_fingerprint")
    if made_by is not None and made_by == lm.fingerprint(lm.DEMO_MODEL):
        return lm.DEMO_MODEL
    return store.meta.model if lm.hub_name(store.meta.model or "") else None
