"""Progress of work that can take a while: a bar on a terminal, a line in the log elsewhere; of
process 0 where there are several."""

import sys
from collections.abc import Iterable

import jax
import tqdm
from absl import logging


def progress(items: Iterable, what: str, total: int | None = None) -> Iterable:
    terminal = sys.stderr.isatty()
    speaks = jax.process_index() == 0
    if speaks and not terminal:
        logging.info("%s", what)
    return tqdm.tqdm(items, desc=what, total=total, delay=2, disable=not (speaks and terminal))
