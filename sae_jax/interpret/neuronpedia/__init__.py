"""Brings what a collection holds about latents to Neuronpedia, and to SAEDashboard's programs."""

from sae_jax.interpret.neuronpedia.bulk import CREATOR_ID, Release
from sae_jax.interpret.neuronpedia.export import Export, check_names
from sae_jax.interpret.neuronpedia.layouts import (
    Written,
    write_bulk,
    write_saedashboard,
    write_upload_batches,
)
from sae_jax.interpret.neuronpedia.push import Pushed, planned, push

__all__ = [
    "CREATOR_ID",
    "Export",
    "Pushed",
    "Release",
    "Written",
    "check_names",
    "planned",
    "push",
    "write_bulk",
    "write_saedashboard",
    "write_upload_batches",
]
