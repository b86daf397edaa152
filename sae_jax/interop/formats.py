"""Lists the formats that are read and written, and recognises them by their files."""

import pathlib

from sae_jax import paths
from sae_jax.interop import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    openai,
    sae_jax_format,
    saelens,
    sparsify,
)

FORMATS = {
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope_2,
    "openai": openai,
    "sae_jax": sae_jax_format,
}
FILES = tuple(sorted({file for one in FORMATS.values() for file in one.FILES}))


def format_of(path: paths.AnyPath) -> str | None:
    """Returns the name in `FORMATS` of the format of a local folder or file; None for others."""
    if not isinstance(path, pathlib.Path):
        return None
    return next((name for name, one in FORMATS.items() if one.recognises(path)), None)


def folders_of(files: list[str]) -> list[str]:
    """Returns the folders of a repository that hold an SAE, given the paths of all its files."""
    there = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        there.setdefault(folder, set()).add(name)
    return sorted(
        folder
        for folder, names in there.items()
        if any(names.issuperset(one.FILES) for one in FORMATS.values())
    )
