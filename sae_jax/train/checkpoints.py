"""Saves training states and restores them: asynchronously, atomically, onto any mesh.

In a local directory checkpoints have Orbax's format, in an object store that of
`object_checkpoints`. With each checkpoint are saved the checksums of its arrays, which are compared
when it is read, and what its SAE is. Checkpoints of earlier versions have neither, and are read
without.
"""

import contextlib
import dataclasses
import pathlib
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import jax
from orbax.checkpoint import multihost
from orbax.checkpoint import v1 as ocp

from sae_jax import sae as saes
from sae_jax.config import Config
from sae_jax.errors import UserError, on_one_line, some
from sae_jax.json_files import checked
from sae_jax.paths import AnyPath, ObjectPath
from sae_jax.place_errors import explained
from sae_jax.train.checksums import checksums
from sae_jax.train.directory import read_config
from sae_jax.train.object_checkpoints import ObjectCheckpointer, latest_besides, whole_steps
from sae_jax.train.schedule_steps import kept_step
from sae_jax.train.step import TrainState

_MEANING = ("architecture", "kind", "d_in", "d_out", "d_sae", "k")


@dataclasses.dataclass(frozen=True)
class _About:
    """What is saved with the arrays of a checkpoint.

    Attributes:
      checksums: the checksum of each array by its path; None in a checkpoint without.
      sae: the fields of the config that say what the arrays are; None in a checkpoint without.
    """

    checksums: dict[str, int] | None = None
    sae: dict[str, Any] | None = None


