"""A worker: claims the passes of a sweep one after another, and trains them.

Any number of workers share a sweep's directory and nothing else. One may be a JAX program of many
processes: process 0 claims, and the others learn from it what to do.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from sae_jax.scaling import packs, passes
from sae_jax.scaling.leases import Lease, LeaseLostError, Leases
from sae_jax.scaling.sweep import SweepDirectory
from sae_jax.train import loop
from sae_jax.train.directory import is_writer
from sae_jax.train.preemption import PreemptedError

_ALL_DONE, _WAIT = -1, -2  # instead of the index of a pass
_SECONDS_BETWEEN_LINES = 30  # while waiting for others


def work(directory: SweepDirectory, lease_seconds: float) -> None:
    """Trains what nobody else does, and takes over from those who die, until every run of the
    sweep has ended. Raises PreemptedError after SIGTERM, what it was training saved."""
    leases = Leases(directory.path / "leases", lease_seconds)
    todo = packs.make_passes([run.config for run in directory.runs], directory.passes)
    by_id = {run.id: run for run in directory.runs}

    def ended(work: packs.Pass) -> bool:
        runs = [by_id[loop.run_id(config)] for config in work.runs]
        return all(directory.state(run) in ("done", "failed") for run in runs)

    def write_results() -> None:
        if is_writer():
            directory.write_results()

    turns, next_line = 0, 0.0  # of waiting
    with _sigterm_raises():
        while True:
            index, lease = _claim(todo, leases, ended)
            if index == _ALL_DONE:
                break
            if index == _WAIT:
                if time.monotonic() > next_line:
                    next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
                    logging.info("waiting: %s", _others(todo, leases, ended))
                time.sleep(min(5.0, lease_seconds / 6))
                turns += 1
                if jax.distributed.is_initialized() and (
                    multihost_utils.reached_preemption_sync_point(turns)
                ):
                    raise PreemptedError(0)
                continue
            logging.info("%s: %d runs", todo[index].name, len(todo[index].runs))
            with lease:
                try:
                    passes.train_pass(
                        todo[index], directory.path / "runs", _checker(lease), write_results
                    )
                except LeaseLostError as lost:
                    logging.warning("%s: %s", todo[index].name, lost)
    write_results()


def _claim(todo, leases: Leases, ended) -> tuple[int, Lease | contextlib.AbstractContextManager]:
    """The index of a pass that this worker now owns, and its lease; or _ALL_DONE or _WAIT. The
    same for every process of the worker."""
    index, lease = _ALL_DONE, contextlib.nullcontext()
    if is_writer():
        for i, work in enumerate(todo):
            if ended(work):
                continue
            index = _WAIT
            claimed = leases.claim(work.name)
            if claimed is None:
                continue
            if ended(work):  # by its last owner, between our two looks
                claimed.release()
                continue
            index, lease = i, claimed
            break
    return int(_from_process_0(index)), lease


def _checker(lease):
    """`Lease.check` of process 0, for all processes: they must go on, or stop, together."""

    def check() -> None:
        lost = ""
        if isinstance(lease, Lease):
            try:
                lease.check()
            except LeaseLostError as error:
                lost = str(error)
        if _from_process_0(bool(lost)):
            raise LeaseLostError(lost or "another worker has taken over")

    return check


def _from_process_0(value: int):
    if jax.process_count() == 1:
        return value
    return multihost_utils.broadcast_one_to_all(np.int32(value)).item()


def _others(todo, leases: Leases, ended) -> str:
    """Who trains what, for the log."""
    words = []
    for work in todo:
        holder = None if ended(work) else leases.holder(work.name)
        if holder:
            words.append(f"{work.name} is {holder.owner}'s, heard of {holder.age:.0f} s ago")
    return "; ".join(words)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends what this worker does between steps: compiling, evaluating, waiting. During
    steps `train.preemption` listens; under jax.distributed its service does, all the time."""
    if jax.distributed.is_initialized() or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(*_):
        raise PreemptedError(0)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
