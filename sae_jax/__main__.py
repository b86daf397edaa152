import sys

from sae_jax.cli import main

sys.exit(main())
