"""Chooses the next token from a model's logits: the likeliest, or a random one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Rules:
    """Says how texts go on and where they stop.

    Attributes:
      max_new_tokens: the most tokens that follow a prompt.
      temperature: what logits are divided by; 0: the likeliest token is taken.
      top_p: tokens are drawn from the likeliest that have this probability together.
      seed: of the random numbers.
      eos: the ids after which a text stops.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    eos: tuple[int, ...]

    def next_tokens(self, logits, samples, step):
        """Returns a token for each row, (B,) of int32, on the logits' devices.

        Args:
          logits: float32 (B, vocab).
          samples: (B,) integers, the numbers of the texts that follow the same prompt.
          step: how many new tokens there are already.
        """
        return next_tokens(logits, samples, step, *self.numbers(), *self.kind())

    def numbers(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns what `next_tokens` takes as arrays: the key, the temperature and top_p."""
        return jax.random.key(self.seed), jnp.float32(self.temperature), jnp.float32(self.top_p)

    def kind(self) -> tuple[bool, bool]:
        """Returns whether tokens are drawn, and whether from the likeliest only."""
        return self.temperature > 0, self.top_p < 1


@functools.partial(jax.jit, static_argnames=("drawn", "nucleus"))
def next_tokens(logits, samples, step, key, temperature, top_p, drawn: bool, nucleus: bool):
    """Returns the next token of each row, (B,) of int32.

    The random numbers of a row depend on the key, its sample's number and the step alone, so a
    text does not depend on the other rows. On a mesh each device chooses for its own rows.

    Args:
      logits: float32 (B, vocab).
      samples: (B,) integers.
      step: a scalar integer.
      key: a key of `jax.random`.
      temperature: what logits are divided by.
      top_p: as in `likeliest`.
      drawn: whether tokens are drawn at random; without, the likeliest are taken.
      nucleus: whether they are drawn from the likeliest only.
    """
    run = functools.partial(_next_tokens, drawn=drawn, nucleus=nucleus)
    operands = (logits, samples, step, key, temperature, top_p)
    mesh = jax.typeof(logits).sharding.mesh
    if mesh.empty:
        return run(*operands)
    rows = P(jax.typeof(logits).sharding.spec[0])
    whole = jax.reshard(logits, NamedSharding(mesh, P(*rows, None)))
    specs = (P(*rows, None), rows, P(), P(), P(), P())
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=rows)(whole, *operands[1:])


def likeliest(logits, top_p):
    """Returns which tokens are the likeliest that have the probability top_p together.

    A token is among them if those that are more probable have less than top_p together; all of the
    same probability are, or none (Holtzman et al. 2020, arXiv:1904.09751).

    Args:
      logits: float32 (B, vocab).
      top_p: a scalar from 0 to 1.
    """
    # Bits of floats that are not negative sort as the floats do. So the smallest probability that
    # is kept is found by halving, in 31 sums, where a sort of 250,000 tokens takes longer.
    probability = jax.nn.softmax(logits, axis=-1)
    bits = jax.lax.bitcast_convert_type(probability, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # a token of bits `high` or more is kept; one of less than `low` is not
        middle = low + (high - low) // 2
        above = jnp.sum(probability, axis=-1, where=bits > middle[:, None])
        kept = above < top_p
        return jnp.where(kept, low, middle + 1), jnp.where(kept, middle, high)

    high = jnp.max(bits, axis=-1)
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
    return bits >= low[:, None]


def _next_tokens(logits, samples, step, key, temperature, top_p, *, drawn: bool, nucleus: bool):
    if not drawn:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if nucleus:
        logits = jnp.where(likeliest(logits, top_p), logits, -jnp.inf)

    def draw(row, sample):
        own = jax.random.fold_in(jax.random.fold_in(key, sample), step)
        return jax.random.categorical(own, row)

    return jax.vmap(draw)(logits, samples).astype(jnp.int32)
