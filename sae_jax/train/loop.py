"""Training one SAE: from a config to a run's directory, resumable at every step."""

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging

from sae_jax import config as configs
from sae_jax import paths
from sae_jax import sae as saes
from sae_jax.activations import Stream, WorldStream, open_stream
from sae_jax.config import Config
from sae_jax.errors import UserError, choose
from sae_jax.train import optimizer, resample
from sae_jax.train.checkpoints import Checkpoints
from sae_jax.train.directory import RunDirectory, is_writer
from sae_jax.train.median import geometric_median
from sae_jax.train.mesh import BatchPlacement, make_mesh
from sae_jax.train.preemption import PreemptedError, Preemption
from sae_jax.train.progress import Progress
from sae_jax.train.step import Trainer, TrainState
from sae_jax.train.warm_start import start_from

_MEDIAN_ROWS = 32_768  # sample for the geometric median (Gao et al. 2024, A.1)
_EVAL_ROWS = 65_536


class NonFiniteError(Exception):
    """The loss or the gradient became NaN or infinite."""


def train(
    config: Config,
    workdir: str | paths.AnyPath,
    load_sae: Callable[[str], saes.SAE] | None = None,
    progress: Progress | None = None,
) -> dict:
    """Trains `config` in `workdir`, from the last checkpoint there if there is one, and returns
    the run's result (the content of result.json). load_sae: reads `train.init`, which may be of a
    format that this room knows nothing of. progress: is told how far the steps are.

    Raises UserError for a mistake in the config, the store or the directory, before anything
    is computed; NonFiniteError if the loss became NaN; PreemptedError after SIGTERM.
    """
    stream = open_stream(config.data)
    config = resolve(config, stream)
    steps = count_steps(config, stream)
    if config.mesh.run != 1:
        raise UserError("mesh.run shards the runs of a sweep; train has one: leave it at 1")
    mesh = make_mesh(config)
    heldout = heldout_stream(config, mesh)
    directory = RunDirectory(paths.path(workdir), config)
    if directory.result is not None:
        logging.info("%s is finished; its result stands", workdir)
        return directory.result
    checkpoints = Checkpoints(directory.path, config.train.keep_checkpoints)
    begins = config.train.init and checkpoints.latest_step is None
    sae = load_sae(config.train.init) if begins else None
    with jax.set_mesh(mesh):
        return _train(
            config,
            stream,
            heldout,
            steps,
            mesh,
            directory,
            checkpoints,
            sae,
            progress or Progress(),
        )


def resolve(config: Config, stream: Stream | WorldStream) -> Config:
    """`config` with everything filled in that the data and the architecture decide, and checked
    as far as is possible without devices."""
    optimizer.check(config.optimizer)
    names, widths, target = stream.site_names, stream.site_widths, None
    data = dataclasses.replace(config.data, site=",".join(names))
    if config.data.target_site:
        *inputs, target_name = names
        data = dataclasses.replace(data, site=",".join(inputs), target_site=target_name)
        *widths, target = widths
    sae = saes.resolve(config.sae, tuple(widths), target)
    adam = config.optimizer
    if adam.learning_rate is None:
        rate = saes.architecture(sae).learning_rate(sae.d_sae)
        adam = dataclasses.replace(adam, learning_rate=rate)
    choose(config.train.on_nonfinite, ("stop", "skip"), "train.on_nonfinite")
    for name in ("tokens", "log_every", "checkpoint_every", "keep_checkpoints"):
        if getattr(config.train, name) < 1:
            raise UserError(f"train.{name} must be 1 or more, not {getattr(config.train, name)}")
    return dataclasses.replace(config, sae=sae, data=data, optimizer=adam)


def _train(config, stream, heldout, steps, mesh, directory, checkpoints, sae, progress) -> dict:
    scale, target_scale, variance = normalisation(config, stream)
    trainer = Trainer(config, steps, variance)
    placement = BatchPlacement(mesh, config.data.batch_size)
    with contextlib.closing(checkpoints), contextlib.closing(directory), progress:
        progress.saved = checkpoints.latest_step
        if progress.saved is None:
            state = trainer.init(initial_b_dec(config, stream), scale, target_scale)
            state = state if sae is None else start_from(sae, config, state)
            start = 0
        else:
            state = checkpoints.restore(trainer.abstract())
            start = progress.saved
            logging.info("resumed %s at step %d of %d", directory.path, start, steps)
        directory.start_metrics(start)
        begin = time.monotonic()
        state = _run_steps(
            trainer, state, start, steps, stream, placement, checkpoints, directory, progress
        )
        progress.rest()
        checkpoints.finish()
        means = heldout_means(lambda rows: trainer.evaluate(state, rows), heldout, mesh)
        result = make_result(trainer, state, means, time.monotonic() - begin)
        directory.save_result(result)
        return result


