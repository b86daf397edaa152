"""Trains a pass: all its packs on the same rows, each run as if it were alone.

The sites of all runs are read together, and each pack takes those of its own from the batch. What
comes once is read by a pack for itself: the start of b_dec, resampling, the held-out rows.

Every run has the directory that `sae-jax train` would have made, with its own metrics, checkpoints
and result. Either command can go on with a run of the other's.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence

import jax

from sae_jax import activations
from sae_jax.config import Config, DataConfig
from sae_jax.lm.live import open_store
from sae_jax.paths import AnyPath
from sae_jax.sweep import design
from sae_jax.train import agreement, preparation
from sae_jax.train.branch import Origin
from sae_jax.train.checkpoints import saved_steps
from sae_jax.train.directory import data_fingerprint
from sae_jax.train.limits import check_memory, in_32_bits, lack_of_memory_named
from sae_jax.train.loggers import Log
from sae_jax.train.loop import PackInTraining, TrainingData, train_packs
from sae_jax.train.mesh import make_mesh
from sae_jax.train.pack import PackTrainer
from sae_jax.train.progress import Progress
from sae_jax.train.recorder import RunRecorder
from sae_jax.train.results import run_id
from sae_jax.train.schedule_steps import trunk_steps

_KEPT = 2  # checkpoints a run, at least: a kill leaves some runs one behind the others


@in_32_bits
def train_pass(
    work: design.Pass,
    runs_directory: AnyPath,
    check: Callable[[], None] = lambda: None,
    run_ended: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
    log_to: Log | None = None,
    others: Sequence[Config] = (),
) -> None:
    """Trains every run of a pass that has not ended, from its last checkpoint.

    Args:
      work: the pass.
      runs_directory: the directory of the runs; each has RUN_ID in it.
      check: is called before anything but a metric is written. What it raises ends the pass.
      run_ended: is called when a run's result.json has been written, or its failed.json where its
        loss became NaN.
      progress: what a watchdog reads to see that training goes on.
      log_to: where each run's metrics go besides its metrics.jsonl.
      others: other runs of the sweep. A run that is the same as one of them up to a checkpoint goes
        on from there.

    Raises UserError for a mistake before anything is computed, and PreemptedError after SIGTERM,
    when all runs are saved.
    """
    progress = progress or Progress()
    open_stream = _stream_opener()
    config = work.packs[0].runs[0]
    mesh = make_mesh(config)
    stream = open_stream(config.data)
    agreement.check_same(lambda: {"fingerprint": agreement.data_fingerprint(stream)}, "store")
    data_of_sites: dict[DataConfig, TrainingData] = {}
    for pack in work.packs:
        config = pack.runs[0]
        preparation.checked_steps(config, stream)
        check_memory(config, make_mesh(config))
        if config.data not in data_of_sites:
            data_of_sites[config.data] = TrainingData.open(config, open_stream)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        packs: list[PackInTraining] = []
        for place, pack in enumerate(work.packs):
            data = data_of_sites[pack.runs[0].data]
            leaves = [branch.start for branch in work.packs if branch.trunk == place]
            most = min(leaves, default=pack.steps)
            origins = _agreed_origins(pack, runs_directory, others, data.stream.fingerprint, most)
            recorders = [
                RunRecorder(
                    run,
                    runs_directory / run_id(run),
                    log_to=log_to,
                    data_fingerprint=data.stream.fingerprint,
                    keep=max(_KEPT, run.train.keep_checkpoints),
                    one_of_many=True,
                    lineage=origins[i].lineage(run) if i in origins else (),
                )
                for i, run in enumerate(pack.runs)
            ]
            _, _, variance = preparation.normalisation(pack.runs[0], data.stream)
            trainer = PackTrainer(pack.runs, pack.steps, variance)
            training = PackInTraining(
                trainer,
                recorders,
                data,
                progress,
                trunk=None if pack.trunk is None else packs[pack.trunk],
                start=pack.start,
                parents=pack.parents,
                check=check,
                run_ended=run_ended,
            )
            stack.enter_context(contextlib.closing(training))
            packs.append(training)
            for i, origin in origins.items():
                if recorders[i].open:
                    check()
                    state = origin.restore(trainer.trainers[i], variance)
                    recorders[i].adopt(state, origin.step, origin.run)
        stack.enter_context(progress)  # notes an error before what closes files can hang of it
        fewer = "train fewer runs at once by more --passes, " if len(work.runs) > 1 else ""
        stack.enter_context(lack_of_memory_named(fewer))
        going_on = [
            pack.runs[0]
            for pack, training in zip(work.packs, packs, strict=True)
            if training.open_recorders
        ]
        if going_on:
            whole = _data_of_all(going_on, data_of_sites, open_stream)
            train_packs(packs, whole, work.name, progress)


def _stream_opener() -> Callable:
    """Returns `lm.open_stream`, which opens the store once for all streams of a pass."""
    return functools.partial(activations.open_stream, open_store=functools.cache(open_store))


def _data_of_all(
    runs: Sequence[Config], data_of_sites: dict[DataConfig, TrainingData], open_stream: Callable
) -> TrainingData:
    """Returns the data that are read for all of some runs, and makes each run's take from them."""
    of_all = design.reading(runs)
    whole = data_of_sites.get(of_all)
    if whole is None:
        config = dataclasses.replace(runs[0], data=of_all)
        whole = TrainingData(config, open_stream(of_all), None, make_mesh(config))
    for run in runs:
        data_of_sites[run.data].take_from(whole)
    return whole


