"""Where lines of metrics go besides metrics.jsonl: Weights & Biases and TensorBoard.

The packages are those of the extra `log`; they are imported only where they are asked for.
"""

import contextlib
import dataclasses
import importlib.util
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from absl import logging

from sae_jax import config as configs
from sae_jax import paths
from sae_jax.config import Config
from sae_jax.errors import UserError, choose
from sae_jax.paths import AnyPath
from sae_jax.train.preemption import PreemptedError
from sae_jax.train.results import run_id

_SINKS = ("wandb", "tensorboard")
_NOT_IN_A_PROJECT = "\\#?%:"  # refused by wandb's server in a project's name
_FINISH_SECONDS = 60.0  # that a run's end waits for what is not uploaded yet; it is on disk


class Logger(Protocol):
    """Takes one run's lines of metrics, one after another, and is closed at the end."""

    def __call__(self, line: dict) -> None:
        """Logs a line of metrics.jsonl, without the values that are None."""

    def close(self, result: dict | None) -> None:
        """Ends the log.

        `result` is the content of result.json, or None for a run that was stopped or has failed.
        """


@dataclasses.dataclass(frozen=True)
class Log:
    """Says where lines of metrics go besides metrics.jsonl; `parse_log` makes it of a text.

    Attributes:
      project: the project in Weights & Biases, PROJECT or ENTITY/PROJECT; None where no lines go
        there.
      tensorboard: whether event files are written into the run's directory.
      group: the group of a sweep's runs in Weights & Biases.
      names: the names of a sweep's runs there, by their ids; else a run has its directory's.
    """

    project: str | None = None
    tensorboard: bool = False
    group: str | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


def parse_log(spec: str, workdir: str | AnyPath | None = None, *, is_sweep: bool = False) -> Log:
    """Reads a text such as "wandb:PROJECT,tensorboard", and checks it without any device.

    `workdir` is the directory of the run. For a sweep (`is_sweep`) it is the sweep's, and its name
    becomes the runs' group.

    Raises UserError for an unknown place, one that is named twice, wandb without a project, a
    package that is not installed, and tensorboard for a run that has no local directory.
    """
    values = {}
    for entry in spec.split(",") if spec else ():
        sink, _, argument = entry.partition(":")
        choose(sink, _SINKS, f"log={spec}: a place to log to")
        if sink in values:
            raise UserError(f"log={spec} names {sink} twice; name it once")
        values[sink] = argument
        _check_installed(sink)
    if "wandb" in values:
        _check_project(values["wandb"])
    if values.get("tensorboard"):
        raise UserError(
            f"log=tensorboard:{values['tensorboard']}: write tensorboard alone; its files go to "
            "the run's directory"
        )
    if "tensorboard" in values and (workdir is None or paths.is_remote(workdir)):
        where = "without a workdir there is none" if workdir is None else f"{workdir} is remote"
        raise UserError(
            f"log=tensorboard writes into the run's directory on this machine, and {where}; use a "
            "local workdir, or log=wandb:PROJECT"
        )
    group = paths.path(workdir).absolute().name if is_sweep else None
    return Log(values.get("wandb"), "tensorboard" in values, group)


def _check_installed(sink: str) -> None:
    """Raises UserError if the package is not installed."""
    # A folder named `wandb`, such as wandb makes, is importable as a package without an origin.
    found = importlib.util.find_spec(sink)
    if found is None or found.origin is None:
        raise UserError(f'log={sink} needs a package: pip install "sae-jax[log]"')


def _check_project(project: str) -> None:
    if not project or project.startswith("/") or project.endswith("/"):
        raise UserError(
            f"log=wandb:{project} names no project; write log=wandb:PROJECT or "
            "log=wandb:ENTITY/PROJECT"
        )
    if project.count("/") > 1 or set(_NOT_IN_A_PROJECT) & set(project):
        raise UserError(
            f"log=wandb:{project}: a project's name has none of / {' '.join(_NOT_IN_A_PROJECT)}"
        )


