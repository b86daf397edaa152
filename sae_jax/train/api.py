"""Training from Python: `sae_jax.train`."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from sae_jax import activations, lm, paths
from sae_jax.activations import ArrayStore, IterableData, Store, is_world
from sae_jax.activations.arrays import as_rows
from sae_jax.config import Config, DataConfig, typed_field
from sae_jax.errors import UserError, known_arguments
from sae_jax.sae import SAE, SAEConfig, architecture
from sae_jax.sae.config import TRANSCODERS
from sae_jax.train import branch
from sae_jax.train.checkpoints import load_sae
from sae_jax.train.loggers import parse_log
from sae_jax.train.recorder import OnMetrics, Recorder
from sae_jax.train.run import train_run

_BATCH_SIZE = 2048
_LINES = 100  # of metrics, about, where the config does not say how many


@dataclasses.dataclass(frozen=True, repr=False)
class TrainResult:
    """What `train` gives."""

    sae: SAE
    """The trained SAE, on one device."""
    metrics: list[dict]
    """The lines of metrics, oldest first: step, tokens, loss, fvu, l0, dead_fraction and so on."""
    result: dict
    """What the run came to, as in result.json, such as eval_loss and eval_fvu on held-out rows."""
    config: Config
    """The whole config of the run, with everything resolved."""
    workdir: str | None
    """The run's directory, which `sae_jax.load` reads too; None where nothing was written."""

    def __repr__(self) -> str:
        shown = {"tokens": f"{self.result['tokens']:,}"}
        for name in ("eval_fvu", "eval_l0", "dead_fraction"):
            value = self.result.get(name)
            shown[name] = "none" if value is None else f"{value:.4g}"
        if self.workdir is not None:
            shown["workdir"] = repr(self.workdir)
        texts = ", ".join(f"{name} {text}" for name, text in shown.items())
        return f"TrainResult({self.sae!r}: {texts})"


