"""What a run tells `train.watchdog` of itself."""

from sae_jax.train.preemption import PreemptedError


class Progress:
    """How far a run is. The training loop writes it, and the watchdog's thread reads it.

    As a context manager it notes the error that ends the run. It does so before files are closed,
    which can hang because of that error.

    Attributes:
      begun: the last step that was dispatched.
      done: the last step that has ended.
      saved: the step of the newest complete checkpoint, None where there is none.
      resting: whether no step is to be timed now.
      error: what ended the run; None for a run that goes on or was told to stop.
    """

    def __init__(self):
        self.begun = self.done = 0
        self.saved: int | None = None
        self.resting = True
        self.error: BaseException | None = None

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
