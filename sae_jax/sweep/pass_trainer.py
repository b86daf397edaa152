"""Training a pass: all its packs on the same batches, each run as if it were alone.

Every run has the directory that `sae-jax train` would have made, with its own metrics, checkpoints
and result; either can go on with a run of the other's.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence

import jax
import tqdm
from absl import logging

from sae_jax.activations import open_stream
from sae_jax.config import Config
from sae_jax.paths import AnyPath
from sae_jax.sweep.design import Pack, Pass
from sae_jax.train import loop, resample
from sae_jax.train.checkpoints import Checkpoints
from sae_jax.train.directory import RunDirectory, is_writer
from sae_jax.train.mesh import BatchPlacement, make_mesh
from sae_jax.train.pack import PackTrainer, get_run, put_run
from sae_jax.train.preemption import PreemptedError, Preemption
from sae_jax.train.progress import Progress

_KEPT = 2  # checkpoints a run, at least: a kill leaves some runs one behind the others


def train_pass(
    work: Pass,
    runs_directory: AnyPath,
    check: Callable[[], None] = lambda: None,
    run_ended: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> None:
    """Trains every run of `work` that has not ended, in runs_directory/RUN_ID, from its last
    checkpoint.

    check: called before anything but a metric is written; what it raises ends the pass. run_ended:
    called when a run's result.json, or failed.json where its loss became NaN, has been written.
    progress: is told how far the steps are.

    Raises UserError for a mistake before anything is computed; PreemptedError after SIGTERM, when
    all runs are saved."""
    config = work.packs[0].runs[0]
    stream = open_stream(config.data)
    mesh = make_mesh(config)
    for pack in work.packs:
        loop.count_steps(pack.runs[0], stream)
        make_mesh(pack.runs[0])  # raises if it does not divide the dictionary
    heldout = loop.heldout_stream(config, mesh)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        data = _Data(stream, heldout, mesh, progress or Progress())
        packs = [_Training(pack, runs_directory, data, check, run_ended) for pack in work.packs]
        for pack in packs:
            stack.enter_context(contextlib.closing(pack))
        stack.enter_context(data.progress)
        _restore(packs)
        _train(work.name, packs, data)


def _restore(packs: list["_Training"]) -> None:
    """Brings every pack to where it was. A branch that had not begun awaits its trunk, which may
    have to go back for it."""
    for pack in packs:
        pack.resume_step = pack.newest_common_step()
        pack.awaits = bool(
            pack.open_runs and pack.plan.trunk is not None and pack.resume_step is None
        )
    for place, pack in enumerate(packs):
        starts = [p.plan.start for p in packs if p.awaits and p.plan.trunk == place]
        pack.until = pack.plan.steps if pack.open_runs else max(starts, default=0)
        if pack.until and not pack.awaits:
            pack.begin(most=min(starts, default=None))


def _train(name: str, packs: list["_Training"], data: "_Data") -> None:
    """Steps all packs; those that are ahead wait until the batches have come to them."""
    active = [pack for pack in packs if pack.until]
    if not active:
        return
    for pack in active:
        if pack.step == pack.plan.steps:  # all but the results was there
            pack.end()
    first = min(pack.step for pack in active if not pack.awaits)
    last = max(pack.until for pack in active)
    done = sum(pack.plan.start if pack.awaits else pack.step for pack in active)
    batches = data.batches(first)
    with Preemption() as preemption, _Bar(name, done, sum(p.until for p in active)) as bar:
        for step in range(first, last):
            rows = next(batches)
            for branch in active:
                if branch.awaits and branch.plan.start == step:
                    branch.leave(packs[branch.plan.trunk])
            moving = [p for p in active if not p.awaits and p.step == step < p.until]
            data.progress.begin(step + 1)
            for pack in moving:
                pack.advance(rows)
            data.progress.end(step)
            stop = preemption.reached(step + 1)
            for pack in moving:
                pack.follow_up(stop)
            bar.advance(moving)
            if stop:
                for pack in moving:
                    pack.finish_saving()
                raise PreemptedError(step + 1)
            for pack in moving:
                if pack.step == pack.plan.steps:
                    pack.end()


class _Data:
    """What all packs of a pass read."""

    def __init__(self, stream, heldout, mesh: jax.sharding.Mesh, progress: Progress):
        self.stream, self.heldout, self.mesh = stream, heldout, mesh
        self.progress = progress
        self.batch_size = stream.batch_size
        self.placement = BatchPlacement(mesh, stream.batch_size)
        self._b_dec = {}

    def batches(self, step: int):
        return self.placement.place_all(self.stream.batches(step, self.placement.rows))

    def initial_b_dec(self, config: Config):
        """Read once for all packs that begin alike."""
        kind = (config.sae.b_dec_init, config.sae.d_out)
        if kind not in self._b_dec:
            self._b_dec[kind] = loop.initial_b_dec(config, self.stream)
        return self._b_dec[kind]


class _Run:
    """One run's directory."""

    def __init__(self, config: Config, path: AnyPath):
        self.config = config
        self.directory = RunDirectory(path, config)
        self.checkpoints = Checkpoints(path, max(_KEPT, config.train.keep_checkpoints))
        self.failed = self.directory.failure is not None
        self.open = not self.failed and self.directory.result is None

    def fail(self, step: int) -> None:
        self.directory.save_failure(
            {
                "step": step + 1,
                "reason": f"the loss or its gradient became NaN or infinite at step {step + 1}",
            }
        )
        self.failed, self.open = True, False
        logging.warning(
            "%s: non-finite loss at step %d; the run is given up, the others go on",
            self.directory.path,
            step + 1,
        )


