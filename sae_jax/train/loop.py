"""The loop over steps. It trains packs of runs on the same batches, and can go on at every step.

A single run is a pack of one. Several packs share one reading of the data (a sweep's pass), and a
pack may branch off from the states of another, its trunk.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.progress_bar import TrainingBar
from sae_jax.train import preparation, resample
from sae_jax.train.mesh import BatchPlacement, make_mesh
from sae_jax.train.pack import PackTrainer, SingleTrainer, States
from sae_jax.train.preemption import PreemptedError, Preemption, StoppedWaiting
from sae_jax.train.progress import Progress
from sae_jax.train.recorder import Recorder
from sae_jax.train.results import make_result
from sae_jax.train.schedule_steps import kept_step
from sae_jax.train.step import TrainState

_EVAL_ROWS = 65_536


class TrainingData:
    """What packs read: batches from a stream, held-out rows, and the mesh to place them on."""

    def __init__(self, config: Config, stream, heldout, mesh: jax.sharding.Mesh):
        """Takes what `open` opens. `heldout` is None where nothing is held out."""
        self.stream, self.heldout, self.mesh = stream, heldout, mesh
        self.store = config.data.store
        self.placement = BatchPlacement(mesh, config.data.batch_size)
        self._b_dec: dict[tuple, np.ndarray] = {}
        self._columns: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def open(cls, config: Config, open_stream: Callable) -> "TrainingData":
        """Opens the data of a resolved config.

        `open_stream(data, split="train", batch_size=None)` returns a stream of the config's data
        section. Raises UserError for a mesh or a held-out part that does not fit.
        """
        mesh = make_mesh(config)
        heldout = preparation.heldout_stream(config, mesh, open_stream)
        return cls(config, open_stream(config.data), heldout, mesh)

    def batches(self, step: int):
        """Returns an iterator over the batches from that of step `step` on.

        Each is a global array (B, width) on the devices of the mesh.
        """
        return map(self.placement.place, self.stream.batches(step, self.placement.rows))

    def take_from(self, other: "TrainingData") -> None:
        """Makes `own` take the rows from batches of other data, with these sites among its own."""
        names, widths = other.stream.site_names, other.stream.site_widths
        if names == self.stream.site_names:
            return
        stops = dict(zip(names, itertools.accumulate(widths), strict=True))
        own = zip(self.stream.site_names, self.stream.site_widths, strict=True)
        self._columns = tuple((stops[name] - width, stops[name]) for name, width in own)

    def own(self, batch: jax.Array) -> jax.Array:
        """Returns these data's rows (B, width) of a batch of the data that they are taken from.

        They are what a batch of their own stream would be, bit for bit.
        """
        if self._columns is None:
            return batch
        return _take_columns(batch, self._columns, self.stream.sites.dtype)

    def initial_b_dec(self, config: Config) -> np.ndarray:
        """Returns the b_dec (d_out,) that a run begins with, in the units of the data.

        It is computed once for all runs that ask for the same.
        """
        kind = (config.sae.b_dec_init, config.sae.d_out)
        if kind not in self._b_dec:
            self._b_dec[kind] = preparation.initial_b_dec(config, self.stream)
        return self._b_dec[kind]

    def heldout_means(self, evaluate: Callable[[jax.Array], dict[str, jax.Array]]) -> dict:
        """Returns eval_loss, eval_fvu, eval_l0, eval_dead_fraction and eval_rows, by name.

        They are over up to 65,536 held-out rows, whose number is the last; eval_dead_fraction is
        the part of the latents that fire on none of them. `evaluate` returns the other means and
        `fired` for a batch, as `Trainer.heldout_means` does. Where it returns arrays with a value
        for each run, the means become lists. All are None where nothing is held out.
        Raises UserError if they are NaN because the store is damaged.
        """
        names = ("eval_loss", "eval_fvu", "eval_l0")
        if self.heldout is None:
            return dict.fromkeys((*names, "eval_dead_fraction", "eval_rows"))
        batch = self.heldout.batch_size
        placement = BatchPlacement(self.mesh, batch)
        count = max(1, min(self.heldout.steps_per_epoch, _EVAL_ROWS // batch))
        batches = map(placement.place, self.heldout.batches(0, placement.rows))
        batch_means, fired = [], np.zeros((), bool)
        for _ in range(count):
            means = jax.device_get(evaluate(next(batches)))
            fired = fired | means.pop("fired")
            batch_means.append(means)
        means = {n: np.mean([np.float64(m[n]) for m in batch_means], axis=0) for n in names}
        dead = means["eval_dead_fraction"] = 1 - np.mean(fired, axis=-1)
        means["eval_rows"] = np.full(dead.shape, count * batch)
        if not all(np.isfinite(value).all() for value in means.values()):
            for step in range(count):
                self.heldout.check_step(step)
        return {name: value.tolist() for name, value in means.items()}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _take_columns(batch: jax.Array, columns: tuple[tuple[int, int], ...], dtype) -> jax.Array:
    """Returns some columns, given by where they start and stop, in a dtype that holds them exactly.

    Sites of several dtypes are read as float32.
    """
    return jnp.concatenate([batch[:, slice(*c)].astype(dtype) for c in columns], axis=1)


class PackInTraining:
    """The runs of a pack while they are trained: their states and their recorders.

    A pack may be a branch: it then begins with the states that another pack, its trunk, has after
    `start` steps.

    Attributes:
      recorders: one for each run.
      step: how many steps the states have done.
      steps: the steps of a whole run.
      until: the step that the pack has to come to.
      trunk: the pack that this one branches off from, or None.
      start: the step at which it branches off.
      waiting_for_trunk: whether the trunk has not come so far.
    """

    def __init__(
        self,
        trainer: PackTrainer | SingleTrainer,
        recorders: Sequence[Recorder],
        data: TrainingData,
        progress: Progress,
        *,
        trunk: "PackInTraining | None" = None,
        start: int = 0,
        parents: Sequence[int] = (),
        begin_with: Callable[[TrainState], TrainState] | None = None,
        check: Callable[[], None] = lambda: None,
        run_ended: Callable[[], None] = lambda: None,
    ):
        """Prepares to train; `begin` or `branch_from_trunk` makes the states.

        Args:
          trainer: what updates the states.
          recorders: one for each run.
          data: what the runs read.
          progress: what a watchdog reads.
          trunk: the pack to branch off from, if any.
          start: the step at which to branch off.
          parents: for each run of a branch, the number of its parent among the trunk's runs.
          begin_with: changes the fresh state of a single run that begins at step 0.
          check: is called before anything but a metric is written, and may raise.
          run_ended: is called when a run has ended.
        """
        self.steps = trainer.steps
        self.trunk, self.start = trunk, start
        self.step, self.until, self.waiting_for_trunk = 0, 0, False
        self.recorders = recorders
        self._trainer, self._data, self._progress = trainer, data, progress
        self._parents, self._begin_with = parents, begin_with
        self._check, self._run_ended = check, run_ended
        self._config = recorders[0].config  # what does not differ between the runs
        self._resampling = resample.steps(self._config)
        self._kept_step = kept_step(self._config)
        self._states: TrainState | States | None = None
        # The step that was dispatched and not yet waited for: (step, metrics, whether to log them).
        self._pending = None
        self._logged = None  # (step, time) of the last logged metrics
        self._saving: int | None = None  # the step whose checkpoint may still be being written
        self._checked_steps: set[int] = set()  # whose data are not what made them non-finite
        self._began = time.monotonic()

    @property
    def open_recorders(self) -> list[Recorder]:
        """The recorders of the runs that are still to be trained."""
        return [recorder for recorder in self.recorders if recorder.open]

    def newest_common_step(self, most: int | None = None) -> int | None:
        """Returns the newest step, up to `most`, that all runs to train have a checkpoint of.

        Returns None where there is no such step.
        """
        runs = self.open_recorders or [run for run in self.recorders if not run.failed]
        common = set.intersection(*(set(run.checkpoint_steps) for run in runs)) if runs else set()
        return max((step for step in common if most is None or step <= most), default=None)

    def begin(self, most: int | None = None) -> None:
        """Restores the newest common checkpoint up to `most`, or makes fresh states."""
        step = self.newest_common_step(most)
        self._saving = self._progress.saved = step
        if step is None:
            scale, target_scale, _ = preparation.normalisation(self._config, self._data.stream)
            b_dec = self._data.initial_b_dec(self._config)
            self._states = self._trainer.init(b_dec, scale, target_scale)
            if self._begin_with is not None:
                self._states = self._begin_with(self._states)
            step = 0
        else:
            self._states = self._trainer.blank()
            for i, recorder in enumerate(self.recorders):
                if step in recorder.checkpoint_steps:
                    state = recorder.restore(self._trainer.trainers[i].abstract(), step)
                    self._states = self._trainer.put_run(self._states, i, state)
        self._start_at(step)

    def branch_from_trunk(self) -> None:
        """Takes over the trunk's states and metrics, and saves them.

        From here on this pack does not need the trunk any more.
        """
        trunk = self.trunk
        trunk.await_step()
        self._states = self._trainer.blank()
        for i, (recorder, parent) in enumerate(zip(self.recorders, self._parents, strict=True)):
            # A copy: the trunk and other branches go on from its own.
            state = jax.tree.map(jnp.copy, trunk.get_run(parent))
            self._states = self._trainer.put_run(self._states, i, state)
            recorder.copy_metrics(trunk.recorders[parent], trunk.step)
            bad_step = int(state.nonfinite_step)
            if bad_step >= 0 and recorder.open and self._config.train.on_nonfinite == "stop":
                recorder.fail(bad_step)
                self._run_ended()
        self._start_at(trunk.step)
        self.waiting_for_trunk = False
        self._save()
        self.finish_saving()

    def get_run(self, i: int) -> TrainState:
        """Returns the state of run `i`, without a run axis."""
        return self._trainer.get_run(self._states, i)

    def advance(self, rows: jax.Array) -> None:
        """Dispatches a step on a batch (B, width), then waits for the step before.

        The batch is of the data that the pack's are taken from, with all their sites.

        So the device never idles, and never holds more than two batches.
        """
        if self._logged is None:
            self._progress.rest()  # it compiles
        self._states, metrics = self._trainer.step(self._states, self._data.own(rows))
        self.step += 1
        if self.step in self._resampling:
            self._resample()
        self.await_step()
        log = self.step % self._config.train.log_every == 0
        self._pending = (self.step, metrics, log)

    def maybe_save(self, stop: bool) -> None:
        """Saves a checkpoint of every run if one is due after this step, or if `stop` is true.

        One is due, besides, where the learning rate begins to fall: longer runs begin with it.
        """
        every = self._config.train.checkpoint_every
        due = bool(self.step) and (stop or self.step == self.steps or self.step % every == 0)
        if due or self.step and self.step == self._kept_step:
            if self._pending is not None:
                step, metrics, log = self._pending
                self._pending = (step, metrics, log or due)
            self.await_step(check=True)  # ends the runs whose loss is not finite, unsaved
            self._save()

    def await_step(self, check: bool = False) -> None:
        """Waits for the step that was dispatched last, and logs it if it is one to log.

        With `check` it ends runs whose loss was not finite, whether it is one to log or not.
        """
        if self._pending is None:
            return
        step, metrics, log = self._pending
        self._pending = None
        jax.block_until_ready(metrics)
        self._progress.end(step)
        now = time.monotonic()
        if self._logged is None:  # the first step compiled; the rate is of the others
            self._logged = (step, now)
        if not (log or check):
            return
        values = {name: np.reshape(v, -1) for name, v in jax.device_get(metrics).items()}
        self._check_data(values["nonfinite_step"])
        last_step, last_time = self._logged
        rate = (step - last_step) / max(now - last_time, 1e-9) if step > last_step else None
        if log:
            self._logged = (step, now)
        for i, recorder in enumerate(self.recorders):
            if not recorder.open or not (log or values["nonfinite_step"][i] >= 0):
                continue
            if values["nonfinite_step"][i] >= 0:
                self._confirm()
            recorder.log(step, {name: v[i].item() for name, v in values.items()}, rate)
            if not recorder.open:
                self._run_ended()

    def _check_data(self, nonfinite_steps: np.ndarray) -> None:
        """Raises UserError if a step's loss was not finite because the store is damaged there."""
        for step in set(nonfinite_steps.tolist()) - self._checked_steps - {-1}:
            self._data.stream.check_step(step)
            self._checked_steps.add(step)

    def finish_saving(self) -> None:
        """Waits until the last checkpoints are written."""
        with self._progress.waits_for(f"the checkpoint of step {self._saving} to be written"):
            for recorder in self.open_recorders:
                recorder.finish_saving()
        self._progress.saved = self._saving

    def end(self) -> None:
        """Evaluates all runs on held-out rows and writes their results."""
        self._progress.rest()
        self.finish_saving()
        means = self._data.heldout_means(lambda rows: self._trainer.evaluate(self._states, rows))
        seconds = time.monotonic() - self._began
        for i, recorder in enumerate(self.recorders):
            if recorder.open:
                own = {n: v and np.reshape(v, -1)[i].item() for n, v in means.items()}
                state = self.get_run(i)
                result = make_result(self._trainer.trainers[i], state, own, seconds)
                self._confirm()
                with self._progress.waits_for("results to be written", can_be_left=True):
                    recorder.end(result, state)
                    self._run_ended()
        self._states = None

    def close(self) -> None:
        """Closes all recorders."""
        with self._progress.waits_for("what is written to end", can_be_left=True):
            for recorder in self.recorders:
                recorder.close()

    def _confirm(self) -> None:
        """Raises an error where the work is not this process's any more."""
        with self._progress.waits_for("word that nobody has taken over", can_be_left=True):
            self._check()

    def _start_at(self, step: int) -> None:
        self.step = step
        for recorder in self.open_recorders:
            recorder.start(step)

    def _save(self) -> None:
        self._progress.rest()
        self._confirm()
        with self._progress.waits_for(f"the checkpoints up to step {self.step} to be written"):
            for i, recorder in enumerate(self.recorders):
                if recorder.open and self.step not in recorder.checkpoint_steps:
                    recorder.save(self.get_run(i), self.step)
        self._progress.saved, self._saving = self._saving, self.step  # the one before is written

    def _resample(self) -> None:
        self._progress.rest()
        for i, trainer in enumerate(self._trainer.trainers):
            state = resample.resample(
                trainer, self.get_run(i), self.step, self._data.stream, self._data.placement
            )
            self._states = self._trainer.put_run(self._states, i, state)