class Checkpoints:
    """The checkpoints of a run, in RUN/checkpoints.

    A checkpoint appears under its step only when it is whole. What a killed process left
    half-written is no checkpoint, and is removed when this is made.
    """

    def __init__(self, run: AnyPath, keep: int | None, config: Config | None = None):
        """Opens the checkpoints of a run.

        Args:
          run: the run's directory.
          keep: how many checkpoints stay, the latest. Besides them stays that of the end of the
            run's trunk, where longer runs begin. With None nothing is saved or removed.
          config: the run's config, which those that are read must agree with. None: any.
        """
        self._run, self._config = run, config
        self._directory = run / "checkpoints"
        always = None if config is None else kept_step(config)
        self._checkpointer = _checkpointer(self._directory, keep, always)

    @property
    def latest_step(self) -> int | None:
        """The step of the latest checkpoint, or None where there is none."""
        return max(self.steps, default=None)

    @property
    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, in ascending order."""
        return self._checkpointer.steps

    def save(self, state: TrainState, step: int) -> None:
        """Copies the state and returns; it is written while the next steps run.

        Raises UserError if the previous checkpoint could not be written.
        """
        tree = _as_dict(state)
        sae = None if self._config is None else _meaning(self._config)
        about = dataclasses.asdict(_About(checksums(tree), sae))
        with self._failures_named():
            self._checkpointer.save(step, tree, about)

    def finish(self) -> None:
        """Waits until the checkpoint that is being written is whole.

        Raises UserError if it could not be written.
        """
        with self._failures_named():
            self._checkpointer.wait()

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """Returns the state of the checkpoint at `step`, by default the latest.

        Its arrays get the shardings of `like` (arrays or ShapeDtypeStructs), whatever mesh they
        were saved from. Raises UserError if the checkpoint cannot be read, is damaged, or is
        of another SAE than the run's config describes.
        """
        step = self.latest_step if step is None else step
        with _damage_named(self._directory, step, self.steps):
            about = _read_about(self._checkpointer, step)
            _check_meaning(about, self._config, self._run, step)
            tree = self._checkpointer.load(step, _as_dict(like))
            _check_values(about, tree)
            return _from_dict(tree, like)

    def close(self) -> None:
        """Waits for the checkpoint that is being written, and frees what Orbax holds.

        Raises UserError if it could not be written.
        """
        with self._failures_named():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _failures_named(self):
        """Turns a failure to write into a UserError that names the last good checkpoint."""
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore's failures are ValueErrors
            full = "No space left" in str(error)
            what = "the disk is full" if full else textwrap.shorten(str(error), 200)
            then = "make room and start the run again" if full else "start the run again"
            raise UserError(
                f"could not save a checkpoint under {self._directory}: {what}; the last good one "
                f"(step {self.latest_step}) is intact; {then}"
            ) from error


def load_sae(run: AnyPath, step: int | None = None, trust_code: bool = True) -> saes.SAE:
    """Returns the SAE of a run's checkpoint, on the first local device.

    Args:
      run: the run's directory.
      step: the checkpoint's step, by default the latest.
      trust_code: whether the file of a user's own architecture that the run names may be run.

    The optimiser's state is not read. Raises UserError if there is no run, no such checkpoint, or
    if it cannot be read.
    """
    config = read_config(run, trust_code)
    with contextlib.closing(_checkpointer(run / "checkpoints", keep=None)) as checkpointer:
        steps = checkpointer.steps
        if not steps:
            raise UserError(f"{run} holds no checkpoint yet; train it first")
        step = max(steps) if step is None else step
        if step not in steps:
            raise UserError(f"{run} holds no checkpoint of step {step}, only of {steps}")
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        with _damage_named(run / "checkpoints", step, steps):
            about = _read_about(checkpointer, step)
            _check_meaning(about, config, run, step)
            saved = checkpointer.shapes(step)
            wanted = {
                name: jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
                    saved[name],
                )
                for name in ("parameters", "scale", "target_scale")
            }
            state = checkpointer.load_part(step, wanted)
            _check_values(about, state)
    scales = [
        value if value.ndim else float(value) for value in (state["scale"], state["target_scale"])
    ]
    try:
        sae = saes.architecture(config.sae)
        return sae.from_parameters(config.sae, state["parameters"], *scales)
    except UserError as error:
        raise UserError(
            f"{run}/config.json does not describe checkpoint {step} of the run: {error}"
        ) from None


def saved_steps(run: AnyPath) -> list[int]:
    """Returns the steps that a run has checkpoints of, in ascending order.

    No device is touched. Raises UserError if the directory cannot be read.
    """
    directory = run / "checkpoints"
    if isinstance(directory, ObjectPath):
        return whole_steps(directory, directory.files())
    if not directory.is_dir():
        return []
    with explained(directory):  # what is half-written has another name
        return sorted(int(folder.name) for folder in directory.iterdir() if folder.name.isdecimal())


def _meaning(config: Config) -> dict:
    return {name: getattr(config.sae, name) for name in _MEANING}


def _check_meaning(about: _About, config: Config | None, run: AnyPath, step: int) -> None:
    """Raises UserError unless a checkpoint is of the SAE that the run's config describes."""
    if config is None or about.sae is None:
        return
    described = _meaning(config)
    if wrong := [n for n, value in about.sae.items() if value != described.get(n, value)]:
        differences = [f"sae.{name} {about.sae[name]!r} -> {described[name]!r}" for name in wrong]
        raise UserError(
            f"{run}/config.json was altered since checkpoint {step} was saved "
            f"({', '.join(differences)}); put back what it said"
        )


def _read_about(checkpointer, step: int) -> _About:
    return checked(checkpointer.about(step), _About, "what was saved with the arrays")


def _check_values(about: _About, tree: dict) -> None:
    """Raises ValueError if arrays that were read are not those that were saved."""
    if about.checksums is None:
        return
    found = checksums(tree)
    if altered := [name for name, value in found.items() if about.checksums.get(name) != value]:
        raise ValueError(f"damaged: {some(altered, 3)} has not the checksum that it was saved with")