def open_loggers(
    log: Log, config: Config, path: AnyPath | None, step: int, earlier: Callable[[], Sequence[dict]]
) -> list[Logger]:
    """Opens the loggers of a run that begins, or goes on, after `step`.

    Args:
      log: where lines go.
      config: the resolved config.
      path: the run's directory, if it has one.
      step: the step after which lines come.
      earlier: returns the lines of the run's metrics.jsonl up to `step`. A log that lacks them gets
        them first: in a sweep a run may begin with the steps of another, and a run may have been
        started without a log.

    A logger that fails later is told of in one warning and gets no more lines; the run goes on.

    Raises UserError if Weights & Biases refuses the user or the project.
    """
    loggers: list[Logger] = []
    if log.project:
        loggers.append(_Guarded("wandb", lambda: _Wandb(log, config, path, earlier)))
    if log.tensorboard:
        folder = path / "tensorboard"
        loggers.append(_Guarded("tensorboard", lambda: _TensorBoard(folder, step, earlier)))
    return loggers


class _Guarded:
    """A logger that is left alone after its first failure."""

    def __init__(self, name: str, make: Callable[[], Logger]):
        self._name, self._logger = name, None
        with self._failure_as_warning():
            self._logger = make()

    def __call__(self, line: dict) -> None:
        with self._failure_as_warning():
            if self._logger is not None:
                self._logger(line)

    def close(self, result: dict | None) -> None:
        with self._failure_as_warning():
            if self._logger is not None:
                self._logger.close(result)

    @contextlib.contextmanager
    def _failure_as_warning(self):
        try:
            yield
        except (UserError, PreemptedError):
            raise
        except Exception as error:
            self._logger = None
            logging.warning(
                "%s failed (%s: %s) and gets no more lines; the run goes on, and metrics.jsonl "
                "has them all",
                self._name,
                type(error).__name__,
                _one_line(error),
            )


class _Wandb:
    """Logs to a run in Weights & Biases that has our run's id, so that a resumed run goes on in it.

    The server knows which steps it has, and gets only those after them. So each step is there once,
    also those that are logged again after a kill. Offline (WANDB_MODE=offline) there is no server
    to ask, and a kill loses the last lines of wandb's file. So every start of the run leaves a
    folder of its own in RUN/wandb with all lines from step 1 on. The newest is the one to
    `wandb sync`.
    """

    def __init__(self, log: Log, config: Config, path: AnyPath | None, earlier: Callable):
        import wandb

        local = path is not None and not paths.is_remote(path)
        *entity, project = log.project.split("/")
        settings = wandb.Settings(
            console="off", finish_timeout=_FINISH_SECONDS, quiet=log.group is not None
        )
        try:
            self._run = wandb.init(
                project=project,
                entity=entity[0] if entity else None,
                id=run_id(config),
                name=log.names.get(run_id(config), path and path.absolute().name),
                group=log.group,
                config=configs.to_dict(config),
                dir=str(path) if local else None,
                resume="allow",
                reinit="create_new",  # a sweep has many runs in one process
                settings=settings,
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise UserError(
                f"log=wandb:{log.project}: {_one_line(error)} (log in with `wandb login`, or set "
                "WANDB_MODE=offline to send the run later)"
            ) from error
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._next = self._run.step  # the first step that the server does not have
        if self._next:
            logging.info("wandb has run %s up to step %d", self._run.id, self._next - 1)
        for line in earlier():
            self(line)

    def __call__(self, line: dict) -> None:
        if line["step"] >= self._next:
            self._run.log(_without_nulls(line), step=line["step"])

    def close(self, result: dict | None) -> None:
        if result is not None:
            self._run.summary.update(_without_nulls(result))
        self._run.finish(exit_code=0 if result is not None else 1)


class _TensorBoard:
    """Logs to event files in RUN/tensorboard.

    Every start of the run adds a file. Readers forget what earlier files have beyond the step that
    the run went on from.
    """

    def __init__(self, folder: pathlib.Path, step: int, earlier: Callable):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        is_new = not any(folder.glob("events.out.tfevents.*"))
        self._writer = EventFileWriter(str(folder))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        first = 0 if is_new else step + 1
        self._writer.add_event(
            event_pb2.Event(wall_time=time.time(), step=first, session_log=start)
        )
        if is_new:
            for line in earlier():
                self(line)

    def __call__(self, line: dict) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in _without_nulls(line).items()
            if name != "step"
        ]
        summary = self._summary(value=values)
        event = self._event(wall_time=time.time(), step=line["step"], summary=summary)
        self._writer.add_event(event)
        self._writer.flush()  # a kill must not lose lines from before a checkpoint

    def close(self, result: dict | None) -> None:
        self._writer.close()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _without_nulls(values: dict) -> dict:
    return {name: value for name, value in values.items() if value is not None}
