"""Shows the progress of work that can take a while.

On a terminal it is a bar, elsewhere a line in the log. Where there are several processes, process 0
alone shows it.
"""

import sys
from collections.abc import Iterable

import jax
import tqdm
from absl import logging


def progress(items: Iterable, what: str, total: int | None = None) -> Iterable:
    """Returns an iterable over `items` that shows how many of `total` items were taken.

    `what` says in the bar, or in the log, what is done. A bar appears after two seconds.
    """
    terminal = sys.stderr.isatty()
    shows = jax.process_index() == 0
    if shows and not terminal:
        logging.info("%s", what)
    return tqdm.tqdm(items, desc=what, total=total, delay=2, disable=not (shows and terminal))
