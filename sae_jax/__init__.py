"""Sparse autoencoders for language-model activations in JAX.

    import sae_jax
    sae = sae_jax.load("runs/a")      # a run, or an SAE that another framework saved
    latents = sae.encode(x)           # x: (..., d_in), in the model's own units
    x_hat = sae.decode(latents)

The command line is `sae-jax --help`.
"""

import importlib

_HOME = {
    "ARCHITECTURES": "sae_jax.sae",
    "Config": "sae_jax.config",
    "SAE": "sae_jax.sae",
    "UserError": "sae_jax.errors",
    "load": "sae_jax.interop",
    "write_store": "sae_jax.activations",
}
_PACKAGES = """activations config errors evaluate interop interpret laws lm ops plan sae sweep
train""".split()
__all__ = [*_HOME, *_PACKAGES]  # pdoc writes a page for each package that is listed


def __getattr__(name: str):
    """Imports on first use: the command line must set up devices before JAX is there."""
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return __all__
