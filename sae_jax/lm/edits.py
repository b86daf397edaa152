"""Makes edits of a language model's activations.

    logits, _ = model.forward(tokens, edits={"resid_post.6": lm.add_direction(direction, 5.0)})

An edit is a function from a site's activations (B, T, width) to their replacement. Those made here
are pytrees: `jax.jit` takes them as arguments, so that one compiled program serves all directions
and strengths. Those of an SAE's latents are in `latent_edits`.

An edit that `reading` makes is given activations of other sites too. In `lm.generate` an edit sees
the prompt at once and then every new token alone (B, 1, width), so it must treat each position by
itself.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from sae_jax.errors import UserError

Edit = Callable[[jax.Array], jax.Array]
"""A function from a site's activations (B, T, width) to their replacement, of the same shape."""

POSITIONS, TOKENS = INPUTS = ("positions", "tokens")
"""What an edit can read beside sites: each token's position in its context, and its id."""


class ReadingEdit(abc.ABC):
    """An edit that is called edit(x, {site: activations}) with the activations that it reads.

    Attributes:
      sites: the names of what it reads.
    """

    sites: tuple[str, ...]

    @abc.abstractmethod
    def __call__(self, x: jax.Array, read: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the replacement of x (B, T, width), given all of `sites`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Reading(ReadingEdit):
    edit: Partial
    sites: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def __call__(self, x, read):
        return self.edit(x, {site: read[site] for site in self.sites})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class At(ReadingEdit):
    """An edit at some positions only, which `at` makes.

    Attributes:
      positions: a mask (B, T), or a function from positions to one.
      edit: what is applied there.
    """

    positions: jax.Array | Partial
    edit: Partial | ReadingEdit

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of what the edit reads, and positions where a function asks for them."""
        own = (POSITIONS,) if callable(self.positions) else ()
        return (*own, *sites_read(self.edit))

    def __call__(self, x, read):
        where = self.positions
        if callable(where):
            where = where(read[POSITIONS])
        return jnp.where(where[..., None], apply(self.edit, x, read).astype(x.dtype), x)


def add_direction(direction: jax.Array, scale: float = 1.0) -> Edit:
    """Returns an edit that adds scale * direction, (width,) or for each position (B, T, width)."""
    return Partial(_add, scale * jnp.asarray(direction, jnp.float32))


def put(new: jax.Array) -> Edit:
    """Returns an edit that replaces activations by `new`, which is (B, T, width) or a scalar."""
    return Partial(_put, new)


def at(positions, edit: Edit | ReadingEdit) -> ReadingEdit:
    """Returns an edit that applies `edit` only where positions are true.

    Activations elsewhere are left as they are. In `lm.generate` a mask speaks of the prompts alone,
    and what comes after them is not edited; a function speaks of every position, before and after.

    Args:
      positions: a mask (B, T), or a function from positions in the context, integers (B, T) that
        count from 0, to one: lambda position: position > 0 leaves out BOS.
      edit: the edit.
    """
    return At(Partial(positions) if callable(positions) else positions, as_pytree(edit))


def unless(tokens: Sequence[int], edit: Edit | ReadingEdit) -> ReadingEdit:
    """Returns an edit that applies `edit` except at some tokens, such as BOS.

    Args:
      tokens: the ids of the tokens whose activations are left as they are.
      edit: the edit. A mask within it (`at`) does not work in `lm.generate`; put it around.
    """
    ids = jnp.asarray(np.asarray(tokens, np.int32))
    reads = dict.fromkeys((TOKENS, *sites_read(edit)))
    return reading(tuple(reads), Partial(_unless, ids, as_pytree(edit)))


def same_norm(edit: Edit | ReadingEdit) -> Edit | ReadingEdit:
    """Returns `edit` with its result scaled to the norm that the activations had before.

    So a strong edit turns activations and does not make them longer. A mask (`at`) goes around it.
    """
    edit = as_pytree(edit)
    if isinstance(edit, ReadingEdit):
        return reading(edit.sites, Partial(_same_norm_reading, edit))
    return Partial(_same_norm, edit)


def reading(
    sites: str | Sequence[str], edit: Callable[[jax.Array, dict[str, jax.Array]], jax.Array]
) -> ReadingEdit:
    """Returns an edit that reads other sites, such as a transcoder's input.

    It is called edit(x, {site: activations}) with what the model went on with at these sites: where
    one is edited too, the replacement. They must come before the edited site in the forward pass,
    in the order of `lm.SITES` within a layer.

    Raises UserError for no site and for an edit that `at` or `reading` made.

    Args:
      sites: names of sites. The names positions and tokens stand for each token's position in its
        context and its id, integers (B, T), or (1, T) where all rows have the same.
      edit: a function from the edited site's activations and what is read to the replacement.
    """
    sites = (sites,) if isinstance(sites, str) else tuple(sites)
    if not sites:
        raise UserError("reading() names no site; an edit that reads none needs no reading()")
    if isinstance(edit, ReadingEdit):
        raise UserError(
            "reading() takes a function edit(x, read); put lm.at around lm.reading, not within"
        )
    return _Reading(as_pytree(edit), sites)


def apply(edit: Edit | ReadingEdit, x: jax.Array, read: Mapping[str, jax.Array]) -> jax.Array:
    """Returns what an edit makes of x (B, T, width).

    read: what it may read, by name; all of its `sites_read` at least.
    """
    return edit(x, read) if isinstance(edit, ReadingEdit) else edit(x)


def sites_read(edit: Edit | ReadingEdit) -> tuple[str, ...]:
    """Returns the names of what an edit reads beside the site that it edits."""
    return edit.sites if isinstance(edit, ReadingEdit) else ()


def as_pytree(edit: Edit | ReadingEdit) -> Partial | ReadingEdit:
    """Returns an edit as a pytree whose leaves are arrays, for `jax.jit`."""
    return edit if isinstance(edit, (Partial, ReadingEdit)) else Partial(edit)


def _add(direction, x):
    return x + direction.astype(x.dtype)


def _put(new, x):
    return jnp.broadcast_to(new, x.shape).astype(x.dtype)


def _unless(ids_S, edit, x, read):
    where = ~jnp.any(read[TOKENS][..., None] == ids_S, axis=-1)
    return jnp.where(where[..., None], apply(edit, x, read).astype(x.dtype), x)


def _same_norm(edit, x):
    return _as_long(edit(x), x)


def _same_norm_reading(edit, x, read):
    return _as_long(edit(x, read), x)


def _as_long(new, x):
    """Returns `new` with the norm of x at each position; what is as it was stays so to the bit."""
    old, new = x.astype(jnp.float32), new.astype(jnp.float32)
    before, after = (jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (old, new))
    return new * (before / jnp.maximum(after, jnp.finfo(jnp.float32).tiny))