def train_packs(
    packs: Sequence[PackInTraining], data: TrainingData, name: str, progress: Progress
) -> None:
    """Trains packs from where they were until every run has ended.

    Args:
      packs: trunks before their branches.
      data: what is read for all of them, which the data of each pack are, or are taken from.
      name: what a progress bar calls the work.
      progress: what a watchdog reads.

    Raises PreemptedError after SIGTERM, when all runs are saved at one step, and UserError if the
    data end before the runs do.
    """
    _restore(packs)
    active = [pack for pack in packs if pack.until]
    for pack in active:
        if pack.step == pack.steps:  # the last checkpoint was there, but not the results
            pack.end()
    if all(pack.step >= pack.until for pack in active):
        return
    first = min(pack.step for pack in active if not pack.waiting_for_trunk)
    last = max(pack.until for pack in active)
    batches = data.batches(first)
    with Preemption() as preemption, TrainingBar(name, first, last) as bar:
        for step in range(first, last):
            rows = None
            batch = f"the batch of step {step + 1}, from {data.store}"
            with contextlib.suppress(StoppedWaiting), preemption.interruptible():
                with progress.waits_for(batch, can_be_left=True):
                    rows = _next_batch(batches, step)
            if rows is None:
                _stop([p for p in active if not p.waiting_for_trunk and p.step == step < p.until])
                raise PreemptedError(step)
            for branch in active:
                if branch.waiting_for_trunk and branch.start == step:
                    branch.branch_from_trunk()
            # Packs that are ahead wait until the batches have come to their step.
            moving = [p for p in active if not p.waiting_for_trunk and p.step == step < p.until]
            progress.begin(step + 1)
            for pack in moving:
                pack.advance(rows)
            stop = preemption.reached(step + 1)
            for pack in moving:
                pack.maybe_save(stop)
            bar.advance(1, _last_line(packs))
            if stop:
                _stop(moving)
                raise PreemptedError(step + 1)
            for pack in moving:
                if pack.step == pack.steps:
                    pack.end()


