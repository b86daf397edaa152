"""What is decided before the first step: the whole config, how many steps, the normalisation."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from sae_jax import sae as saes
from sae_jax.activations import Stream, WorldStream
from sae_jax.activations.statistics import finite_rows
from sae_jax.config import Config
from sae_jax.errors import UserError, choose
from sae_jax.sae import SAEConfig
from sae_jax.train import optimizer
from sae_jax.train.median import geometric_median
from sae_jax.train.schedule_steps import count_steps, dead_after_tokens

_MOST = 2**31  # of what is counted in int32
_MOST_SEEDS = 2**32  # those that JAX tells from each other
_NO_VARIANCE = 1e-10  # of the mean squared norm: what rounding leaves of none in 10^9 rows
_TRAVEL = 4.0  # of a parameter in a run with target_l0, at least: its steps times their length
_MOST_TURN = 0.1  # radians a step
_MEDIAN_ROWS = 32_768  # sample for the geometric median (Gao et al. 2024, A.1)


def resolve(config: Config, stream: Stream | WorldStream) -> Config:
    """Returns `config` with everything filled in that the data and the architecture decide.

    Raises UserError, naming the field, for what can be known to be wrong without devices.
    """
    optimizer.check(config.optimizer)
    names, widths, target = stream.site_names, stream.site_widths, None
    data = dataclasses.replace(config.data, site=",".join(names))
    if config.data.target_site:
        *inputs, target_name = names
        data = dataclasses.replace(data, site=",".join(inputs), target_site=target_name)
        *widths, target = widths
    sae = saes.resolve(config.sae, tuple(widths), target)
    sae = dataclasses.replace(sae, dead_after_tokens=dead_after_tokens(config))
    adam = config.optimizer
    if adam.learning_rate is None:
        adam = dataclasses.replace(adam, learning_rate=_learning_rate(config, sae))
    choose(config.train.on_nonfinite, ("stop", "skip"), "train.on_nonfinite")
    for name in ("tokens", "log_every", "checkpoint_every", "keep_checkpoints"):
        if getattr(config.train, name) < 1:
            raise UserError(f"train.{name} must be 1 or more, not {getattr(config.train, name)}")
    _check_sizes(config)
    return dataclasses.replace(config, sae=sae, data=data, optimizer=adam)


def _learning_rate(config: Config, sae: SAEConfig) -> float:
    """Returns the default peak learning rate of a run with the resolved section `sae`.

    It is the architecture's, which is that of long runs. A step of Adam moves a weight by the
    learning rate at most, whatever the penalty's coefficient. So a shorter run whose coefficient
    is moved to reach an L0 gets a larger rate: large enough for biases and thresholds to go from
    half the latents firing to a few, which is some standard deviations, and small enough that a
    step turns a row of the encoder (of norm 1) by no more than `_MOST_TURN`.
    """
    rate = saes.architecture(sae).learning_rate(sae.d_sae)
    if not sae.adapts_to_target_l0:
        return rate
    steps = max(1, count_steps(config))
    return max(rate, min(_TRAVEL / steps, _MOST_TURN / math.sqrt(sae.d_in)))


def _check_sizes(config: Config) -> None:
    """Raises UserError for numbers that the types in the compiled step do not hold."""
    if not 0 <= config.train.seed < _MOST_SEEDS:
        raise UserError(
            f"train.seed must be from 0 to {_MOST_SEEDS - 1:,}, not {config.train.seed}"
        )
    if config.sae.d_sae >= _MOST:
        raise UserError(f"sae.d_sae must be below 2^31, not {config.sae.d_sae}")
    picked = max(config.sae.k or 0, config.sae.k_start or 0) * config.data.batch_size
    if picked >= _MOST:
        raise UserError(
            f"sae.k times data.batch_size must be below 2^31, not {picked:,}; lower one of them"
        )
    steps = count_steps(config)
    if steps >= _MOST:
        raise UserError(
            f"train.tokens {config.train.tokens} are {steps} steps of data.batch_size "
            f"{config.data.batch_size}; a run has fewer than 2^31: lower train.tokens"
        )


def checked_steps(config: Config, stream: Stream | WorldStream) -> int:
    """Returns the number of the run's steps. Raises UserError if the data have fewer batches."""
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


def heldout_stream(config: Config, mesh, open_stream: Callable) -> Stream | WorldStream | None:
    """Returns the stream of held-out rows, or None where the config holds out nothing.

    Its batches have the training's size, or are as large as the rows allow. Raises UserError if too
    few rows are held out.
    """
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


def check_variances(config: Config, stream: Stream | WorldStream) -> None:
    """Raises UserError, which names the site, if all rows of a site are the same.

    Such a site has nothing to learn from. Its scale, or its FVU, would be infinite.
    """
    norms, variances = _norms_and_variances(stream)
    for name, norm, variance in zip(stream.site_names, norms, variances, strict=True):
        if not variance > _NO_VARIANCE * norm:
            what = "the same" if norm > 0 else "zero"
            raise UserError(
                f"all rows of the site {name} of {config.data.store} are {what}, so that there is "
                "nothing to learn from it; harvest it again, or name another data.site"
            )


def _norms_and_variances(stream: Stream | WorldStream) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean squared norm of each site, and its variance summed over its width."""
    norms = np.asarray(stream.site_mean_squared_norms)
    ends = np.cumsum(stream.site_widths)[:-1]
    means = np.array([np.sum(np.square(mean)) for mean in np.split(stream.mean, ends)])
    return norms, norms - means


def normalisation(config: Config, stream: Stream | WorldStream) -> tuple:
    """Returns (scale, target_scale, variance), from the data's statistics.

    scale and target_scale are what inputs and targets are multiplied by: numbers, or for a
    crosscoder arrays (d_in,), since each of its sites has its own. variance is that of the targets
    after the multiplication, summed over d_out.
    """
    norms, unscaled = _norms_and_variances(stream)
    widths = np.asarray(stream.site_widths)
    wanted = {"sqrt_d": widths, "unit": np.ones(len(widths)), "none": norms}
    scales = np.sqrt(wanted[config.sae.normalize] / norms)
    variances = scales**2 * unscaled
    if config.sae.kind == "crosscoder":
        columns = np.repeat(scales, widths).astype(np.float32)
        return columns, columns, float(variances.sum())
    return float(scales[0]), float(scales[-1]), float(variances[-1])


def initial_b_dec(config: Config, stream: Stream | WorldStream) -> np.ndarray:
    """Returns the b_dec (d_out,) that a fresh SAE begins with, in the units of the data.

    With b_dec_init=geometric_median it is that of a sample of 32,768 rows.
    """
    targets = slice(stream.width - config.sae.d_out, None)
    if config.sae.b_dec_init == "zero":
        return np.zeros(config.sae.d_out, np.float32)
    if config.sae.b_dec_init == "mean":
        return stream.mean[targets].astype(np.float32)
    rows: list[np.ndarray] = []
    for step, batch in enumerate(stream.batches(prefetch=0)):
        if not finite_rows(batch).all():
            stream.check_step(step)
        rows.extend(batch[:, targets].astype(np.float32))
        if len(rows) >= _MEDIAN_ROWS:
            break
    return geometric_median(np.stack(rows[:_MEDIAN_ROWS]))
