"""Opens the SAE that the flags of a command name."""

from typing import NamedTuple

from sae_jax.errors import UserError


class OpenedSAE(NamedTuple):
    """An SAE and where it is from.

    Attributes:
      sae: the SAE.
      name: what was opened: the absolute path of a run or SAE, or its name on the hub or in an
        object store.
      path: the run's directory or the SAE's folder.
      is_run: whether it is a run's.
      about: of a run, the settings that tell its checkpoint from others.
      data: the data section of the run's config, or an empty one that has what the SAE's file says.
    """

    sae: object
    name: str
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

    from sae_jax import interop, paths
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
    name = named if paths.is_remote(named) else str(path.absolute())
    return OpenedSAE(opened, name, path, is_run, about, data)


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
