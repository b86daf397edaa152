"""The dashboard of an SAE: every latent on a page, as files or from a server."""

from sae_jax.interpret.dashboard.explanations import Explained, read_explanations
from sae_jax.interpret.dashboard.export import About, about, check_folder, export
from sae_jax.interpret.dashboard.labels import Labels, read_labels
from sae_jax.interpret.dashboard.latents import Latent, Latents
from sae_jax.interpret.dashboard.live import Live
from sae_jax.interpret.dashboard.neurons import WIDEST, Neurons, correlated_neurons
from sae_jax.interpret.dashboard.server import SHARD, open_server

__all__ = [
    "SHARD",
    "WIDEST",
    "About",
    "Explained",
    "Labels",
    "Latent",
    "Latents",
    "Live",
    "Neurons",
    "about",
    "check_folder",
    "correlated_neurons",
    "export",
    "open_server",
    "read_explanations",
    "read_labels",
]
