"""A run's directory: its config, its metrics, its result. Process 0 alone writes to it."""

import dataclasses
import importlib.metadata
import os
import pathlib
import subprocess
from collections.abc import Sequence

import jax
from jax.experimental import multihost_utils

from sae_jax import config as configs
from sae_jax import paths
from sae_jax.activations import is_world
from sae_jax.config import Config, DataConfig
from sae_jax.errors import UserError
from sae_jax.json_files import checked, read_json
from sae_jax.paths import AnyPath, ObjectPath
from sae_jax.train import agreement, metrics

_PACKAGES = """sae-jax jax jaxlib flax optax orbax-checkpoint grain tensorstore numpy""".split()
_FINGERPRINT, _DIRECTORY, _LINEAGE = "data_fingerprint", "directory", "lineage"


class RunDirectory:
    """The directory of a run.

    RUN/config.json     the resolved config; with what it began: packages, fingerprint of the data,
                        and of a branch its lineage
    RUN/metrics.jsonl   a line for each logged step
    RUN/result.json     what the run came to, once it has ended
    RUN/failed.json     why a run of a sweep was given up

    Attributes:
      path: the directory.
      config: the run's config. Where its store has moved since it began, that of the beginning:
        where the data are is not what the run is.
    """

    def __init__(
        self,
        path: AnyPath,
        config: Config,
        data_fingerprint: str | None = None,
        check_shared: bool = True,
        lineage: Sequence[dict] = (),
    ):
        """Makes the directory, or finds the interrupted run of the same config in it.

        All processes call it. Two programs may call it at one instant: one of them makes the
        directory, and the other finds it.

        Args:
          path: the directory.
          config: the resolved config.
          data_fingerprint: that of the stream; None where it is not known.
          check_shared: whether to check that all processes see what process 0 writes there.
          lineage: of a branch, what `branch.Origin.lineage` says.

        Raises UserError if the directory holds something else, or a run on other data, or is not
        shared by all processes.
        """
        self.path = path
        self.config = config
        self._metrics_path = path / "metrics.jsonl"
        self._metrics = None
        names = _names_in(path)
        new = "config.json" not in names
        if not new:
            self.config = _check_same(path, config, data_fingerprint)
        elif {name for name in names if not _is_temporary(name)}:
            raise UserError(
                f"{path} is not empty and holds no run (no config.json); give --workdir a new or "
                "empty directory"
            )
        # No process may find what the writer is about to make, and take it for another's.
        multihost_utils.sync_global_devices("looked at the run's directory")
        if new and is_writer():
            path.mkdir(parents=True, exist_ok=True)
            around = environment()
            around |= {_FINGERPRINT: data_fingerprint, _DIRECTORY: os.getcwd()}
            values = configs.to_dict(config) | {"environment": around}
            values |= {_LINEAGE: list(lineage)} if lineage else {}
            by = paths.this_process()
            if not paths.create(path / "config.json", paths.as_json(values), by):
                # Another program was faster.
                self.config = _check_same(path, config, data_fingerprint)
        if check_shared:
            agreement.check_shared(path)

    @property
    def result(self) -> dict | None:
        """The content of result.json, or None where the run has not ended."""
        return read_json(self.path / "result.json", default={}) or None

    @property
    def failure(self) -> dict | None:
        """The content of failed.json, or None where the run was not given up."""
        return read_json(self.path / "failed.json", default={}) or None

    def save_failure(self, failure: dict) -> None:
        """Writes failed.json."""
        if is_writer():
            paths.save_json(failure, self.path / "failed.json")

    def copy_metrics(self, other: AnyPath, step: int) -> None:
        """Copies the metrics of the run at `other` up to `step`, as the first of this one's."""
        file = other / "metrics.jsonl"
        if is_writer() and file.is_file():
            paths.write(self._metrics_path, metrics.lines_until(file, step))

    def read_metrics(self) -> list[dict]:
        """Returns the lines of metrics.jsonl, oldest first."""
        if not self._metrics_path.exists():
            return []
        return metrics.read_lines(self._metrics_path)

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
        return metrics.read_lines(self._metrics_path, step)

    def log(self, line: dict) -> None:
        """Adds a line to metrics.jsonl. Raises UserError if it cannot be written."""
        if self._metrics:
            self._metrics.add(paths.as_json(line, indent=None))

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


