"""Reads SAELens' public table of releases, which says where on the hub each of its SAEs is.

The table maps a (release, sae_id) to a repository and a folder in it. It is the file
pretrained_saes.yaml of the package sae-lens, and is read where that package is installed. Neither
sae-lens nor torch is imported.
"""

import functools
import importlib.util
import pathlib

from sae_jax.errors import UserError, choose, nearest
from sae_jax.hub import HubName

SCHEME = "saelens://"

# Its loaders (conversion_func) for formats that are read here; None: SAELens' own. Of
# gemma_3's the cross-layer transcoders ("clt") are of another shape.
_READ = (None, "gemma_2", "gemma_2_transcoder", "gemma_3", "dictionary_learning_1")
_CHANGES = ("normalize_activations", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "k")


def hub_name(release: str, sae_id: str) -> HubName:
    """Returns the folder on the hub of a SAELens release's SAE.

    Raises UserError for a release or an id that the table does not have, naming the nearest; for an
    SAE in a format that is not read here; and if sae-lens or PyYAML is not installed.
    """
    table = read_table()
    choose(release, table, f"the release of {SCHEME}{release}/{sae_id}")
    entry = table[release]
    folders = {str(sae["id"]): str(sae["path"]) for sae in entry["saes"]}
    if sae_id not in folders:
        raise UserError(f"release {release} has no SAE {sae_id!r}; {nearest(sae_id, folders)}")
    folder, loader = folders[sae_id], entry.get("conversion_func")
    if loader not in _READ or "clt" in folder:
        raise UserError(
            f"{SCHEME}{release}/{sae_id} is in a format that is not read here: SAELens' loader for "
            f"it is {loader!r}"
        )
    if loader == "gemma_2" and "embedding" in folder:
        raise UserError(
            f"{SCHEME}{release}/{sae_id}: SAELens rescales SAEs of embeddings as it loads them, "
            f"which is not done here; hf://{entry['repo_id']}/{folder} is the SAE as it was trained"
        )
    overrides = entry.get("config_overrides") or {}
    if changed := [field for field in _CHANGES if field in overrides]:
        raise UserError(
            f"{SCHEME}{release}/{sae_id}: SAELens changes {changed[0]} to "
            f"{overrides[changed[0]]!r} as it loads it, which is not done here"
        )
    return HubName(entry["repo_id"], overrides.get("revision"), folder)


def kind_of(release: str) -> str | None:
    """Returns the kind of a release's SAEs, if its files do not say it and the table does."""
    loader = read_table().get(release, {}).get("conversion_func")
    return "transcoder" if loader == "gemma_2_transcoder" else None


@functools.cache
def read_table() -> dict:
    """Returns the table in the installed package: the entry of each release, by its name.

    Raises UserError if sae-lens or PyYAML is not installed.
    """
    package = importlib.util.find_spec("sae_lens")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "names of SAELens' releases are in its package: pip install sae-lens, or name the "
            "folder as hf://org/repository/folder"
        )
    try:
        import yaml
    except ImportError:
        raise UserError("SAELens' table of releases needs PyYAML: pip install pyyaml") from None
    file = pathlib.Path(package.submodule_search_locations[0]) / "pretrained_saes.yaml"
    if not file.is_file():
        raise UserError(f"the installed sae-lens has no {file.name}; name the SAE as hf://...")
    loader = getattr(
        yaml, "CSafeLoader", yaml.SafeLoader
    )  # PyYAML may be built without the fast one
    with file.open(encoding="utf-8") as opened:
        return yaml.load(opened, Loader=loader)
