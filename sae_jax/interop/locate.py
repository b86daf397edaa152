"""Finds an SAE's files by a path, a name on the Hugging Face hub, or a release of SAELens'."""

import dataclasses
import difflib

from sae_jax import hub, paths
from sae_jax.errors import UserError, some
from sae_jax.interop import saelens_releases
from sae_jax.interop.formats import FILES, FORMATS, folders_of, format_of
from sae_jax.interop.saelens_releases import SCHEME, hub_name


def is_fetched(path, sae_id: str | None = None) -> bool:
    """Returns whether `locate` fetches these arguments from a hub, where others wrote the files."""
    return sae_id is not None or str(path).startswith((SCHEME, hub.SCHEME))


def kind_of(path, sae_id: str | None = None) -> str | None:
    """Returns the kind of the SAE that these arguments of `locate` name, if the name says it.

    Only SAELens' table of releases does, of Gemma Scope's transcoders.
    """
    text = str(path)
    if text.startswith(SCHEME):
        return saelens_releases.kind_of(text.removeprefix(SCHEME).partition("/")[0])
    return None if sae_id is None else saelens_releases.kind_of(text)


def locate(path, sae_id: str | None = None) -> paths.AnyPath:
    """Returns the path from which an SAE is read, after downloading it if it is on a hub.

    Of a folder on the hub only the files of known formats are downloaded, and the result is the
    path of the local copy. Raises UserError if there is no SAE of the name on the hub, naming the
    folders that have one, and if the hub cannot be reached.

    Args:
      path: hf://org/repository[@revision]/folder, saelens://RELEASE/SAE_ID, or any other path,
        which is returned as it is. SAELens' public table says where a release is on the hub.
      sae_id: the SAE of the SAELens release that `path` then names.
    """
    text = str(path)
    if text.startswith(SCHEME):
        release, _, sae_id = text.removeprefix(SCHEME).partition("/")
        return _fetch(hub_name(release, sae_id))
    if sae_id is not None:
        return _fetch(hub_name(text, sae_id))
    return _fetch(hub.parse(text)) if hub.is_hub_name(text) else paths.path(path)


def _fetch(name: hub.HubName) -> paths.AnyPath:
    folder, _, last = name.folder.rpartition("/")
    if last in FILES:
        name = dataclasses.replace(name, folder=folder)
    try:
        local = hub.fetch(name, FILES)
    except hub.MissingFileError:
        local = None
    if local is None or format_of(local) is None:
        raise UserError(_explained(name, folders_of(hub.list_files(name))))
    return local


def _explained(name: hub.HubName, saes: list[str]) -> str:
    """Returns why a name is no SAE. `saes` are the folders of its repository that hold one."""
    if not saes:
        return (
            f"{name}: {name.repo} has no SAE in a format that is read here, of which there are "
            f"{', '.join(FORMATS)}"
        )
    if inside := [folder for folder in saes if folder.startswith(name.file(""))]:
        return f"{name} is not itself an SAE; name one of the folders in it: {some(inside)}"
    near = difflib.get_close_matches(name.folder, saes, n=3, cutoff=0.3) or saes
    return f"{name}: there is no SAE {name.folder!r} in {name.repo}; there are {some(near)}"
