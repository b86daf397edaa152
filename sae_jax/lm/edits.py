"""Edits for `forward(edits={site: edit})`: what an SAE's latents do to a model, and steering.

    logits, _ = lm.forward(params, tokens, config, edits={
        "resid_post.6": lm.clamp(sae, latent=1234, activation=5 * maximum)})

An edit maps a site's activations (B, T, width) to their replacement. An SAE's edits compute in
float32 and change the activations of the site that it was trained on: an autoencoder's.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sae_jax.errors import UserError

Edit = Callable[[jax.Array], jax.Array]


def reconstruct(
    sae, change: Callable[[jax.Array], jax.Array] | None = None, with_error: bool = False
) -> Edit:
    """Replaces x by the SAE's reconstruction of it, from the latents (B, T, d_sae) as `change`
    returns them. with_error: plus what the SAE misses of x, so that only the change matters."""
    _check(sae)

    def edit(x):
        x_BxTxD = x.astype(jnp.float32)
        latents = sae.encode(x_BxTxD)
        new = sae.decode(latents if change is None else change(latents))
        return new + (x_BxTxD - sae.decode(latents)) if with_error else new

    return edit


def clamp(sae, latent: int, activation: float) -> Edit:
    """Sets one latent to a fixed activation at every position and keeps the SAE's error, as in
    Scaling Monosemanticity (Templeton et al. 2024, "Methodological details" of steering), where it
    is a multiple of the latent's maximum.

    activation: the length of what the latent adds to the reconstruction, in the model's units: what
    `sae-jax eval` writes as max_activation. 0 takes the latent out. UserError for a latent that the
    SAE does not have."""
    _check(sae)
    if not 0 <= latent < sae.config.d_sae:
        raise UserError(f"no latent {latent}: the SAE has latents 0 to {sae.config.d_sae - 1}")

    def edit(x):
        x_BxTxD = x.astype(jnp.float32)
        row_D = sae.w_dec[...][latent] / sae.target_scale
        norm = jnp.maximum(jnp.linalg.norm(row_D), jnp.finfo(jnp.float32).tiny)
        now_BxTx1 = sae.encode(x_BxTxD)[..., latent, None]
        return x_BxTxD + (activation / norm - now_BxTx1) * row_D

    return edit


def add_direction(direction: jax.Array, scale: float = 1.0) -> Edit:
    """Adds scale * direction (width,) at every position."""
    return lambda x: x + (scale * jnp.asarray(direction, jnp.float32)).astype(x.dtype)


def at(positions: jax.Array, edit: Edit) -> Edit:
    """`edit` where positions (B, T) are true, the activations as they are elsewhere."""
    return lambda x: jnp.where(positions[..., None], edit(x).astype(x.dtype), x)


def _check(sae) -> None:
    if sae.config.kind != "autoencoder":
        raise UserError(
            f"a {sae.config.kind} does not reconstruct the site that it reads; edit with an "
            "autoencoder"
        )
