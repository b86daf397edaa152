"""Makes edits of a language model's activations, by an SAE's latents or by steering.

    logits, _ = model.forward(tokens, edits={
        "resid_post.6": lm.clamp(sae, latent=1234, activation=5 * maximum)})

An edit is a function from a site's activations (B, T, width) to their replacement. Those made here
are pytrees: `jax.jit` takes them as arguments, so that one compiled program serves all latents and
strengths. An SAE's edits compute in float32, and are for the site that it was trained on. The SAE
must be an autoencoder.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from sae_jax.errors import UserError

Edit = Callable[[jax.Array], jax.Array]
"""A function from a site's activations (B, T, width) to their replacement, of the same shape."""


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


def at(positions: jax.Array, edit: Edit) -> Edit:
    """Returns an edit that applies `edit` only where positions (B, T) are true.

    Activations elsewhere are left as they are.
    """
    return Partial(_at, positions, as_pytree(edit))


def as_pytree(edit: Edit) -> Partial:
    """Returns an edit as a pytree whose leaves are arrays, for `jax.jit`."""
    return edit if isinstance(edit, Partial) else Partial(edit)


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


def _at(positions, edit, x):
    return jnp.where(positions[..., None], edit(x).astype(x.dtype), x)


def _check(sae) -> None:
    if sae.config.kind != "autoencoder":
        raise UserError(
            f"a {sae.config.kind} does not reconstruct the site that it reads; edit with an "
            "autoencoder"
        )
