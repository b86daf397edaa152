"""A run's directory: its config, its metrics, its result. Process 0 alone writes to it."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import socket
import subprocess

import jax
from jax.experimental import multihost_utils

from sae_jax import config as configs
from sae_jax import paths
from sae_jax.activations import is_world
from sae_jax.config import Config, DataConfig
from sae_jax.errors import UserError
from sae_jax.json_files import read_json
from sae_jax.paths import AnyPath, ObjectPath
from sae_jax.train import agreement, metrics

_PACKAGES = """sae-jax jax jaxlib flax optax orbax-checkpoint grain tensorstore numpy""".split()


class RunDirectory:
    """The directory of a run.

    RUN/config.json     the resolved config, and the versions of the packages
    RUN/metrics.jsonl   a line for each logged step
    RUN/result.json     what the run came to, once it has ended
    RUN/failed.json     why a run of a sweep was given up
    """

    def __init__(self, path: AnyPath, config: Config, check_shared: bool = True):
        """Makes the directory, or finds the interrupted run of the same config in it.

        All processes call it. Two programs may call it at one instant: one of them makes the
        directory, and the other finds it.

        Args:
          path: the directory.
          config: the resolved config.
          check_shared: whether to check that all processes see what process 0 writes there.

        Raises UserError if the directory holds something else, or is not shared by all processes.
        """
        self.path = path
        self._metrics_path = path / "metrics.jsonl"
        self._metrics = None
        names = _names_in(path)
        new = "config.json" not in names
        if not new:
            _check_same(path, config)
        elif {name for name in names if not _is_temporary(name)}:
            raise UserError(
                f"{path} is not empty and holds no run (no config.json); give --workdir a new or "
                "empty directory"
            )
        # No process may find what the writer is about to make, and take it for another's.
        multihost_utils.sync_global_devices("looked at the run's directory")
        if new and is_writer():
            path.mkdir(parents=True, exist_ok=True)
            noted = environment() | {"directory": os.getcwd()}
            values = configs.to_dict(config) | {"environment": noted}
            by = f".{socket.gethostname()}.{os.getpid()}"
            if not paths.create(path / "config.json", paths.as_json(values), by):
                _check_same(path, config)  # another program was faster
        if check_shared:
            agreement.check_shared(path)

    @property
    def result(self) -> dict | None:
        """The content of result.json, or None where the run has not ended."""
        file = self.path / "result.json"
        return json.loads(file.read_text()) if file.exists() else None

    @property
    def failure(self) -> dict | None:
        """The content of failed.json, or None where the run was not given up."""
        file = self.path / "failed.json"
        return json.loads(file.read_text()) if file.exists() else None

    def save_failure(self, failure: dict) -> None:
        """Writes failed.json."""
        if is_writer():
            paths.save_json(failure, self.path / "failed.json")

    def copy_metrics(self, other: "RunDirectory", step: int) -> None:
        """Copies the metrics of another run up to `step`, as the first of this one's."""
        if is_writer():
            paths.write(self._metrics_path, metrics.lines_until(other._metrics_path, step))

    def read_metrics(self) -> list[dict]:
        """Returns the lines of metrics.jsonl, oldest first."""
        if not self._metrics_path.exists():
            return []
        return [json.loads(line) for line in self._metrics_path.read_text().splitlines()]

    def save_result(self, result: dict) -> None:
        """Writes result.json, when all metrics are written."""
        if is_writer():
            self.flush()
            paths.save_json(result, self.path / "result.json")

    def start_metrics(self, step: int) -> None:
        """Opens metrics.jsonl to go on after `step`.

        Lines of later steps are removed: a run that restarts from a checkpoint will log them again.
        """
        if is_writer():
            self._metrics = metrics.open_after(self._metrics_path, step)

    def lines_until(self, step: int) -> list[dict]:
        """Returns the lines of metrics.jsonl up to `step`."""
        if not self._metrics_path.is_file():
            return []
        lines = metrics.lines_until(self._metrics_path, step).splitlines()
        return [json.loads(line) for line in lines]

    def log(self, line: dict) -> None:
        """Adds a line to metrics.jsonl. Raises UserError if it cannot be written."""
        if self._metrics:
            self._metrics.add(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Waits until all that was logged is written.

        It is called before a checkpoint is saved, because a run that goes on from the checkpoint
        does not log again what was before it.
        """
        if self._metrics:
            self._metrics.flush()

    def close(self) -> None:
        """Closes metrics.jsonl."""
        if self._metrics:
            self._metrics.close()


def read_config(path: AnyPath, trust_code: bool = True) -> Config:
    """Returns the config of the run at `path`.

    With trust_code=False the file that defines a user's own architecture, where the run names one,
    is not run. It is never run where it lies in the run's directory. Raises UserError if there is
    no run, or its config cannot be read.
    """
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} is not a run: it has no config.json")
    values = read_json(file)
    values.pop("environment", None)
    try:
        return configs.from_dict(values, folder=path, trust_code=trust_code)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def find_store(run: AnyPath, data: DataConfig) -> DataConfig:
    """Returns the data section of the run at `run`, with a path of its store that holds from here.

    A relative path is of the directory that the run was started in, which config.json notes. Where
    there is none, or the store has moved with its run, it is looked for from here and beside the
    run, too.
    """
    if not data.store or is_world(data.store) or paths.is_remote(data.store):
        return data
    noted = read_json(run / "config.json", default={}).get("environment")
    noted = noted.get("directory") if isinstance(noted, dict) else None
    above = [] if isinstance(run, ObjectPath) else list(run.absolute().parents)
    for place in [*([noted] if isinstance(noted, str) else []), os.curdir, *above]:
        found = paths.local(place) / paths.local(data.store)
        if (found / "meta.json").is_file():
            here = found.absolute() == paths.local(data.store).absolute()
            return data if here else dataclasses.replace(data, store=str(found))
    return data


def is_writer() -> bool:
    """Whether this process is the one that writes, process 0."""
    return jax.process_index() == 0


def _names_in(path: AnyPath) -> set[str]:
    """Returns the names in a directory, none if it does not exist."""
    if not path.exists():
        return set()
    if not path.is_dir():
        raise UserError(f"--workdir {path} is a file; give a new or empty directory")
    return {entry.name for entry in path.iterdir()}


def _is_temporary(name: str) -> bool:
    """Whether a file is what a killed process, or one that is about to make a run, has left."""
    return name.startswith("config.json.") and name.endswith(".tmp")


def _check_same(path: AnyPath, config: Config) -> None:
    found = read_config(path)
    changed = configs.difference(configs.identity(found), configs.identity(config))
    if changed:
        raise UserError(
            f"{path} holds a run of another config ({'; '.join(changed)}); use another --workdir, "
            "or the same config to resume it"
        )


def environment() -> dict:
    """Returns the versions of the packages by name, and `git_revision`, None if there is none."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return versions | {"git_revision": _git_revision()}


def _git_revision() -> str | None:
    """Returns the revision of the checkout that the package runs from, or None if there is none.

    An installed package may lie inside a repository of the user's, whose revision says nothing.
    """
    here = pathlib.Path(__file__).parent
    git = ["git", "-C", str(here), "rev-parse", "HEAD", "--show-prefix"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    revision, _, prefix = done.stdout.partition("\n")
    return revision if prefix.strip() == "sae_jax/train/" else None