@known_arguments
def train(
    sae: SAE | SAEConfig | None = None,
    data=None,
    *,
    tokens: int | float | None = None,
    workdir: str | pathlib.Path | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    holdout_fraction: float | None = None,
    on_metrics: OnMetrics | Iterable[OnMetrics] = (),
    extra_loss: Callable | None = None,
    log: str = "",
    config: Config | None = None,
    branch_from: str | pathlib.Path | None = None,
    extend_tokens: int | float | None = None,
) -> TrainResult:
    """Trains an SAE on activations, and returns a new one; the one given stays as it is.

        result = sae_jax.train(sae_jax.TopK(d_in=768, d_sae=24_576, k=32), x)
        latents = result.sae.encode(x)

    Args:
      sae: where training starts. A fresh SAE gets the b_dec that its recipe computes from the data;
        a trained one goes on as it is. A config stands for a fresh SAE of the data's width.
      data: activations in the model's own units: an array (rows, d), or {site: array} for a
        crosscoder's sites or a transcoder's input and then its target; an iterable of arrays
        (rows, d), such as a generator that runs a model; a store, or its path; "world:NAME,...".
      tokens: rows to train on. By default all of the data that is not held out, `epochs` times;
        a generator that goes on for more than a window of rows needs it.
      workdir: the run's directory. With it the run is saved, and the same call resumes it, exactly,
        after an interruption; without it nothing is written.
      batch_size: rows of a step, by default 2,048, or fewer where the data are few.
      learning_rate: the peak, by default the architecture's rule for its d_sae.
      epochs: passes over the data, by default 1.
      seed: of the order of the rows and, for a config, of the fresh parameters.
      holdout_fraction: part of the rows that is kept to evaluate on at the end, by default 0.05.
      on_metrics: called with every line of metrics, a dict, while the run goes on.
      extra_loss: extra_loss(sae, x, y) -> scalar, a term to add to the training loss. x (B, d_in)
        and y (B, d_out) are in the SAE's own units, and arrays carry their sharding (see
        `train.step.Trainer`).
      log: where the lines go besides, such as "wandb:PROJECT,tensorboard" (extra [log]).
      config: everything else (schedule, checkpoints, mesh, ...), whose `sae` section is ignored.
      branch_from: a checkpoint to go on from, "RUN/checkpoints/STEP", or "RUN" for its latest, with
        Adam's state and its place in the data. What is not given is as in that run: `data`,
        `tokens`, and `sae`, for which a config may be given that changes, say, the sparsity.
      extend_tokens: makes the run that `branch_from` names longer: so many rows, from its
        beginning. It goes on from where that run's learning rate began to fall.

    Raises UserError for data or settings that do not fit; NonFiniteError if the loss became NaN;
    PreemptedError after SIGTERM, when the run is saved.
    """
    origin = None
    if branch_from is not None or extend_tokens is not None:
        origin = _branch(branch_from, extend_tokens, workdir, sae, tokens, config)
        sae, config = sae or origin.sae, origin
        data = origin.data.store if data is None else data
        tokens = origin.train.tokens if tokens is None else tokens
    if not isinstance(sae, SAE | SAEConfig):
        raise UserError(
            f"train takes an SAE, such as sae_jax.TopK(d_in=768, d_sae=24_576, k=32), or its "
            f"config; got {type(sae).__name__}"
        )
    base = config or Config()
    if base.train.init and origin is None:
        raise UserError("train.init is for the command line; here, give the SAE itself to train")
    asked = {"batch_size": batch_size, "epochs": epochs, "holdout_fraction": holdout_fraction}
    asked |= {"seed": seed}
    section = dataclasses.replace(base.data, **{n: v for n, v in asked.items() if v is not None})
    tokens = None if tokens is None else typed_field("train.tokens", tokens)
    section, open_streams = _open(data, section, tokens, config is None and batch_size is None)
    sae_config = sae if isinstance(sae, SAEConfig) else sae.config
    section = _with_sites(section, sae_config, data)
    if tokens is None:
        tokens = _all_tokens(section, open_streams)
    training = {"tokens": tokens}
    if seed is not None:
        training["seed"] = seed
    if config is None:
        training["log_every"] = max(1, tokens // section.batch_size // _LINES)
    adam = base.optimizer
    if learning_rate is not None:
        adam = dataclasses.replace(adam, learning_rate=learning_rate)
    run = dataclasses.replace(
        base,
        sae=sae_config,
        data=section,
        optimizer=adam,
        train=dataclasses.replace(base.train, **training),
    )
    if not callable(on_metrics) and not isinstance(on_metrics, list | tuple):
        raise UserError(f"on_metrics is a function, or several, not {on_metrics!r}")
    recorder = train_run(
        run,
        workdir,
        start=sae if isinstance(sae, SAE) else None,
        open_stream=open_streams,
        on_metrics=(on_metrics,) if callable(on_metrics) else tuple(on_metrics),
        extra_loss=extra_loss,
        log_to=parse_log(log, workdir),
    )
    trained = _trained(recorder) if workdir is None else load_sae(paths.path(workdir))
    return TrainResult(
        sae=_with_window(trained, sae_config.dead_after_tokens),
        metrics=recorder.read_lines(),
        result=recorder.result,
        config=recorder.config,
        workdir=None if workdir is None else str(workdir),
    )


def _branch(branch_from, extend_tokens, workdir, sae, tokens, config: Config | None) -> Config:
    """The config of a branch that changes nothing else, or of the longer run."""
    if branch_from is None:
        raise UserError("extend_tokens makes a run longer; say with branch_from= which")
    if isinstance(sae, SAE) or config is not None:
        raise UserError(
            "a branch has the parameters and the config of the run that it leaves; in place of "
            f"{'an SAE' if isinstance(sae, SAE) else 'config='} give what changes: the config of "
            "an SAE, learning_rate=, tokens="
        )
    if extend_tokens is not None:
        if tokens is not None or sae is not None:
            raise UserError("extend_tokens= changes the tokens alone; leave sae and tokens= out")
        extend_tokens = typed_field("train.tokens", extend_tokens)
    return branch.find(str(branch_from), extend_tokens, {}, workdir)


def _open(data, section: DataConfig, tokens: int | None, fit_batch: bool):
    """The data section that describes `data`, and what opens its streams."""
    if isinstance(data, str) and is_world(data):
        return dataclasses.replace(section, store=data), lm.open_stream
    if isinstance(data, str | pathlib.Path | paths.ObjectPath):
        store = lm.open_store(data)
    elif isinstance(data, Store):
        store = data
    elif isinstance(data, Mapping) or hasattr(data, "ndim"):
        store = ArrayStore(data)
    elif isinstance(data, list | tuple):
        store = ArrayStore(_joined(data))
    elif isinstance(data, Iterable):
        source = IterableData(data, section, tokens)
        if source.array is None:
            return dataclasses.replace(section, store=source.path), source.open_stream
        store = source.array
    else:
        raise UserError(
            f"activations are an array (rows, width), an iterable of such arrays, a store or its "
            f"path; got {type(data).__name__}"
        )
    if fit_batch:
        section = _with_batch_size(section, store.num_rows)
    return (
        dataclasses.replace(section, store=store.path),
        functools.partial(activations.open_stream, open_store=lambda _: store),
    )


def _joined(arrays: list | tuple) -> np.ndarray:
    """A list of arrays (rows, width) one after another; or a list of rows as an array."""
    if not arrays or any(np.ndim(array) != 2 for array in arrays):
        return np.asarray(arrays)
    parts = [as_rows("a batch", array) for array in arrays]
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        raise UserError(
            f"activations of one width are needed; these arrays have {widths[0]} and {widths[1]}"
        )
    return np.concatenate(parts)


def _with_batch_size(section: DataConfig, rows: int) -> DataConfig:
    """Of few rows batches are smaller, so that there are some steps, and shuffled in fewer parts,
    so that few rows can be held out. Devices share a batch, so it has a row for each at least."""
    most = max(rows // 16, 1)
    batch = max(min(_BATCH_SIZE, 2 ** int(math.log2(most))), jax.device_count())
    shards = math.gcd(section.virtual_shards if batch == _BATCH_SIZE else 8, batch)
    return dataclasses.replace(section, batch_size=batch, virtual_shards=shards)


def _with_sites(section: DataConfig, sae: SAEConfig, data) -> DataConfig:
    """Of {site: array} all sites are used, a transcoder's target being the last."""
    if not isinstance(data, Mapping) or section.site:
        return section
    names = list(data)
    if sae.kind in TRANSCODERS and len(names) > 1:
        return dataclasses.replace(section, site=",".join(names[:-1]), target_site=names[-1])
    return dataclasses.replace(section, site=",".join(names))


def _all_tokens(section: DataConfig, open_streams: Callable) -> int:
    if is_world(section.store):
        raise UserError("a world's rows never end; say with tokens= on how many to train")
    return open_streams(section).num_steps * section.batch_size


def _with_window(sae: SAE, dead_after_tokens: int | None) -> SAE:
    """Returns the SAE with the window of dead latents that its user gave, if any.

    The default follows from a run's length, so that another training of the SAE has its own.
    """
    config = dataclasses.replace(sae.config, dead_after_tokens=dead_after_tokens)
    return sae.from_parameters(config, sae.parameters(), sae.scale, sae.target_scale)


def _trained(recorder: Recorder) -> SAE:
    """The SAE of a run that was kept in memory, on one device."""
    state = recorder.state
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    parameters = {name: jax.device_put(x, device) for name, x in state.parameters.items()}
    scales = [
        jax.device_put(x, device) if x.ndim else float(x) for x in (state.scale, state.target_scale)
    ]
    return architecture(recorder.config.sae).from_parameters(
        recorder.config.sae, parameters, *scales
    )
