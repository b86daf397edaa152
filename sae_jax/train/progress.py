"""What a training program tells the watch over its processes of itself (`train.watchdog`)."""

from sae_jax.train.preemption import PreemptedError


class Progress:
    """Which step is under way, which is saved, and which error is on its way out.

    The training loop writes it, and a watchdog reads it from another thread. As a context manager
    it notes an error before what closes files can hang because of that error.
    """

    def __init__(self):
        self.begun = self.done = 0  # steps
        self.saved: int | None = None  # the step of a checkpoint that is there
        self.resting = True  # until a step ends, no clock runs
        self.error: BaseException | None = None

    def begin(self, step: int) -> None:
        """Says that the batch of `step` is there, and that the step is about to be dispatched."""
        self.begun = step

    def end(self, step: int) -> None:
        """Says that `step` has been computed."""
        self.done = step
        self.resting = False

    def rest(self) -> None:
        """Says that what comes next takes its time: the clock stands until a step ends."""
        self.resting = True

    def __enter__(self) -> "Progress":
        self.error = None
        return self

    def __exit__(self, kind, error, *_) -> None:
        if not isinstance(error, PreemptedError):
            self.error = error
