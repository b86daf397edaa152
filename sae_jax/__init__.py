"""Sparse autoencoders for language-model activations in JAX.

    import sae_jax

    sae = sae_jax.TopK(d_in=768, d_sae=24_576, k=32)      # or any of sae_jax.ARCHITECTURES
    result = sae_jax.train(sae, activations)              # an array, a generator or a store
    latents = result.sae.encode(x)                        # x: (..., 768), in the model's own units
    x_hat = result.sae.decode(latents)
    result.sae.save("mine"); sae = sae_jax.load("mine")   # or a run, or another framework's SAE

Activations come from `harvest` or `write_store`; `evaluate` says how good an SAE is, and `export`
writes it for other frameworks. The same from a shell: `sae-jax --help`.
"""

import importlib
import typing

if typing.TYPE_CHECKING:  # what an editor completes
    from sae_jax.activations import Store, write_store
    from sae_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
    from sae_jax.errors import UserError
    from sae_jax.evaluate.api import dead_latents, evaluate
    from sae_jax.interop import export, load
    from sae_jax.lm import harvest, open_store
    from sae_jax.sae import (
        ARCHITECTURES,
        SAE,
        BatchTopK,
        BatchTopKConfig,
        Gated,
        GatedConfig,
        JumpReLU,
        JumpReLUConfig,
        Losses,
        LossInputs,
        Matryoshka,
        MatryoshkaConfig,
        ReLU,
        ReLUConfig,
        ReLUL1Unit,
        ReLUL1UnitConfig,
        SAEConfig,
        TopK,
        TopKConfig,
    )
    from sae_jax.train.api import TrainResult, train

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "BatchTopK",
    "BatchTopKConfig",
    "Config",
    "DataConfig",
    "Gated",
    "GatedConfig",
    "JumpReLU",
    "JumpReLUConfig",
    "LossInputs",
    "Losses",
    "Matryoshka",
    "MatryoshkaConfig",
    "MeshConfig",
    "OptimizerConfig",
    "ReLU",
    "ReLUConfig",
    "ReLUL1Unit",
    "ReLUL1UnitConfig",
    "SAEConfig",
    "Store",
    "TopK",
    "TopKConfig",
    "TrainConfig",
    "TrainResult",
    "UserError",
    "activations",
    "dead_latents",
    "evaluate",
    "export",
    "harvest",
    "interop",
    "interpret",
    "laws",
    "lm",
    "load",
    "open_store",
    "ops",
    "plan",
    "sae",
    "sweep",
    "train",
    "write_store",
]
__version__ = "0.2.0"

# Where the names above are, in the order in which they are looked for.
_MODULES = "errors config sae activations train.api lm interop evaluate.api".split()
_PACKAGES = "activations interop interpret laws lm ops plan sae sweep".split()

# `train` and `evaluate` are functions here and packages beside this file. Importing a package puts
# it under its name; these two are nearly empty, and imported now, it happens before the functions
# are looked up, and not again.
for _package in ("train", "evaluate"):
    importlib.import_module(f"{__name__}.{_package}")
    del globals()[_package]


def __getattr__(name: str):
    """Imports on first use, so that `import sae_jax` is fast, and so that the command line can set
    JAX up before anything imports it."""
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    for module in _MODULES if name in __all__ else ():
        found = importlib.import_module(f"{__name__}.{module}")
        if hasattr(found, name):
            globals()[name] = getattr(found, name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
