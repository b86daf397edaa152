"""Scaling laws: what sparse autoencoders lose, of a given size, sparsity and compute.

`read` reads results, `fit` fits a law to them, `fit_by` one to each group, `load` reads a fit
again; `sae_jax.laws.api` has an example. `compare` compares groups of runs by their frontiers.
"""

from sae_jax.laws.api import LawFit, fit, load, read
from sae_jax.laws.comparison import Comparison, compare
from sae_jax.laws.groups import Groups, fit_by

__all__ = ["Comparison", "Groups", "LawFit", "compare", "fit", "fit_by", "load", "read"]