def _agreed_origins(pack: design.Pack, runs_directory: AnyPath, *more) -> dict[int, Origin]:
    """Returns the `_origins` that process 0 finds, which sees first what other workers finish."""

    def found() -> str:
        origins = _origins(pack, runs_directory, *more)
        return json.dumps([(i, origin.run.name, origin.step) for i, origin in origins.items()])

    branch_from = pack.runs[0].train.branch_from
    return {
        i: Origin.open(branch_from or str(runs_directory / name / "checkpoints" / str(step)))
        for i, name, step in json.loads(agreement.from_process_0(found))
    }


def _origins(
    pack: design.Pack,
    runs_directory: AnyPath,
    others: Sequence[Config],
    fingerprint: str,
    most: int,
) -> dict[int, Origin]:
    """Returns the checkpoints of other runs that runs of a pack begin with, by the runs' numbers.

    Runs that have checkpoints of their own are left out. All others begin at one step, at `most` or
    before, where the first branch leaves them. Branches of the pass begin with their trunk.
    """
    fresh = [i for i, run in enumerate(pack.runs) if not saved_steps(runs_directory / run_id(run))]
    if branch_from := pack.runs[0].train.branch_from:
        return dict.fromkeys(fresh, Origin.open(branch_from)) if fresh else {}
    if pack.trunk is not None:
        return {}
    choices = {
        i: _same_until(pack.runs[i], runs_directory, others, fingerprint, most)
        for i in fresh
        if others
    }
    steps = set.intersection(*map(set, choices.values())) if choices else set()
    return {i: choices[i][max(steps)] for i in choices if steps}


def _same_until(
    run: Config, runs_directory: AnyPath, others: Sequence[Config], fingerprint: str, most: int
) -> dict[int, Origin]:
    """Returns the checkpoints of other runs up to which `run` is the same as they, by step: those
    of steps up to `most`.
    """
    found: dict[int, Origin] = {}
    key = design.trunk_key(run)
    for other in others if key else ():
        if design.trunk_key(other) != key:
            continue
        path = runs_directory / run_id(other)
        until = min(trunk_steps(run), trunk_steps(other), most)
        if data_fingerprint(path) == fingerprint:
            steps = [step for step in saved_steps(path) if step <= until]
            found |= {step: Origin(path, step, other) for step in steps}
    return found