@contextlib.contextmanager
def _damage_named(directory: AnyPath, step: int, steps: list[int]):
    """Turns a failure to read a checkpoint into a UserError that names it, and the one before."""
    try:
        yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # of Orbax, damage brings out all kinds
        before = max((other for other in steps if other < step), default=None)
        what_to_do = (
            "it is the only one: train the run again, in a new --workdir"
            if before is None
            else f"delete {directory / str(step)} to go on from the one before, of step {before}"
        )
        raise UserError(
            f"checkpoint {step} under {directory} cannot be read "
            f"({textwrap.shorten(str(error), 200)}); {what_to_do}"
        ) from error


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Makes a thread of Orbax's wait for those of the other processes.

    A thread that has met an error would wait here too, in a `finally`, while the others wait
    elsewhere for what it has not written. Nobody would hear of the error for 20 minutes, so it is
    raised at once.
    """
    if error := sys.exc_info()[1]:
        raise error
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


@dataclasses.dataclass(frozen=True)
class _LatestBesides:
    """Tells Orbax which checkpoints stay: the `keep` latest and, besides, that of a step."""

    keep: int
    always: int | None

    def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = latest_besides(steps, self.keep, self.always)
        return [step in kept for step in steps]


class _OrbaxCheckpointer:
    """Does what `ObjectCheckpointer` does, in a local directory.

    Orbax gives a checkpoint that is being written a temporary name.
    """

    def __init__(self, directory: pathlib.Path, keep: int | None, always: int | None):
        context = ocp.Context()
        waiting = dataclasses.replace(context.asynchronous.v0(), barrier_sync_fn=_barrier)
        context.asynchronous.v0 = lambda: waiting  # version 1 has no option for it
        policies = {}
        if keep is not None:
            policies = {
                "preservation_policy": _LatestBesides(keep, always),
                "save_decision_policy": ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                "cleanup_tmp_directories": True,
            }
        directory, self._saving = directory.absolute(), None
        try:
            self._checkpointer = ocp.training.Checkpointer(directory, context=context, **policies)
        except (ValueError, RecursionError) as error:  # it looks into all checkpoints
            damaged = next((f for f in directory.iterdir() if not _has_metadata(f)), directory)
            raise UserError(
                f"{damaged} cannot be read: what was saved beside its arrays is damaged "
                f"({on_one_line(error)}); delete it to go on without it"
            ) from error

    def save(self, step: int, tree: dict, about: dict) -> None:
        self.wait()
        self._saving = self._checkpointer.save_async(step, tree, custom_metadata=about)

    def wait(self) -> None:
        saving, self._saving = self._saving, None
        try:
            self._checkpointer.wait()
        finally:
            if saving is not None:
                saving.result()  # else each save leaves a thread and its files behind, for good

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    @property
    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def about(self, step: int) -> dict:
        found = self._checkpointer.metadata(step)
        if found.init_timestamp_nsecs is None:  # Orbax logs that it cannot read it, and goes on
            raise ValueError("damaged: what was saved with the arrays is no valid JSON")
        return found.custom_metadata or {}

    def shapes(self, step: int) -> dict:
        shapes = self._checkpointer.metadata(step).metadata
        if shapes is None:  # the same
            raise ValueError("damaged: what describes its arrays is not what was written")
        return shapes

    def load(self, step: int, like: dict) -> dict:
        return self._checkpointer.load(step, abstract_state=like)

    def load_part(self, step: int, like: dict) -> dict:
        rest = jax.tree.map(lambda _: ocp.PLACEHOLDER, self.shapes(step))
        loaded = self.load(step, rest | like)
        return {name: loaded[name] for name in like}


def _has_metadata(folder: pathlib.Path) -> bool:
    """Whether Orbax can read what it saved beside the arrays of a checkpoint."""
    try:
        ocp.metadata(folder)
    except Exception:  # of Orbax, damage brings out all kinds
        return False
    return True


def _checkpointer(
    directory: AnyPath, keep: int | None, always: int | None = None
) -> ObjectCheckpointer | _OrbaxCheckpointer:
    """Returns the checkpointer of a directory.

    It keeps the `keep` latest checkpoints and, besides, that of the step `always`. With keep=None
    it only reads, and removes nothing.
    """
    kind = ObjectCheckpointer if isinstance(directory, ObjectPath) else _OrbaxCheckpointer
    return kind(directory, keep, always)


def _as_dict(state: TrainState) -> dict:
    """Returns the state as nested dicts, so that a checkpoint's keys read parameters/w_enc."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    moments = jax.tree_util.tree_leaves_with_path(state.optimizer)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in moments]
    return fields | {"optimizer": dict(zip(names, (leaf for _, leaf in moments), strict=True))}


def _from_dict(values: dict, like: TrainState) -> TrainState:
    """Returns the state that `_as_dict` made `values` of; its tree is that of `like`."""
    names = _as_dict(like)["optimizer"]  # in the order of the leaves
    leaves = [values["optimizer"][name] for name in names]
    optimizer = jax.tree.unflatten(jax.tree.structure(like.optimizer), leaves)
    return TrainState(**(values | {"optimizer": optimizer}))
