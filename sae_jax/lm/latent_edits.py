"""Makes edits by the latents of an SAE: its reconstruction, and latents that are set or added to.

    logits, _ = model.forward(tokens, edits={
        "resid_post.6": lm.clamp(sae, latent=1234, activation=5 * maximum)})

They compute in float32, and are for the sites that the SAE was trained on. An autoencoder reads the
site that it writes. `latent_edits` makes edits of any SAE's latents: a transcoder reads one site
and writes another, and a crosscoder reads and writes several.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from sae_jax.errors import UserError
from sae_jax.lm.edits import Edit, as_pytree, put, reading

_ROUNDING = 1e-6  # of a latent's value


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


def clamp(sae, latent: int | Sequence[int], activation) -> Edit:
    """Returns an edit that sets one latent, or several at once, to fixed activations.

    The SAE's error is kept, as in Scaling Monosemanticity (Templeton et al. 2024, "Methodological
    details" of steering), where the activation is a multiple of the latent's maximum. Where a
    latent has that activation already, but for rounding, no bit changes.

    Raises UserError if the SAE has no such latent or is not an autoencoder (`latent_edits` is for
    all kinds).

    Args:
      sae: the SAE.
      latent: the latent's index, or the indices of several.
      activation: the norm of what the latent adds to the reconstruction, in the model's units, of
        which `sae-jax eval` writes the maximum as max_activation. 0 removes the latent. It is a
        number, or an array (B, T) of one for each position; for several latents they are along a
        last axis, (L,) or (B, T, L), or one number for all.
    """
    _check(sae)
    return Partial(_clamp, sae, *_told(sae, latent, activation))


def latent_edits(
    sae,
    sites: Sequence[str],
    latent: int | Sequence[int],
    activation,
    *,
    add: bool = False,
    clean: Mapping[str, jax.Array] | None = None,
) -> dict[str, Edit]:
    """Returns the edits, by site, that set latents of an SAE of any kind.

    Of an autoencoder it is the site's `clamp`. A transcoder's target y becomes
    y + (activation - latent(x)) * row, where x is what its input site holds in the same run of the
    model.

    A crosscoder's latents need all of its sites, before the first of them is written. They are
    therefore those of `clean`, a run of the untouched model on the same tokens, and each site
    becomes clean + (activation - latent(clean)) * (the row's part at the site). So a site holds
    what the crosscoder says that it holds with this latent: what an edit of an earlier site has
    changed in it is replaced, and not counted twice.

    Raises UserError if the SAE has no such latent, if the number of sites is not the SAE's, and for
    a crosscoder without `clean`.

    Args:
      sae: the SAE.
      sites: the SAE's sites, a transcoder's target last.
      latent: the latent's index, or the indices of several.
      activation: as for `clamp`.
      add: whether the activations are added, whatever the latents are, and what is there stays.
      clean: the activations (B, T, width) of a crosscoder's sites in the untouched model.
    """
    kind = sae.config.kind
    expected = {"autoencoder": 1, "crosscoder": len(sae.config.site_widths or ())}.get(kind, 2)
    if len(sites) != expected:
        raise UserError(
            f"this {kind} has {expected} sites, a transcoder's target last, not {len(sites)}: "
            f"{', '.join(sites)}"
        )
    told = _told(sae, latent, activation)
    if kind == "crosscoder":
        if clean is None:
            raise UserError(
                "a crosscoder's latents need all its sites before the first is written; give the "
                "untouched model's activations of the same tokens: clean={site: (B, T, width)}"
            )
        x = jnp.concatenate([jnp.asarray(clean[site], jnp.float32) for site in sites], axis=-1)
        new = (_add_rows if add else _clamp)(sae, *told, x)
        ends = list(itertools.accumulate(sae.config.site_widths))[:-1]
        parts = jnp.split(new, ends, axis=-1)
        return {site: put(part) for site, part in zip(sites, parts, strict=True)}
    if add:
        return {sites[-1]: Partial(_add_rows, sae, *told)}
    if kind == "autoencoder":
        return {sites[0]: Partial(_clamp, sae, *told)}
    return {sites[1]: reading(sites[:1], Partial(_clamp_target, sae, *told))}


def _reconstruct(sae, change, x):
    return sae.decode(change(sae.encode(x.astype(jnp.float32))))


def _change_latents(sae, change, x):
    x_BxTxD = x.astype(jnp.float32)
    latents = sae.encode(x_BxTxD)
    return sae.decode(change(latents)) + (x_BxTxD - sae.decode(latents))


def _unchanged(latents):
    return latents


def _told(sae, latents, activations) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the latents' indices (L,), their rows (L, d_out) and values (..., L) as they are to
    be, in the SAE's units."""
    values = jnp.asarray(activations, jnp.float32)
    if np.ndim(latents) == 0:
        latents, values = [latents], values[..., None]
    for latent in latents:
        if not 0 <= latent < sae.config.d_sae:
            raise UserError(f"no latent {latent}: the SAE has latents 0 to {sae.config.d_sae - 1}")
    if len(set(latents)) < len(latents):
        raise UserError(f"a latent is named twice: {', '.join(map(str, latents))}")
    rows_LxD = sae.direction(np.asarray(latents))
    norms_L = jnp.linalg.norm(rows_LxD, axis=-1)
    tiny = jnp.finfo(jnp.float32).tiny
    values = values / jnp.maximum(norms_L, tiny).reshape(*[1] * (values.ndim - 1), -1)
    return jnp.asarray(latents), rows_LxD, values


def _clamp(sae, latents_L, rows_LxD, values, x):
    return _with_values(sae, latents_L, rows_LxD, values, x, x)


def _clamp_target(sae, latents_L, rows_LxD, values, y, read):
    (x,) = read.values()
    return _with_values(sae, latents_L, rows_LxD, values, y, x)


def _with_values(sae, latents_L, rows_LxD, values, y, x):
    """Returns y with the latents of x at `values`, in float32."""
    present = sae.encode(x.astype(jnp.float32))[..., latents_L]
    # An activation is a length, divided by the row's norm: what comes back as the present value but
    # for rounding is that value. Nothing then changes, not even in the last bit.
    same = jnp.abs(values - present) <= _ROUNDING * jnp.abs(present)
    return _plus(y.astype(jnp.float32), jnp.where(same, 0.0, values - present), rows_LxD)


def _add_rows(sae, latents_L, rows_LxD, values, x):
    del sae, latents_L
    x = x.astype(jnp.float32)
    return _plus(x, jnp.broadcast_to(values, (*x.shape[:-1], len(rows_LxD))), rows_LxD)


def _plus(x, values, rows_LxD):
    """Returns x plus each value times its row. A loop: a product would not be exact on a TPU."""
    for i in range(len(rows_LxD)):
        x = x + values[..., i, None] * rows_LxD[i]
    return x


def _check(sae) -> None:
    if sae.config.kind != "autoencoder":
        raise UserError(
            f"a {sae.config.kind} does not reconstruct the site that it reads; edit with an "
            "autoencoder"
        )
