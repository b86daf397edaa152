"""Resamples dead latents by the inputs that the SAE does worst on.

The method is that of Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron resampling".
It is done every `resample_every_tokens` tokens, `resample_times` in all. Each dead latent gets an
input, which is picked with a probability proportional to the square of its loss:

- The latent's decoder row points to the input, with the mean norm of living latents' rows.
- Its encoder column points to the input too, with 0.2 of the mean norm of living latents' columns.
- Its other parameters are those of a new latent.
- The optimiser's moments of all of these are 0.

The encoder's inputs are scaled and centred as its product takes them. The decoder's are scaled, and
without b_dec. Inputs are picked without repetition from the batches that follow in the stream, from
8 rows for each latent of the dictionary and at most the paper's 819,200 rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from sae_jax.config import Config
from sae_jax.ops.sharding import DECODER
from sae_jax.train.mesh import BatchPlacement
from sae_jax.train.step import Trainer, TrainState

_MOST_ROWS = 819_200
_ROWS_PER_LATENT = 8
_ENCODER_NORM = 0.2  # of living latents'


def steps(config: Config) -> set[int]:
    """Returns the numbers of the steps after which dead latents are resampled."""
    every = config.sae.resample_every_tokens // config.data.batch_size
    if not config.sae.resample_every_tokens:
        return set()
    return {max(1, every) * (i + 1) for i in range(config.sae.resample_times)}


def resample(
    trainer: Trainer, state: TrainState, step: int, stream, placement: BatchPlacement
) -> TrainState:
    """Returns the state after `step` with its dead latents resampled.

    Args:
      trainer: that of the run.
      state: the state after `step`, whose memory is used again.
      step: how many steps the run has done.
      stream: the run's training data.
      placement: what places its batches on the devices.

    The result depends on the state, the data and the seed alone. So a resumed run, and a run on
    another mesh, picks the same inputs.
    """
    dead = multihost_utils.process_allgather(trainer.dead(state), tiled=True)
    count = int(np.sum(dead))
    if not count:
        return state
    config = trainer.config
    wanted = min(_MOST_ROWS, _ROWS_PER_LATENT * config.sae.d_sae)
    batches = min(-(-wanted // config.data.batch_size), stream.num_steps)
    first = min(step, stream.num_steps - batches)
    coming = map(placement.place, stream.batches(first, placement.rows))
    losses = [
        multihost_utils.process_allgather(trainer.row_losses(state, next(coming)), tiled=True)
        for _ in range(batches)
    ]
    rows = np.concatenate([stream.batch_rows(first + i) for i in range(batches)])
    picked = rows[_pick(np.concatenate(losses), count, seed=[config.train.seed, step])]
    latents = np.flatnonzero(dead)

    def inputs_of(index) -> np.ndarray:
        """Returns the picked rows of one shard of the dictionary, zeros for living latents."""
        start, stop, _ = index[0].indices(len(dead))
        in_shard = (latents >= start) & (latents < stop)
        out = np.zeros((stop - start, stream.width), np.float32)
        if in_shard.any():
            out[latents[in_shard] - start] = stream.read_rows(picked[in_shard])
        return out

    shape = (len(dead), stream.width)
    sharding = NamedSharding(jax.sharding.get_mesh(), DECODER)
    inputs = jax.make_array_from_callback(shape, sharding, inputs_of)
    logging.info("step %d: resampled %d dead latents", step, count)
    return _revive(trainer, state, inputs)


def _pick(losses: np.ndarray, count: int, seed) -> np.ndarray:
    """Returns `count` indices of `losses`, drawn without replacement by the Gumbel trick.

    The probability of each is proportional to loss^2. Where there are fewer losses than `count`,
    the indices are repeated.
    """
    weights = 2 * np.log(np.maximum(losses.astype(np.float64), 1e-30))
    keys = weights + np.random.default_rng(seed).gumbel(size=len(weights))
    return np.resize(np.argsort(-keys, kind="stable")[:count], count)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _revive(trainer: Trainer, state: TrainState, inputs: jax.Array) -> TrainState:
    """Returns the state with dead latents replaced.

    `inputs` (d_sae, width) has the input of each dead latent, in the units of the data.
    """
    config = trainer.config.sae
    sae, x, y = trainer.scaled(state, inputs)
    parameters = sae.parameters()
    dead = trainer.dead(state)
    if config.apply_b_dec_to_input:
        x = x - parameters["b_dec"]
    encoder_norm = _mean(jnp.linalg.norm(parameters["w_enc"], axis=0), ~dead)
    decoder_norm = _mean(jnp.linalg.norm(parameters["w_dec"], axis=1), ~dead)
    rows = {
        "w_enc": (_unit(x) * _ENCODER_NORM * encoder_norm).T,
        "w_dec": _unit(y - parameters["b_dec"]) * decoder_norm,
    }
    new_latent = {n: v for n, v in sae.fresh_latent(config).items() if n not in sae.RUNNING_MEANS}
    fresh = trainer.to_storage(rows) | new_latent
    replaced = trainer.to_storage({n: dead[:, None] if n == "w_dec" else dead for n in fresh})
    moments = dict.fromkeys(fresh, 0.0)

    def put(values, new):
        """Returns `values` with those of dead latents replaced."""
        return values | {n: jnp.where(replaced[n], new[n], values[n]) for n in new}

    def is_moments(node):
        return isinstance(node, dict) and "w_enc" in node

    optimizer = jax.tree.map(
        lambda node: put(node, moments) if is_moments(node) else node,
        state.optimizer,
        is_leaf=is_moments,
    )
    return dataclasses.replace(
        state,
        parameters=put(state.parameters, fresh),
        optimizer=optimizer,
        idle_tokens=jnp.where(dead, 0, state.idle_tokens),
    )


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    """Returns the mean of the values where `where` is true, 1 where it is true nowhere."""
    count = jnp.sum(where)
    return jnp.where(count > 0, jnp.sum(values, where=where) / jnp.maximum(count, 1), 1.0)


def _unit(x_Nxd: jax.Array) -> jax.Array:
    return x_Nxd / jnp.maximum(jnp.linalg.norm(x_Nxd, axis=1, keepdims=True), 1e-12)
