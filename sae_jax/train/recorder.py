"""Recorders keep what a run does, in memory or on disk: its metrics, checkpoints and result."""

import functools
from collections.abc import Callable, Sequence

import jax
from absl import logging

from sae_jax.config import Config
from sae_jax.paths import AnyPath
from sae_jax.train import metrics
from sae_jax.train.checkpoints import Checkpoints
from sae_jax.train.directory import RunDirectory, is_writer
from sae_jax.train.loggers import Log, Logger, open_loggers
from sae_jax.train.results import metrics_line, missed_target
from sae_jax.train.schedule_steps import count_steps
from sae_jax.train.step import TrainState

OnMetrics = Callable[[dict], None]
"""A function that is called with each line of metrics, a dict."""


class NonFiniteError(Exception):
    """The loss or the gradient of a run became NaN or infinite."""


class Recorder:
    """Records one run in memory: its lines of metrics and its result.

    `RunRecorder` writes to disk as well.

    Attributes:
      config: the resolved config.
      checkpoint_steps: the steps that there are checkpoints of.
      last_line: the last line of metrics, or None.
      result: the content of result.json, or None where the run has not ended.
      state: the last state of a run that has ended and has no checkpoint, else None.
      failed: whether the run was given up because its loss became NaN or infinite.
    """

    checkpoint_steps: Sequence[int] = ()
    _where_again = ""

    def __init__(
        self, config: Config, on_metrics: Sequence[OnMetrics] = (), log_to: Log | None = None
    ):
        """Prepares to record a run.

        Args:
          config: the resolved config.
          on_metrics: each is called with every line of metrics, on process 0.
          log_to: where lines of metrics go besides, on process 0.
        """
        self.config = config
        self._lines: list[dict] = []
        self._adopted: TrainState | None = None
        self.last_line: dict | None = None
        self.result: dict | None = None
        self.state: TrainState | None = None
        self.failed = False
        self._on_metrics = on_metrics
        self._log_to = log_to or Log()
        self._loggers: list[Logger] = []

    @property
    def open(self) -> bool:
        """Whether the run is still to be trained."""
        return self.result is None and not self.failed

    def adopt(self, state: TrainState, step: int, run: AnyPath) -> None:
        """Takes over the state of another run, as the checkpoint that this one goes on from.

        Args:
          state: the state after `step`.
          step: how many steps the other run has done.
          run: its directory, from which the lines of metrics up to there are taken.
        """
        self.checkpoint_steps, self._adopted = (step,), state
        file = run / "metrics.jsonl"
        self._lines = metrics.read_lines(file, step) if file.is_file() else []

    def restore(self, like: TrainState, step: int) -> TrainState:
        """Returns the state of a checkpoint, with the shapes and shardings of `like`."""
        del like, step  # it was adopted as it is, and nothing else holds its memory
        state, self._adopted = self._adopted, None
        return state

    def start(self, step: int) -> None:
        """Prepares to record the metrics of the steps after `step`."""
        self._open_loggers(step, None, self.read_lines)

    def log(self, step: int, values: dict[str, float], steps_per_second: float | None) -> None:
        """Records a step's metrics.

        Args:
          step: how many steps the run has done.
          values: the metrics that `Trainer.update` returns, as numbers.
          steps_per_second: the speed since the last logged step, None where it is not known.

        A step whose loss was not finite ends the run (see `fail`). If `train.on_nonfinite` says to
        skip such steps, the log says so once.
        """
        values = dict(values)
        bad_step = values.pop("nonfinite_step")
        if bad_step >= 0:
            if self.config.train.on_nonfinite == "stop":
                return self.fail(bad_step)
            logging.log_first_n(
                logging.WARNING, "step %d gave a non-finite loss and was skipped", 1, bad_step + 1
            )
        self._add(metrics_line(self.config, step, values, steps_per_second))

    def _add(self, line: dict) -> None:
        """Keeps a line of metrics, and gives it to `on_metrics` and the loggers."""
        self.last_line = line
        self._keep(line)
        if is_writer():
            for receive in (*self._on_metrics, *self._loggers):
                receive(line)

    def _keep(self, line: dict) -> None:
        self._lines.append(line)

    def fail(self, step: int) -> None:
        """Raises NonFiniteError for the step (from 0) whose loss or gradient was not finite."""
        raise NonFiniteError(
            f"the loss or its gradient became NaN or infinite at step {step + 1}; "
            f"{self._what_is_left()}. Lower optimizer.learning_rate, or set "
            f"train.on_nonfinite=skip to leave out such steps{self._where_again}"
        )

    def save(self, state: TrainState, step: int) -> None:
        """Makes a checkpoint of the state after `step`, where the run is on disk.

        It may still be being written when this returns.
        """

    def finish_saving(self) -> None:
        """Waits until the last checkpoint is written."""

    def end(self, result: dict, state: TrainState) -> None:
        """Keeps the result of the run, which has now ended, and its last state."""
        self.result, self.state = result, state
        self._close_loggers()
        self._say_if_missed("")

    def _say_if_missed(self, where: str) -> None:
        """Warns if the run that has ended did not reach its target L0."""
        if is_writer() and (missed := missed_target(self.result)):
            logging.warning("%s%s", where, missed)

    def read_lines(self) -> list[dict]:
        """Returns all lines of metrics so far, oldest first."""
        return self._lines

    def close(self) -> None:
        """Closes all files and logs that are open."""
        self._close_loggers()

    def _open_loggers(
        self, step: int, path: AnyPath | None, earlier: Callable[[], Sequence[dict]]
    ) -> None:
        if is_writer():
            self._loggers = open_loggers(self._log_to, self.config, path, step, earlier)

    def _close_loggers(self) -> None:
        for logger in self._loggers:
            logger.close(self.result)
        self._loggers = []

    def _what_is_left(self) -> str:
        return "nothing was saved, as there is no workdir"


