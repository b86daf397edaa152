"""How an SAE is trained: mesh, state, step, optimiser, checkpoints, the loop."""

from sae_jax.train.checkpoints import load_sae
from sae_jax.train.directory import read_config
from sae_jax.train.loop import NonFiniteError, train
from sae_jax.train.preemption import PreemptedError

__all__ = ["NonFiniteError", "PreemptedError", "load_sae", "read_config", "train"]
