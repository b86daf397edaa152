"""Continues rows of tokens with our decoder: one pass over the prompts, then a token at a time.

The loop over tokens runs on the device, and the host waits once, at its end. What is compiled
depends on rounded lengths only, so that prompts of similar length share a program.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax.lm.architecture import DecoderConfig
from sae_jax.lm.cache import Cache, empty_cache
from sae_jax.lm.decoder import extend
from sae_jax.lm.sampling import Rules, next_tokens

_SHORTEST = 16  # tokens that lengths are rounded up to, and by: programs are few, padding is little


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Holds a batch while it grows.

    Attributes:
      cache: of all tokens but the last.
      tokens: (B, room), the new tokens.
      lengths: (B,), how many of them each row has.
      limits: (B,), how many it may have.
      ended: (B,), whether it has its last.
      step: how many the longest has, a scalar.
    """

    cache: Cache
    tokens: jax.Array
    lengths: jax.Array
    limits: jax.Array
    ended: jax.Array
    step: jax.Array


def continuations(
    params,
    config: DecoderConfig,
    mesh: jax.sharding.Mesh | None,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[int],
    rules: Rules,
    prompt_edits: Callable[[tuple[int, int]], Mapping],
    new_edits: Mapping,
    on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> list[np.ndarray]:
    """Returns the new tokens of each prompt.

    Args:
      params: the decoder's parameters.
      config: the decoder's config.
      mesh: the mesh, which is the ambient one. None: one device.
      prompts: ids, of different lengths. On a mesh there may be any number.
      samples: the number of each prompt's sample, which its random numbers depend on.
      rules: how texts go on and where they stop.
      prompt_edits: gives the edits of the prompts, whose shape (B, T) after padding it is told.
      new_edits: the edits of the tokens that follow.
      on_tokens: is called after every step with the rows that have a new token, and these. The
        host then waits for each step.
    """
    room = _rounded(rules.max_new_tokens)
    width = _rounded(max(len(prompt) for prompt in prompts))
    share = 1 if mesh is None else mesh.shape["data"]
    rows = -(-len(prompts) // share) * share
    tokens = np.zeros((rows, width), np.int32)
    first, limits = np.full(rows, width - 1, np.int32), np.zeros(rows, np.int32)
    numbers = np.zeros(rows, np.int32)
    for row, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        first[row], numbers[row] = width - len(prompt), sample
        tokens[row, first[row] :] = prompt
        limits[row] = min(rules.max_new_tokens, config.max_context - len(prompt))
    tokens, first, limits, numbers = (
        x if mesh is None else jax.device_put(x, NamedSharding(mesh, P("data")))
        for x in (tokens, first, limits, numbers)
    )
    edits = prompt_edits((rows, width))
    eos = np.full(_rounded(len(rules.eos)), -1, np.int32)
    eos[: len(rules.eos)] = rules.eos
    drawing = (numbers, eos, *rules.numbers())
    kind = rules.kind()
    state = _begin(params, tokens, first, limits, edits, drawing, config, width + room, kind)
    if on_tokens is None:
        state = _go_on(params, state, new_edits, drawing, room, config, kind)
    else:
        for step in range(1, room + 1):
            new, lengths = np.asarray(state.tokens[:, step - 1]), np.asarray(state.lengths)
            grown = np.flatnonzero(lengths[: len(prompts)] == step)
            on_tokens(grown, new[grown])
            if np.asarray(state.ended).all():
                break
            state = _go_on(params, state, new_edits, drawing, step + 1, config, kind)
    new, lengths = jax.device_get((state.tokens, state.lengths))
    return [row[:length] for row, length in zip(new, lengths, strict=True)][: len(prompts)]


@functools.partial(jax.jit, static_argnames=("config", "slots", "kind"))
def _begin(params, tokens, first, limits, edits, drawing, config, slots: int, kind) -> _State:
    """Runs the prompts, which are padded at the left, and chooses the first new tokens."""
    cache = empty_cache(params, config, first, slots)
    logits, cache = extend(params, tokens, config, cache, edits)
    shape = (len(tokens), slots - tokens.shape[1])
    state = _State(
        cache,
        tokens=jnp.broadcast_to(jnp.zeros_like(limits)[:, None], shape),
        lengths=jnp.zeros_like(limits),
        limits=limits,
        ended=limits == 0,
        step=jnp.int32(0),
    )
    return _with_next(state, logits, cache, drawing, kind)


@functools.partial(jax.jit, static_argnames=("config", "kind"), donate_argnames="state")
def _go_on(params, state: _State, edits, drawing, until, config, kind) -> _State:
    """Adds tokens until there are `until`, or every row has ended."""

    def grow(state):
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        logits, cache = extend(params, last, config, state.cache, edits)
        return _with_next(state, logits, cache, drawing, kind)

    def grows(state):
        return (state.step < until) & ~jnp.all(state.ended)

    return jax.lax.while_loop(grows, grow, state)


def _with_next(state: _State, logits, cache: Cache, drawing, kind) -> _State:
    numbers, eos, *settings = drawing
    new = next_tokens(logits, numbers, state.step, *settings, *kind)
    lengths = jnp.where(state.ended, state.lengths, state.step + 1)
    is_eos = jnp.any(new[:, None] == eos[None], axis=-1)
    return dataclasses.replace(
        state,
        cache=cache,
        tokens=jax.lax.dynamic_update_slice(state.tokens, new[:, None], (0, state.step)),
        lengths=lengths,
        ended=state.ended | is_eos | (lengths >= state.limits),
        step=state.step + 1,
    )


def _rounded(length: int) -> int:
    """Returns a length rounded up, by a quarter of itself at most where it is long."""
    by = max(_SHORTEST, (1 << length.bit_length()) // 8)
    return max(-(-length // by), 1) * by
