"""Trains the configs on standard input, as a process of its own that `bench.packs` times.

    python -m sae_jax.bench.run_configs OUT < CONFIGS.json

CONFIGS.json is a list of resolved configs: one is trained as `sae-jax train` does, several as one
pass of a sweep. The runs' directories go into OUT. The last line of standard output is the number
of bytes that the process read after its imports.
"""

import json
import pathlib
import sys

import jax

from sae_jax import config as configs
from sae_jax.sweep.design import make_passes
from sae_jax.sweep.pass_trainer import train_pass
from sae_jax.train.results import run_id
from sae_jax.train.run import train_run


def main() -> None:
    """Trains the configs on standard input into the directory that the command line names."""
    jax.config.update("jax_default_matmul_precision", "highest")  # as the command does
    runs = [configs.from_dict(run) for run in json.load(sys.stdin)]
    before, out = _bytes_read(), pathlib.Path(sys.argv[1])
    if len(runs) > 1:
        train_pass(make_passes(runs)[0], out)
    else:
        train_run(runs[0], out / run_id(runs[0]))
    print(_bytes_read() - before)


def _bytes_read() -> int:
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    main()
