"""What the directory of a fit holds, whose it is, and what of an earlier fit has to go.

A directory is of one fit, or of fits by groups, which have directories of their own inside. Files
of ours are written anew and those of an earlier fit do not stay beside them; others' are let be.
"""

import pathlib
from collections.abc import Collection

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.json_files import read_json
from sae_jax.laws import next_run, saved
from sae_jax.paths import AnyPath

FIT = (
    "fit.json", "fit.png", "curve.csv", "table.md", "table.tex", "report.html", saved.FILE,
)  # fmt: skip
GROUPS = ("by.json", "by.csv", "by.png", "table.md", "table.tex")


def check_fit(out: str | AnyPath) -> None:
    """Raises UserError where the directory of a fit cannot be made, or has other files by the names
    of a fit's.
    """
    _check(out, FIT, "law", "sae-jax fit", GROUPS[0], "fits by groups")


def check_groups(out: str | AnyPath) -> None:
    """Raises UserError where the directory of fits by groups cannot be made, or has other files by
    the names of theirs.
    """
    _check(out, GROUPS, "differences", "sae-jax fit --by", FIT[0], "a fit of all runs")


def forget_fit(out: AnyPath) -> None:
    """Removes an earlier fit's state and plan, where another is about to be written."""
    for name in (saved.FILE, next_run.FILE):
        (out / name).unlink(missing_ok=True)


def forget_groups(out: AnyPath, keep: Collection[str]) -> None:
    """Removes the fits of an earlier fit's groups, but for the directories `keep`, which are about
    to be written. A directory that holds something else stays with it.
    """
    for group in read_json(out / GROUPS[0], default={}).get("groups", {}).values():
        if group["directory"] in keep:
            continue
        folder = paths.inside(out, group["directory"])
        for name in (*FIT[1:], next_run.FILE, FIT[0]):  # the last says whose the others are
            (folder / name).unlink(missing_ok=True)
        if isinstance(folder, pathlib.Path) and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _check(out, names: tuple[str, ...], key: str, of: str, other: str, what: str) -> None:
    """Raises UserError where `out` is a file, or holds one of `names` without the first of these,
    with its `key`; or `other`, which is what another kind of fit writes.
    """
    out = paths.path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; give a directory")
    if (out / other).exists():
        raise UserError(f"{out} has {what} ({other}), which would be mixed in; give another --out")
    theirs = next((out / name for name in names if (out / name).exists()), None)
    if theirs and (theirs.name != names[0] or key not in read_json(theirs)):
        raise UserError(f"{theirs} is not of {of}; give another --out")