def _run_steps(trainer, state, start, steps, stream, placement, checkpoints, directory, progress):
    """Steps `start` to `steps`. The host waits for a step only when the next one has been
    dispatched: the device never idles, and never holds more than two batches."""
    config = trainer.config
    batches = placement.place_all(stream.batches(start, placement.rows)) if start < steps else None
    resampling = resample.steps(config)
    meter = _Meter(config, start, steps, directory, progress)
    before = None  # (step, its metrics, whether to log them): dispatched, not waited for
    saving = progress.saved  # the step whose checkpoint may still be being written
    with Preemption() as preemption, meter:
        for step in range(start + 1, steps + 1):
            batch = next(batches)
            progress.begin(step)
            state, metrics = trainer.step(state, batch)
            if step in resampling:
                progress.rest()
                state = resample.resample(trainer, state, step, stream, placement)
            if before:
                meter.done(*before)
            stop = preemption.reached(step)
            save = stop or step == steps or step % config.train.checkpoint_every == 0
            before = (step, metrics, save or step % config.train.log_every == 0)
            if save:
                meter.done(*before)  # raises if the state is not one to save
                before = None
                progress.rest()
                directory.flush()
                checkpoints.save(state, step)
                progress.saved, saving = saving, step  # the one before has been written
            if stop:
                checkpoints.finish()
                raise PreemptedError(step)
    return state