def _stop(packs: Sequence[PackInTraining]) -> None:
    """Saves packs, all at one step, unless no step was done since they were read or made."""
    try:
        for pack in packs:
            pack.maybe_save(True)
        for pack in packs:
            pack.finish_saving()
    except UserError as error:  # a run is to be started again, whether this could be saved or not
        if jax.process_count() > 1:  # the others wait for this one's part, and must hear of it
            raise
        logging.warning("%s", error)
        raise PreemptedError(0) from error


def _restore(packs: Sequence[PackInTraining]) -> None:
    """Brings every pack to where it was.

    A branch that had not begun waits for its trunk, which may have to go back to an earlier
    checkpoint for it.
    """
    resume_steps = [pack.newest_common_step() for pack in packs]
    for pack, resume_step in zip(packs, resume_steps, strict=True):
        pack.waiting_for_trunk = bool(
            pack.open_recorders and pack.trunk is not None and resume_step is None
        )
    for pack in packs:
        starts = [p.start for p in packs if p.waiting_for_trunk and p.trunk is pack]
        pack.until = pack.steps if pack.open_recorders else max(starts, default=0)
        if pack.until and not pack.waiting_for_trunk:
            pack.begin(most=min(starts, default=None))


def _last_line(packs: Sequence[PackInTraining]) -> dict | None:
    """Returns the last line of metrics where there is one run, for a progress bar to show."""
    recorders = [recorder for pack in packs for recorder in pack.recorders]
    if len(recorders) > 1:
        return None
    return recorders[0].last_line


def _next_batch(batches, step: int) -> jax.Array:
    try:
        return next(batches)
    except StopIteration:
        raise UserError(
            f"the data ended after {step} batches, before the run did; give more rows, or lower "
            "tokens"
        ) from None
