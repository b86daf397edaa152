"""Trains one run, from a config to the run's directory or to an SAE in memory."""

import contextlib
import functools
from collections.abc import Callable, Sequence

import jax
from absl import logging

from sae_jax import paths
from sae_jax.activations.iterables import IterableStream
from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.lm.live import open_stream
from sae_jax.sae import SAE
from sae_jax.train import agreement, preparation, resample, short_runs
from sae_jax.train.branch import Origin
from sae_jax.train.checkpoints import saved_steps
from sae_jax.train.directory import environment, is_writer
from sae_jax.train.limits import check_memory, in_32_bits, lack_of_memory_named
from sae_jax.train.loggers import Log
from sae_jax.train.loop import PackInTraining, TrainingData, train_packs
from sae_jax.train.pack import SingleTrainer
from sae_jax.train.progress import Progress
from sae_jax.train.recorder import OnMetrics, Recorder, RunRecorder
from sae_jax.train.step import Trainer, TrainState
from sae_jax.train.warm_start import start_fresh, start_from


@in_32_bits
def train_run(
    config: Config,
    workdir: str | paths.AnyPath | None,
    *,
    load_sae: Callable[[str], SAE] | None = None,
    start: SAE | None = None,
    open_stream: Callable = open_stream,
    on_metrics: Sequence[OnMetrics] = (),
    log_to: Log | None = None,
    extra_loss: Callable | None = None,
    progress: Progress | None = None,
) -> Recorder:
    """Trains a run in `workdir`, from the last checkpoint there if there is one.

    Args:
      config: what is trained, and on what data. The data decide what it leaves open.
      workdir: the run's directory, made if absent. With None nothing is written, and the returned
        recorder holds the lines of metrics and the last state.
      load_sae: reads the SAE that `train.init` names; its format may be another framework's.
      start: an SAE whose parameters a fresh run begins with, instead of `train.init`.
      open_stream: returns the streams of the data section, as `lm.open_stream` does.
      on_metrics: each is called with every line of metrics, on process 0.
      log_to: where the lines go besides metrics.jsonl, on process 0 (see `parse_log`).
      extra_loss: a term to add to the loss (see `train.step.ExtraLoss`).
      progress: what a watchdog reads.

    Returns the recorder of the run, with its `result`.

    Raises UserError for a mistake in the config, the data or the directory, before anything is
    computed; NonFiniteError if the loss became NaN; PreemptedError after SIGTERM.
    """
    agreement.check_same(
        lambda: agreement.described(config) | {"versions": environment()}, "config"
    )
    stream = open_stream(config.data)
    agreement.check_same(lambda: {"fingerprint": agreement.data_fingerprint(stream)}, "store")
    config = preparation.resolve(config, stream)
    steps = preparation.checked_steps(config, stream)
    if isinstance(stream, IterableStream) and any(step <= steps for step in resample.steps(config)):
        raise UserError(
            "dead latents are resampled by rows that are read again, but these activations come "
            "once: write them to a store (sae_jax.write_store), or set resample_every_tokens=0"
        )
    if config.mesh.run != 1:
        raise UserError("mesh.run shards the runs of a sweep; train has one: leave it at 1")
    preparation.check_variances(config, stream)
    data = TrainingData.open(config, open_stream)
    check_memory(config, data.mesh)
    origin = _origin(config, workdir, stream)
    if workdir is None:
        recorder = Recorder(config, on_metrics, log_to)
    else:
        recorder = RunRecorder(
            config,
            paths.path(workdir),
            on_metrics=on_metrics,
            log_to=log_to,
            data_fingerprint=stream.fingerprint,
            lineage=origin.lineage(config) if origin else (),
        )
    with (
        jax.set_mesh(data.mesh),
        contextlib.closing(recorder),
        progress or Progress() as progress,
        lack_of_memory_named(),
    ):
        if recorder.result is not None:
            logging.info("%s is finished; its result stands", workdir)
            return recorder
        if is_writer():
            for doubt in short_runs.doubts(config).values():
                logging.warning("%s", doubt)
        if config.train.init and not recorder.checkpoint_steps and origin is None:
            start = load_sae(config.train.init)
        if start is not None:
            agreement.check_same(
                lambda: {"fingerprint": agreement.parameters_fingerprint(start.parameters())},
                "SAE to start from",
            )
        _, _, variance = preparation.normalisation(config, data.stream)
        trainer = Trainer(recorder.config, steps, variance, extra_loss=extra_loss)
        if origin is not None:
            recorder.adopt(origin.restore(trainer, variance), origin.step, origin.run)
        pack = PackInTraining(
            SingleTrainer(trainer),
            [recorder],
            data,
            progress,
            begin_with=start and functools.partial(_begin_with, start, config),
        )
        train_packs([pack], data, "train", progress)
    return recorder


def _origin(config: Config, workdir: str | paths.AnyPath | None, stream) -> Origin | None:
    """Returns what a run branches off from, None where it has checkpoints of its own, or begins."""
    if not config.train.branch_from or workdir is not None and saved_steps(paths.path(workdir)):
        return None
    origin = Origin.open(config.train.branch_from)
    origin.check(config, stream.fingerprint)
    return origin


def _begin_with(sae: SAE, config: Config, state: TrainState) -> TrainState:
    return start_fresh(sae, state) if sae.is_fresh() else start_from(sae, config, state)
