"""A fit as files: fit.json, fit.png and report.html."""

import pathlib

from sae_jax.config import UserError, save_json


def save(found, out: str | pathlib.Path) -> None:
    """Writes the fit to the directory `out`, each file under a temporary name first."""
    out = pathlib.Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; give a directory")
    out.mkdir(parents=True, exist_ok=True)
    save_json(found.summary(), out / "fit.json")
