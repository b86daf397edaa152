import sys

from sae_jax.cli import entry

sys.exit(entry())
