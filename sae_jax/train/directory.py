"""A run's directory: its config, its metrics, its result. One writer, process 0."""

import contextlib
import importlib.metadata
import json
import pathlib
import subprocess

import jax
from jax.experimental import multihost_utils

from sae_jax import config as configs
from sae_jax.config import Config, UserError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")


class RunDirectory:
    """`path`, made new for `config`, or the one of an interrupted run of the same config."""

    def __init__(self, path: pathlib.Path, config: Config):
        self.path = path
        self._metrics = path / "metrics.jsonl"
        self._file = None
        new = not (path / "config.json").exists()
        if not new:
            _check_same(path, config)
        elif path.exists() and not path.is_dir():
            raise UserError(f"--workdir {path} is a file; give a new or empty directory")
        elif path.exists() and {entry.name for entry in path.iterdir()} - {"config.json.tmp"}:
            raise UserError(
                f"{path} is not empty and holds no run (no config.json); give --workdir a new or "
                "empty directory"
            )
        # No process may find what the writer is about to make, and take it for another's.
        multihost_utils.sync_global_devices(f"looked at {path}")
        if new and is_writer():
            path.mkdir(parents=True, exist_ok=True)
            configs.save_json(
                configs.to_dict(config) | {"environment": environment()}, path / "config.json"
            )

    @property
    def result(self) -> dict | None:
        """The result of a run that has ended."""
        file = self.path / "result.json"
        return json.loads(file.read_text()) if file.exists() else None

    @property
    def failure(self) -> dict | None:
        """Why a run of a sweep was given up."""
        file = self.path / "failed.json"
        return json.loads(file.read_text()) if file.exists() else None

    def save_failure(self, failure: dict) -> None:
        if is_writer():
            configs.save_json(failure, self.path / "failed.json")

    def copy_metrics(self, other: "RunDirectory", step: int) -> None:
        """Makes another run's metrics up to `step` this one's."""
        if is_writer():
            _write(self._metrics, _lines_until(other._metrics, step))

    def save_result(self, result: dict) -> None:
        if is_writer():
            configs.save_json(result, self.path / "result.json")

    def start_metrics(self, step: int) -> None:
        """Opens metrics.jsonl to go on after `step`: what was logged beyond the checkpoint
        that the run restarts from will be logged again."""
        if not is_writer():
            return
        if self._metrics.exists():
            _write(self._metrics, _lines_until(self._metrics, step))
        self._file = self._metrics.open("a")

    def log(self, metrics: dict) -> None:
        if not self._file:
            return
        try:
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"could not write {self._metrics}: {error.strerror}; the last checkpoint is "
                "intact; make room and start the run again"
            ) from error

    def close(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # a line that `log` could not write either
                self._file.close()


def read_config(path: pathlib.Path) -> Config:
    """The config of the run at `path`."""
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} is not a run: it has no config.json")
    try:
        values = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is damaged: {error}") from error
    values.pop("environment", None)
    return configs.from_dict(values)


def _lines_until(metrics: pathlib.Path, step: int) -> str:
    kept = []
    for line in metrics.read_text().splitlines(keepends=True):
        with contextlib.suppress(json.JSONDecodeError):  # the last line, cut by a kill
            if json.loads(line)["step"] <= step:
                kept.append(line)
    return "".join(kept)


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def is_writer() -> bool:
    return jax.process_index() == 0


def _check_same(path: pathlib.Path, config: Config) -> None:
    there = read_config(path)
    changed = configs.difference(configs.identity(there), configs.identity(config))
    if changed:
        raise UserError(
            f"{path} holds a run of another config ({'; '.join(changed)}); use another --workdir, "
            "or the same config to resume it"
        )


def environment() -> dict:
    """Versions of the packages, and the git revision if there is one."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return versions | {"git_revision": _git_revision()}


def _git_revision() -> str | None:
    """Of the checkout that the package runs from, if it is one."""
    here = pathlib.Path(__file__).parent
    git = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None
