"""Runs the command line: `python -m sae_jax` is `sae-jax`."""

import sys

from sae_jax.cli import entry

sys.exit(entry())
