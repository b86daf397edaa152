"""What a run tells `train.watchdog` of itself."""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

from sae_jax.train.preemption import PreemptedError


class Waiting(NamedTuple):
    """What a run waits for that is not a device.

    Attributes:
      what: in words.
      since: when it began, on the monotonic clock.
      can_be_left: whether nothing is lost if the process ends meanwhile.
    """

    what: str
    since: float
    can_be_left: bool


class Progress:
    """How far a run is. The training loop writes it, and the watchdog's thread reads it.

    As a context manager it notes the error that ends the run. It does so before files are closed,
    which can hang because of that error.

    Attributes:
      begun: the last step that was dispatched.
      done: the last step that has ended.
      saved: the step of the newest complete checkpoint, None where there is none.
      resting: whether no step is to be timed now.
      waiting: what the run waits for that is not a device, None where there is no such thing.
      error: what ended the run; None for a run that goes on or was told to stop.
    """

    def __init__(self):
        self.begun = self.done = 0
        self.saved: int | None = None
        self.resting = True
        self.waiting: Waiting | None = None
        self.error: BaseException | None = None

    @contextlib.contextmanager
    def waits_for(self, what: str, can_be_left: bool = False) -> Iterator[None]:
        """Notes that within it the run waits for `what`, which a store that is away may hold up."""
        self.waiting = Waiting(what, time.monotonic(), can_be_left)
        try:
            yield
        finally:
            self.waiting = None

    def begin(self, step: int) -> None:
        """Notes that the batch of `step` is there, and that the step is about to be dispatched."""
        self.begun = step

    def end(self, step: int) -> None:
        """Notes that `step` has ended. The next one is timed from now on."""
        self.done = step
        self.resting = False

    def rest(self) -> None:
        """Notes that what comes next may take long. Nothing is timed until a step ends."""
        self.resting = True

    def __enter__(self) -> "Progress":
        self.error = None
        return self

    def __exit__(self, kind, error, *_) -> None:
        if not isinstance(error, PreemptedError):
            self.error = error