class RunRecorder(Recorder):
    """Records one run in its directory: config.json, metrics.jsonl, checkpoints/, result.json.

    A single run raises NonFiniteError when its loss becomes NaN. A run that is `one_of_many`, as in
    a sweep, gets failed.json instead and is not trained any more, while the others go on.
    """

    _where_again = ", in a new --workdir"

    def __init__(
        self,
        config: Config,
        path: AnyPath,
        *,
        on_metrics: Sequence[OnMetrics] = (),
        log_to: Log | None = None,
        data_fingerprint: str | None = None,
        keep: int | None = None,
        one_of_many: bool = False,
        lineage: Sequence[dict] = (),
    ):
        """Makes the directory, or finds the interrupted run of the same config in it.

        Args:
          config: the resolved config.
          path: the directory.
          on_metrics: each is called with every line of metrics, on process 0.
          log_to: where lines of metrics go besides, on process 0.
          data_fingerprint: that of the stream of batches.
          keep: how many checkpoints stay, by default the config's number.
          one_of_many: whether other runs go on when this one fails. Whoever trains them has checked
            that all processes share the directory that the runs are in.
          lineage: of a branch, what `branch.Origin.lineage` says.

        Raises UserError if the directory holds something else.
        """
        super().__init__(config, on_metrics, log_to)
        self.directory = RunDirectory(
            path, config, data_fingerprint, check_shared=not one_of_many, lineage=lineage
        )
        self.config = self.directory.config
        self.result = self.directory.result
        self.failed = self.directory.failure is not None
        self._one_of_many = one_of_many
        self._checkpoints = Checkpoints(path, keep or config.train.keep_checkpoints, config)

    @property
    def checkpoint_steps(self) -> Sequence[int]:
        """The steps that there are checkpoints of."""
        return self._checkpoints.steps

    def restore(self, like: TrainState, step: int) -> TrainState:
        state = self._checkpoints.restore(like, step)
        if not self._one_of_many:
            steps = count_steps(self.config)
            logging.info("resumed %s at step %d of %d", self.directory.path, step, steps)
        return state

    def start(self, step: int) -> None:
        self.directory.start_metrics(step)
        earlier = functools.partial(self.directory.lines_until, step)
        self._open_loggers(step, self.directory.path, earlier)

    def copy_metrics(self, other: "RunRecorder", step: int) -> None:
        """Copies the metrics of another run up to `step`, from which this run branches off."""
        self.directory.copy_metrics(other.directory.path, step)

    def adopt(self, state: TrainState, step: int, run: AnyPath) -> None:
        self.directory.copy_metrics(run, step)
        self.save(state, step)
        self.finish_saving()

    def _keep(self, line: dict) -> None:
        self.directory.log(line)

    def fail(self, step: int) -> None:
        if not self._one_of_many:
            super().fail(step)
        reason = f"the loss or its gradient became NaN or infinite at step {step + 1}"
        self.directory.save_failure({"step": step + 1, "reason": reason})
        self.failed = True
        self._close_loggers()
        logging.warning(
            "%s: non-finite loss at step %d; the run is given up, the others go on",
            self.directory.path,
            step + 1,
        )

    def save(self, state: TrainState, step: int) -> None:
        self.directory.flush()
        self._checkpoints.save(state, step)
        if jax.process_count() > 1 and self._one_of_many:
            self.finish_saving()  # Orbax's barriers are one set for all checkpointers

    def finish_saving(self) -> None:
        self._checkpoints.finish()

    def end(self, result: dict, state: TrainState) -> None:
        self.result = result
        self.directory.save_result(result)
        self._close_loggers()
        self._say_if_missed(f"{self.directory.path}: ")

    def read_lines(self) -> list[dict]:
        return self.directory.read_metrics()

    def close(self) -> None:
        self._checkpoints.close()
        self.directory.close()
        super().close()

    def _what_is_left(self) -> str:
        steps = self.checkpoint_steps
        if not steps:
            return f"there was no checkpoint yet in {self.directory.path}"
        return f"the last checkpoint in {self.directory.path} (step {max(steps)}) is intact"
