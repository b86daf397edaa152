"""Work in a thread that does not keep the process from ending.

A request to an object store that is away is tried for minutes, and cannot be called off. The
threads of `concurrent.futures` would hold up the end of the process for as long.
"""

import concurrent.futures
import threading
from collections.abc import Callable


def start(function: Callable, *arguments) -> concurrent.futures.Future:
    """Calls a function in a thread of its own. Returns the future of its result."""
    future = concurrent.futures.Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future