class _Meter:
    """Progress for the user and metrics.jsonl, from a logged step's metrics."""

    def __init__(
        self, config: Config, start: int, steps: int, directory: RunDirectory, progress: Progress
    ):
        self._config = config
        self._progress = progress
        self._directory = directory
        self._steps = steps
        self._last = None  # (step, time) of the last log line
        on_terminal = sys.stderr.isatty() and jax.process_index() == 0
        self._bar = tqdm.tqdm(
            total=steps, initial=start, unit="step", desc="train", disable=not on_terminal
        )
        self._next_line = 0.0

    def __enter__(self) -> "_Meter":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def done(self, step: int, metrics: dict[str, jax.Array], log: bool) -> None:
        """Waits for a step, counts it, and logs it if asked to."""
        jax.block_until_ready(metrics)
        self._progress.end(step)
        self._bar.update()
        if self._last is None:  # the first step compiled; the rate is of the others
            self._last = (step, time.monotonic())
        if log:
            self._log(step, metrics)

    def _log(self, step: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        bad_step = values.pop("nonfinite_step")
        if bad_step >= 0:
            self._report_nonfinite(bad_step)
        last_step, last_time = self._last
        now = time.monotonic()
        seconds = max(now - last_time, 1e-9)
        self._last = (step, now)
        steps_per_second = (step - last_step) / seconds if step > last_step else None
        line = metrics_line(self._config, step, values, steps_per_second)
        self._directory.log(line)
        shown = {name: f"{values[name]:.4g}" for name in ("loss", "fvu", "l0", "dead_fraction")}
        self._bar.set_postfix(shown, refresh=False)
        due = now > self._next_line or step == self._steps
        if due and self._bar.disable and is_writer():
            self._next_line = now + 10
            text = " ".join(f"{name} {value}" for name, value in shown.items())
            rate = line["tokens_per_second"] or 0
            logging.info("step %d/%d %s %.0f tokens/s", step, self._steps, text, rate)

    def _report_nonfinite(self, step: int) -> None:
        if self._config.train.on_nonfinite == "skip":
            logging.log_first_n(
                logging.WARNING, "step %d gave a non-finite loss and was skipped", 1, step + 1
            )
            return
        raise NonFiniteError(
            f"the loss or its gradient became NaN or infinite at step {step + 1}; the last "
            f"checkpoint in {self._directory.path} is intact. Lower optimizer.learning_rate, or "
            "set train.on_nonfinite=skip to leave out such steps, in a new --workdir"
        )


def metrics_line(
    config: Config, step: int, values: dict[str, float], steps_per_second: float | None
) -> dict:
    """A line of metrics.jsonl after `step` steps. Values that are not finite become null."""
    tokens = step * config.data.batch_size
    return {
        "step": step,
        "tokens": tokens,
        **flops(config, tokens),
        **{name: v if math.isfinite(v) else None for name, v in values.items()},
        "tokens_per_second": steps_per_second and steps_per_second * config.data.batch_size,
    }


def flops(config: Config, tokens: int) -> dict[str, int]:
    """Both accountings of a run's compute: `flops` 12 n d a token (6 n (d_in + d_out)), the
    field's axis for every architecture, and `flops_executed`, what the step really does (recipes
    of Gao et al.)."""
    executed = saes.architecture(config.sae).flops_per_token(config.sae)
    return {
        "flops": 6 * config.sae.d_sae * (config.sae.d_in + config.sae.d_out) * tokens,
        "flops_executed": executed * tokens,
    }


def run_id(config: Config) -> str:
    """Hash of the resolved config without hardware."""
    text = json.dumps(configs.identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def planned(config: Config) -> dict:
    """What of a run's result its resolved config decides."""
    tokens = config.train.tokens // config.data.batch_size * config.data.batch_size
    return {
        "run_id": run_id(config),
        "architecture": config.sae.architecture,
        "kind": config.sae.kind,
        "d_in": config.sae.d_in,
        "d_sae": config.sae.d_sae,
        "k": config.sae.k,
        "sparsity_coefficient": config.sae.sparsity_coefficient,
        "seed": config.train.seed,
        "lr": config.optimizer.learning_rate,
        "tokens": tokens,
        **flops(config, tokens),
    }


def make_result(
    trainer: Trainer, state: TrainState, means: dict[str, float | None], seconds: float
) -> dict:
    """The content of result.json of a run that ended in `state`. means: on held-out rows."""
    dead = trainer.dead(state)
    return {
        **planned(trainer.config),
        "sparsity_coefficient": _last_coefficient(trainer.config, state),
        **means,
        "dead_fraction": float(jnp.mean(dead.astype(jnp.float32))),
        "wall_seconds": seconds,
        "devices": jax.sharding.get_mesh().size,
    }


def _last_coefficient(config: Config, state: TrainState) -> float | None:
    """The configured sparsity coefficient, or what it was adapted to."""
    coefficient = config.sae.sparsity_coefficient
    return coefficient and coefficient * math.exp(float(state.log_coefficient))


def heldout_means(
    evaluate: Callable[[jax.Array], dict[str, jax.Array]], heldout, mesh: jax.sharding.Mesh
) -> dict:
    """Means of what `evaluate` gives for batches, over up to 65,536 held-out rows: numbers, or
    (runs,) arrays; None without held-out rows."""
    names = ("eval_loss", "eval_fvu", "eval_l0")
    if heldout is None:
        return dict.fromkeys(names)
    batch = heldout.batch_size
    placement = BatchPlacement(mesh, batch)
    count = max(1, min(heldout.steps_per_epoch, _EVAL_ROWS // batch))
    batches = placement.place_all(heldout.batches(0, placement.rows))
    means = jax.device_get([evaluate(next(batches)) for _ in range(count)])
    return {name: np.mean([np.float64(m[name]) for m in means], axis=0).tolist() for name in names}


def heldout_stream(config: Config, mesh) -> Stream | WorldStream | None:
    """Held-out rows in batches of the training's size, or of what there is."""
    if config.data.holdout_fraction == 0:
        return None
    unit = math.lcm(config.data.virtual_shards, mesh.shape["data"])
    once = dataclasses.replace(config.data, epochs=1)
    try:
        rows = open_stream(once, "heldout", unit).rows_per_epoch
    except UserError as error:
        raise UserError(
            f"too few rows are held out to evaluate on ({error}); set data.holdout_fraction "
            f"higher, now {config.data.holdout_fraction}, or to 0 for no evaluation"
        ) from error
    return open_stream(once, "heldout", min(config.data.batch_size, rows // unit * unit))


def count_steps(config: Config, stream: Stream | WorldStream) -> int:
    """The run's steps. UserError if the data does not hold as many."""
    batch, tokens = config.data.batch_size, config.train.tokens
    if tokens < batch:
        raise UserError(f"train.tokens {tokens} is less than one batch of {batch}")
    steps = tokens // batch
    if steps > stream.num_steps:
        need = -(-steps // stream.steps_per_epoch)
        raise UserError(
            f"train.tokens {tokens} is more than the {stream.num_steps * batch} training tokens "
            f"that {config.data.store} gives in data.epochs={config.data.epochs}; harvest more, "
            f"lower train.tokens, or set data.epochs={need} to see them again"
        )
    return steps


def normalisation(config: Config, stream: Stream | WorldStream) -> tuple:
    """What inputs and targets are multiplied by, from the data's statistics: one number for each
    site, for a crosscoder's sites side by side (d_in,); and the variance of the targets after
    that, summed over d_out."""
    norms = np.asarray(stream.site_mean_squared_norms)
    widths = np.asarray(stream.site_widths)
    wanted = {"sqrt_d": widths, "unit": np.ones(len(widths)), "none": norms}
    scales = np.sqrt(wanted[config.sae.normalize] / norms)
    ends = np.cumsum(widths)[:-1]
    means = np.array([np.sum(np.square(mean)) for mean in np.split(stream.mean, ends)])
    variances = scales**2 * (norms - means)
    if config.sae.kind == "crosscoder":
        columns = np.repeat(scales, widths).astype(np.float32)
        return columns, columns, float(variances.sum())
    return float(scales[0]), float(scales[-1]), float(variances[-1])


def initial_b_dec(config: Config, stream: Stream | WorldStream) -> np.ndarray:
    """(d_out,) in the units of the targets."""
    targets = slice(stream.width - config.sae.d_out, None)
    if config.sae.b_dec_init == "zero":
        return np.zeros(config.sae.d_out, np.float32)
    if config.sae.b_dec_init == "mean":
        return stream.mean[targets].astype(np.float32)
    rows: list[np.ndarray] = []
    for batch in stream.batches(prefetch=0):
        rows.extend(batch[:, targets].astype(np.float32))
        if len(rows) >= _MEDIAN_ROWS:
            break
    return geometric_median(np.stack(rows[:_MEDIAN_ROWS]))
