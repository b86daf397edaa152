"""Formats of other frameworks, one file each, and one door to all of them."""

from sae_jax import paths
from sae_jax.config import UserError
from sae_jax.interop.saelens import is_saelens, read_saelens, saelens_site
from sae_jax.sae import SAE
from sae_jax.train import load_sae


def load(path) -> SAE:
    """The SAE at `path`: a run of ours (its last checkpoint), one of its checkpoints
    (RUN/checkpoints/STEP), or a folder of SAELens'. UserError where it is none of them."""
    path = paths.path(path)
    if is_saelens(path):
        return read_saelens(path)
    if (path / "config.json").is_file():
        return load_sae(path)
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return load_sae(path.parent.parent, int(path.name))
    raise UserError(
        f"no SAE at {path}: neither a run (config.json, checkpoints/) nor a SAELens folder "
        "(cfg.json, sae_weights.safetensors)"
    )


__all__ = ["is_saelens", "load", "read_saelens", "saelens_site"]
