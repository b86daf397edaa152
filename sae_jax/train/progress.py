"""What a run tells of itself to whoever watches it (`train.watchdog`)."""

from sae_jax.train.preemption import PreemptedError


class Progress:
    """How far the steps of a run are. The loop that trains writes it and a watch reads it, from
    another thread; where nobody watches, it is written in vain.

    As a context it notes an error on its way out, before closing files, which can hang because of
    that error.

    begun, done: the last step that was dispatched, and that has ended. saved: the step of the
    newest checkpoint that is complete, None where there is none. resting: whether no step is to be
    timed now. error: what ended the run, None for a run that goes on or was told to stop."""

    def __init__(self):
        self.begun = self.done = 0
        self.saved: int | None = None
        self.resting = True
        self.error: BaseException | None = None

    def begin(self, step: int) -> None:
        """Says that the batch of `step` is there, and that the step is about to be dispatched."""
        self.begun = step

    def end(self, step: int) -> None:
        """Says that `step` has ended. The next one is timed from now on."""
        self.done = step
        self.resting = False

    def rest(self) -> None:
        """Says that what comes next may take long. Nothing is timed until a step ends."""
        self.resting = True

    def __enter__(self) -> "Progress":
        self.error = None
        return self

    def __exit__(self, kind, error, *_) -> None:
        if not isinstance(error, PreemptedError):
            self.error = error
