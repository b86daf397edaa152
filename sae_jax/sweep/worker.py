"""A worker: claims the passes of a sweep one after another, and trains them.

Any number of workers share a sweep's directory and nothing else. One worker may be a JAX program of
many processes: process 0 claims, and the others learn from it what to do.
"""

import contextlib
import time

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.sweep import design, pass_trainer
from sae_jax.sweep.directory import SweepDirectory, counted
from sae_jax.sweep.leases import Lease, LeaseLostError, Leases
from sae_jax.train import agreement, results
from sae_jax.train.directory import environment, is_writer
from sae_jax.train.loggers import Log
from sae_jax.train.preemption import PreemptedError, sigterm_raises
from sae_jax.train.progress import Progress

_ALL_DONE, _WAIT = -1, -2  # instead of the index of a pass
_SECONDS_BETWEEN_LINES = 30  # between lines of the log, while waiting for others


def work(
    directory: SweepDirectory,
    lease_seconds: float,
    progress: Progress | None = None,
    log_to: Log | None = None,
) -> None:
    """Trains the sweep's runs that nobody else trains, until every run of the sweep has ended.

    It takes over passes from workers that die.

    Args:
      directory: the sweep.
      lease_seconds: how long this worker may be silent before others take it for dead.
      progress: what a watchdog reads to see that training goes on.
      log_to: where each run's metrics go besides its metrics.jsonl.

    Raises PreemptedError after SIGTERM, when what it trained is saved.
    """
    agreement.check_same(lambda: _described(directory), "sweep")
    agreement.check_shared(directory.path)
    leases = Leases(directory.path / "leases", lease_seconds)
    worker = _Worker(directory, leases, progress or Progress(), log_to)
    # Under jax.distributed its service listens, all the time; else `train.preemption` during steps.
    with contextlib.nullcontext() if jax.distributed.is_initialized() else sigterm_raises():
        while True:
            index, lease = worker.claim()
            if index == _ALL_DONE:
                break
            with lease or contextlib.nullcontext():
                if index == _WAIT:
                    worker.wait(seconds=min(5.0, lease_seconds / 6))
                else:
                    worker.train(worker.passes[index], lease)
    worker.write_results()


def _described(directory: SweepDirectory) -> dict:
    """Returns what the processes of a worker must agree on."""
    runs = {str(i): agreement.described(run.config) for i, run in enumerate(directory.runs, 1)}
    return {"runs": runs, "versions": environment()}


class _Worker:
    """One process of a worker."""

    def __init__(
        self, directory: SweepDirectory, leases: Leases, progress: Progress, log_to: Log | None
    ):
        self._progress, self._log_to = progress, log_to
        self._directory = directory
        self._leases = leases
        self.passes = directory.work()
        self._run_by_id = {run.id: run for run in directory.runs}
        self._waits = 0
        self._next_line = 0.0

    def claim(self) -> tuple[int, Lease | None]:
        """Returns the index of a pass that this worker now owns and its lease, or _ALL_DONE or
        _WAIT.

        The index is the same in all processes of the worker; process 0 alone has the lease.
        """
        index, lease = self._claim() if is_writer() else (_ALL_DONE, None)
        return _from_process_0(index), lease

    def _claim(self) -> tuple[int, Lease | None]:
        states = self._directory.states()
        open_passes = [
            i
            for i, work in enumerate(self.passes)
            if any(states[results.run_id(run)] in ("waiting", "started") for run in work.runs)
        ]
        for i in open_passes:
            lease = self._leases.claim(self.passes[i].name)
            if lease and not self._ended(self.passes[i]):
                return i, lease
            if lease:  # its owner finished it between our two looks
                lease.release()
        return (_WAIT if open_passes else _ALL_DONE), None

    def train(self, work: design.Pass, lease: Lease | None) -> None:
        """Trains a pass for as long as the lease is this worker's."""

        def check() -> None:
            if _from_process_0(bool(lease and lease.lost())):
                raise LeaseLostError(f"another worker has taken over {work.name}")

        if is_writer():
            logging.info("%s: %s", work.name, counted(len(work.runs), "run"))
        try:
            pass_trainer.train_pass(
                work,
                self._directory.path / "runs",
                check,
                self.write_results,
                self._progress,
                self._log_to,
                self._done_besides(work),
            )
        except (LeaseLostError, UserError) as error:
            # Two owners of one directory trip over each other's files: that is no mistake.
            with self._progress.waits_for("word that nobody has taken over", can_be_left=True):
                if isinstance(error, UserError) and not (lease and lease.lost()):
                    raise
            self._progress.error = None
            logging.warning("left %s to the worker that has taken it over", work.name)

    def wait(self, seconds: float) -> None:
        """Waits for other workers. Raises PreemptedError when the program is told to stop."""
        if is_writer() and time.monotonic() > self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            logging.info("waiting for %s", self._others())
        time.sleep(seconds)
        self._waits += 1
        if jax.distributed.is_initialized() and (
            multihost_utils.reached_preemption_sync_point(self._waits)
        ):
            raise PreemptedError(0)

    def write_results(self) -> None:
        if is_writer():  # of the grid as it is now, which may have grown
            SweepDirectory(self._directory.path).write_results()

    def _done_besides(self, work: design.Pass) -> list[Config]:
        """Returns the runs of other passes that are done."""
        own = {results.run_id(config) for config in work.runs}
        return [run.config for run in self._directory.done() if run.id not in own]

    def _ended(self, work: design.Pass) -> bool:
        runs = (self._run_by_id[results.run_id(config)] for config in work.runs)
        return all(self._directory.state(run) in ("done", "failed") for run in runs)

    def _others(self) -> str:
        """Says in words who trains what, for the log."""
        holders = {
            work.name: self._leases.holder(work.name)
            for work in self.passes
            if not self._ended(work)
        }
        return "; ".join(
            f"{name} of {holder.owner}, {holder.heard_of}"
            for name, holder in holders.items()
            if holder
        )


def _from_process_0(value: int) -> int:
    """Returns the value that process 0 of this worker has."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