class _Training:
    """A pack under way: its states, at `step`, and its runs' directories. `until`: the step that
    it has to come to; `awaits`: it is a branch whose trunk has not come to its start."""

    def __init__(
        self,
        plan: Pack,
        runs_directory: AnyPath,
        data: _Data,
        check: Callable[[], None],
        run_ended: Callable[[], None],
    ):
        self.plan, self.step, self.until, self.awaits = plan, 0, 0, False
        self.resume_step: int | None = None
        self._data, self._check, self._run_ended = data, check, run_ended
        self._runs = [_Run(run, runs_directory / loop.run_id(run)) for run in plan.runs]
        config = plan.runs[0]
        self._scales = loop.normalisation(config, data.stream)
        self._trainer = PackTrainer(plan.runs, plan.steps, self._scales[-1])
        self._resampling = resample.steps(config)
        self._states = None
        self._pending = None  # (step, its metrics, whether to log them): dispatched, not waited for
        self._logged = None  # (step, time) of the last logged metrics
        self._began = time.monotonic()

    @property
    def open_runs(self) -> list[_Run]:
        return [run for run in self._runs if run.open]

    def newest_common_step(self, most: int | None = None) -> int | None:
        """The newest step, up to `most`, that all runs to train have a checkpoint of."""
        runs = self.open_runs or [run for run in self._runs if not run.failed]
        common = set.intersection(*(set(run.checkpoints.steps) for run in runs)) if runs else set()
        return max((step for step in common if most is None or step <= most), default=None)

    def begin(self, most: int | None) -> None:
        """From the newest common checkpoint up to `most`, or afresh."""
        step = self.newest_common_step(most)
        if step is None:
            config, (scale, target_scale, _) = self.plan.runs[0], self._scales
            b_dec = self._data.initial_b_dec(config)
            self._states = self._trainer.init(b_dec, scale, target_scale)
            step = 0
        else:
            self._states = self._trainer.blank()
            for i, (run, trainer) in enumerate(
                zip(self._runs, self._trainer.trainers, strict=True)
            ):
                if step in run.checkpoints.steps:
                    state = run.checkpoints.restore(trainer.abstract(), step)
                    self._states = put_run(self._states, i, state)
        self._start_at(step)

    def leave(self, trunk: "_Training") -> None:
        """Takes over the trunk's states and metrics, and saves them: from here on this pack
        needs the trunk no more."""
        trunk.settle()
        self._states = self._trainer.blank()
        for i, (run, parent) in enumerate(zip(self._runs, self.plan.parents, strict=True)):
            state = get_run(trunk._states, parent)
            self._states = put_run(self._states, i, state)
            run.directory.copy_metrics(trunk._runs[parent].directory, trunk.step)
            bad_step = int(state.nonfinite_step)
            if bad_step >= 0 and run.open and run.config.train.on_nonfinite == "stop":
                run.fail(bad_step)
                self._run_ended()
        self._start_at(trunk.step)
        self.awaits = False
        self._save()
        self.finish_saving()

    def _start_at(self, step: int) -> None:
        self.step = step
        for run in self.open_runs:
            run.directory.start_metrics(step)

    def advance(self, rows: jax.Array) -> None:
        """Dispatches a step, then waits for the one before: the device is never idle, and never
        has more than two batches."""
        if self._logged is None:
            self._data.progress.rest()  # it compiles
        self._states, metrics = self._trainer.step(self._states, rows)
        self.step += 1
        if self.step in self._resampling:
            self._resample()
        self.settle()
        log = self.step % self.plan.runs[0].train.log_every == 0
        self._pending = (self.step, metrics, log)

    def follow_up(self, stop: bool) -> None:
        """Saves after a step where that is due."""
        every = self.plan.runs[0].train.checkpoint_every
        if stop or self.step == self.plan.steps or self.step % every == 0:
            self._pending = (*self._pending[:2], True)
            self.settle()  # gives up the runs whose states are not ones to save
            self._save()

    def settle(self) -> None:
        """Waits for the step that was dispatched last, and logs it if it is one to log."""
        if self._pending is None:
            return
        step, metrics, log = self._pending
        self._pending = None
        jax.block_until_ready(metrics)
        now = time.monotonic()
        if self._logged is None:  # the first step compiled; the rate is of the others
            self._logged = (step, now)
        if not log:
            return
        last_step, last_time = self._logged
        rate = (step - last_step) / (now - last_time) if step > last_step else None
        self._logged = (step, now)
        metrics = jax.device_get(metrics)
        for i, run in enumerate(self._runs):
            if run.open:
                self._log(run, step, {name: v[i].item() for name, v in metrics.items()}, rate)

    def _log(self, run: _Run, step: int, values: dict, rate: float | None) -> None:
        bad_step = values.pop("nonfinite_step")
        if bad_step >= 0 and run.config.train.on_nonfinite == "stop":
            self._check()
            run.fail(bad_step)
            self._run_ended()
            return

        run.directory.log(loop.metrics_line(run.config, step, values, rate))

    def _save(self) -> None:
        self._data.progress.rest()
        self._check()
        for i, run in enumerate(self._runs):
            if run.open and self.step not in run.checkpoints.steps:
                run.directory.flush()
                run.checkpoints.save(get_run(self._states, i), self.step)
                if jax.process_count() > 1:  # Orbax's barriers are one set for all checkpointers
                    run.checkpoints.finish()

    def finish_saving(self) -> None:
        for run in self.open_runs:
            run.checkpoints.finish()

    def _resample(self) -> None:
        self._data.progress.rest()
        data = self._data
        for i, trainer in enumerate(self._trainer.trainers):
            state = get_run(self._states, i)
            state = resample.resample(trainer, state, self.step, data.stream, data.placement)
            self._states = put_run(self._states, i, state)

    def end(self) -> None:
        """Evaluates all runs and writes their results."""
        self._data.progress.rest()
        self.finish_saving()
        means = loop.heldout_means(
            lambda rows: self._trainer.evaluate(self._states, rows),
            self._data.heldout,
            self._data.mesh,
        )
        seconds = time.monotonic() - self._began
        for i, (run, trainer) in enumerate(zip(self._runs, self._trainer.trainers, strict=True)):
            if run.open:
                own = {name: values and values[i] for name, values in means.items()}
                result = loop.make_result(trainer, get_run(self._states, i), own, seconds)
                self._check()
                run.directory.save_result(result)
                run.open = False
                self._run_ended()
        self._states = None

    def close(self) -> None:
        for run in self._runs:
            run.checkpoints.close()
            run.directory.close()


class _Bar:
    """Progress of a pass, in steps of its packs."""

    def __init__(self, name: str, done: int, total: int):
        self._on_terminal = sys.stderr.isatty() and is_writer()
        self._name = name
        self._bar = tqdm.tqdm(
            total=total, initial=done, unit="step", desc=name, disable=not self._on_terminal
        )
        self._done, self._total, self._next_line = done, total, time.monotonic() + 10

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def advance(self, packs: Sequence[_Training]) -> None:
        self._done += len(packs)
        self._bar.update(len(packs))
        if not self._on_terminal and is_writer() and time.monotonic() > self._next_line:
            self._next_line = time.monotonic() + 10
            part = 100 * self._done / self._total
            logging.info("%s: %d/%d pack steps (%.0f%%)", self._name, self._done, self._total, part)
