"""Our harvest beside transformers' model with forward hooks, in turn.

    python experiments/benchmarks/harvest_beside_transformers.py --model=DIR --text=FILE

Both copy the same sites of the same batches to float32 arrays of the host; ours writes a bfloat16
store too. Needs: pip install "sae-jax[peers]".
"""

import pathlib
import sys

import jax
from absl import app, flags
from torch_hooks import forward_to_host

from sae_jax import lm
from sae_jax.bench.harvest import default_sites, measure_harvest, table
from sae_jax.errors import UserError
from sae_jax.paths import save_json

_MODEL = flags.DEFINE_string("model", None, "Directory of the model.", required=True)
_TEXT = flags.DEFINE_list("text", None, "As for sae-jax harvest; Python's standard library.")
_SITES = flags.DEFINE_list("sites", None, "What to harvest; five of the middle layer.")
_CONTEXT_LENGTH = flags.DEFINE_integer("context_length", 128, "Tokens of a context.")
_TOKENS = flags.DEFINE_integer("tokens", 204_800, "Of a round.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed passes of each contestant.")
_OUT = flags.DEFINE_string("out", None, "Write the figures there as JSON.")


def main(_) -> int:
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 means float32
    try:
        figures = measure_harvest(
            _MODEL.value,
            lm.read_texts(_TEXT.value or lm.standard_library()),
            tuple(_SITES.value or default_sites(_MODEL.value)),
            _CONTEXT_LENGTH.value,
            _TOKENS.value,
            _ROUNDS.value,
            forward_to_host,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(figures))
    if _OUT.value:
        save_json(figures, pathlib.Path(_OUT.value))
    return 0


if __name__ == "__main__":
    app.run(main)
