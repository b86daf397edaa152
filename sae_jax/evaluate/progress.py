"""Progress of work that can take a while: a bar on a terminal, a line in the log elsewhere."""

import sys
from collections.abc import Iterable

import tqdm
from absl import logging


def progress(items: Iterable, what: str, total: int | None = None) -> Iterable:
    terminal = sys.stderr.isatty()
    if not terminal:
        logging.info("%s", what)
    return tqdm.tqdm(items, desc=what, total=total, delay=2, disable=not terminal)
