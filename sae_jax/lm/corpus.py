"""Finds text that every machine with Python has: the sources of the standard library."""

import hashlib
import pathlib
import sysconfig

from sae_jax.lm.documents import text_files

# Tests, tables of character sets and quoted manuals: most of its bytes, little of its language.
_LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def standard_library() -> list[pathlib.Path]:
    """Returns the paths of the standard library's Python files, which `read_texts` reads.

    The order is by a hash of the path below the library. It mixes subjects, and is the same
    wherever the library is installed.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(root): path for path in text_files(root) if path.suffix == ".py"}
    kept = [
        name
        for name in files
        if not _LEFT_OUT & set(name.parts)
        and not name.name.startswith("_sysconfigdata")  # paths of one machine's build
    ]
    kept.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    return [files[name] for name in kept]
