"""Scaling laws: what sparse autoencoders lose, of a given size, sparsity and compute.

`read` reads results, `fit` fits a law to them, `fit_by` one to each group, `load` reads a fit
again; `sae_jax.laws.api` has an example.
"""

from sae_jax.laws.api import LawFit, fit, load, read
from sae_jax.laws.groups import Groups, fit_by

__all__ = ["Groups", "LawFit", "fit", "fit_by", "load", "read"]
