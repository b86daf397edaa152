"""Makes edits of a language model's activations, by an SAE's latents or by steering.

    logits, _ = model.forward(tokens, edits={
        "resid_post.6": lm.clamp(sae, latent=1234, activation=5 * maximum)})

An edit is a function from a site's activations (B, T, width) to their replacement. Those made here
are pytrees: `jax.jit` takes them as arguments, so that one compiled program serves all latents and
strengths. An SAE's edits compute in float32, and are for the site that it was trained on. The SAE
must be an autoencoder.

An edit that `reading` makes is given activations of other sites too. In `lm.generate` an edit sees
the prompt at once and then every new token alone (B, 1, width), so it must treat each position by
itself.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
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


def reconstruct(
    sae, change: Callable[[jax.Array], jax.Array] | None = None, with_error: bool = False
) -> Edit:
    """Returns an edit that replaces activations by an SAE's reconstruction of them.

    Raises UserError if the SAE is not an autoencoder.

    Args:
      sae: the SAE.
      change: a function from the latents (B, T, d_sae) to those that are decoded; by default they
        are not changed.
      with_error: whether the SAE's error is added back, so that only the change has an effect.
    """
    _check(sae)
    edit = _change_latents if with_error else _reconstruct
    return Partial(edit, sae, as_pytree(change or _unchanged))


def clamp(sae, latent: int, activation: float) -> Edit:
    """Returns an edit that sets one latent to a fixed activation at every position.

    The SAE's error is kept, as in Scaling Monosemanticity (Templeton et al. 2024, "Methodological
    details" of steering), where the activation is a multiple of the latent's maximum.

    Raises UserError if the SAE has no such latent or is not an autoencoder.

    Args:
      sae: the SAE.
      latent: the latent's index.
      activation: the norm of what the latent adds to the reconstruction, in the model's units, of
        which `sae-jax eval` writes the maximum as max_activation. 0 removes the latent.
    """
    _check(sae)
    if not 0 <= latent < sae.config.d_sae:
        raise UserError(f"no latent {latent}: the SAE has latents 0 to {sae.config.d_sae - 1}")
    off_and_on = jnp.zeros((2, sae.config.d_sae)).at[1, latent].set(1.0)
    without, with_it = sae.decode(off_and_on)
    row_D = with_it - without
    norm = jnp.maximum(jnp.linalg.norm(row_D), jnp.finfo(jnp.float32).tiny)
    return Partial(_clamp, sae, latent, row_D, activation / norm)


def add_direction(direction: jax.Array, scale: float = 1.0) -> Edit:
    """Returns an edit that adds scale * direction (width,) at every position."""
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


def _reconstruct(sae, change, x):
    return sae.decode(change(sae.encode(x.astype(jnp.float32))))


def _change_latents(sae, change, x):
    x_BxTxD = x.astype(jnp.float32)
    latents = sae.encode(x_BxTxD)
    return sae.decode(change(latents)) + (x_BxTxD - sae.decode(latents))


def _unchanged(latents):
    return latents


def _clamp(sae, latent, row_D, value, x):
    x_BxTxD = x.astype(jnp.float32)
    return x_BxTxD + (value - sae.encode(x_BxTxD)[..., latent, None]) * row_D


def _add(direction, x):
    return x + direction.astype(x.dtype)


def _put(new, x):
    return jnp.broadcast_to(new, x.shape).astype(x.dtype)


def _check(sae) -> None:
    if sae.config.kind != "autoencoder":
        raise UserError(
            f"a {sae.config.kind} does not reconstruct the site that it reads; edit with an "
            "autoencoder"
        )