def refuse_sweep(path: AnyPath) -> None:
    """Raises UserError where a sweep is given in place of one of its runs."""
    if (path / "sweep.json").is_file():
        raise UserError(
            f"{path} is a sweep, of which a run is wanted, {path / 'runs'}/ID; eval, export and "
            "compare take all of it as --results"
        )


def read_config(path: AnyPath, trust_code: bool = True) -> Config:
    """Returns the config of the run at `path`.

    With trust_code=False the file that defines a user's own architecture, where the run names one,
    is not run. It is never run where it lies in the run's directory. Raises UserError if there is
    no run, or its config cannot be read.
    """
    file = path / "config.json"
    if not file.is_file():
        refuse_sweep(path)
        raise UserError(f"{path} is not a run: it has no config.json")
    values = read_json(file)
    for name in ("environment", _LINEAGE):
        values.pop(name, None)
    try:
        return configs.from_dict(values, folder=path, trust_code=trust_code)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def run_there(path: AnyPath) -> Config | None:
    """Returns the config of the run at `path`, with a path of its store that holds from here.

    It is None where there is no run. Raises UserError if its config cannot be read.
    """
    if not (path / "config.json").is_file():
        return None
    config = read_config(path)
    return dataclasses.replace(config, data=find_store(path, config.data))


@dataclasses.dataclass(frozen=True)
class Ancestor:
    """A run that another has branched off from.

    Attributes:
      run: its directory, as it was named.
      run_id: its id.
      step: the step of the checkpoint.
      tokens: the tokens up to there.
      changed: what the branch changed, a line for each field.
    """

    run: str
    run_id: str
    step: int
    tokens: int
    changed: list[str]


def read_lineage(run: AnyPath) -> list[Ancestor]:
    """Returns the runs that the one at `run` goes back to, the eldest first; [] for most.

    Raises UserError if config.json cannot be read, or says it otherwise than it must.
    """
    file = run / "config.json"
    return checked(read_json(file).get(_LINEAGE, []), list[Ancestor], f"{file}: lineage")


def data_fingerprint(run: AnyPath) -> str | None:
    """Returns the fingerprint of the data that a run began with, None where it was not noted."""
    around = read_json(run / "config.json").get("environment")
    return around.get(_FINGERPRINT) if isinstance(around, dict) else None


def find_store(run: AnyPath, data: DataConfig) -> DataConfig:
    """Returns the data section of the run at `run`, with a path of its store that holds from here.

    A relative path is of the directory that the run was started in, which config.json notes. Where
    there is none, or the store has moved with its run, it is looked for from here and beside the
    run, too.
    """
    if not data.store or is_world(data.store) or paths.is_remote(data.store):
        return data
    noted = read_json(run / "config.json", default={}).get("environment")
    noted = noted.get(_DIRECTORY) if isinstance(noted, dict) else None
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


def _check_same(path: AnyPath, config: Config, fingerprint: str | None) -> Config:
    """Returns the config that the run at `path` began with, whose store may since have moved.

    Raises UserError, which says what differs, if it is another run. A run of an earlier version,
    which has no fingerprint of its data, has a store at one place only.
    """
    found = read_config(path)
    began_with = data_fingerprint(path)
    if began_with is not None and began_with == fingerprint:
        store = found.data.store
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, store=store))
    changed = configs.difference(configs.identity(found), configs.identity(config))
    known = None not in (began_with, fingerprint)
    if known and not changed and began_with != fingerprint:
        raise UserError(
            f"{path} holds a run on other data: {config.data.store} is not the store that it began "
            "with, though it lies there; use another --workdir, or put that store back"
        )
    if changed:
        raise UserError(
            f"{path} holds a run of another config ({'; '.join(changed)}); use another --workdir, "
            "or the same config to resume it"
        )
    return config


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
