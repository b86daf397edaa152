"""Fills in the fields of an SAE's config that the widths of the activations decide."""

import dataclasses

from sae_jax.errors import UserError
from sae_jax.sae.config import TRANSCODERS, SAEConfig


def resolve(
    config: SAEConfig, d_in: int | tuple[int, ...], target_width: int | None = None
) -> SAEConfig:
    """Returns `config` with its widths filled in, and the fields that follow from them.

    Raises UserError for sites that do not fit the config's kind, and if the config has other widths
    than the activations.

    Args:
      config: the config, whose widths may be None.
      d_in: the width of the input site, or of each of a crosscoder's sites.
      target_width: the width of a transcoder's target site; None for other kinds.
    """
    sites = d_in if isinstance(d_in, tuple) else (d_in,)
    config = _with_widths(config, sites, target_width)
    derived = {name: v for name, v in config.derived().items() if getattr(config, name) is None}
    return dataclasses.replace(config, **derived)


def _with_widths(config: SAEConfig, sites: tuple[int, ...], target: int | None) -> SAEConfig:
    if config.kind == "crosscoder" and len(sites) < 2:
        raise UserError(
            "sae.kind=crosscoder needs two or more sites, but got one; name them in "
            "data.site=a,b, of a store that holds both"
        )
    if config.kind != "crosscoder" and len(sites) > 1:
        raise UserError(
            f"sae.kind={config.kind} reads one site, but got {len(sites)}; set "
            "sae.kind=crosscoder to share latents between sites"
        )
    if config.kind in TRANSCODERS and target is None:
        raise UserError(f"sae.kind={config.kind} needs data.target_site, the site that it predicts")
    if config.kind not in TRANSCODERS and target is not None:
        raise UserError(
            f"data.target_site is set, but sae.kind={config.kind} reconstructs its own input; "
            "set sae.kind=transcoder, or leave data.target_site out"
        )
    d_in = sum(sites)
    d_out = d_in if target is None else target
    widths = sites if config.kind == "crosscoder" else None
    found = {"d_in": d_in, "d_out": d_out, "site_widths": widths}
    for name, width in found.items():
        if getattr(config, name) not in (None, width):
            raise UserError(
                f"sae.{name} is {getattr(config, name)}, but the activations are {width} wide; "
                "leave it out, or choose another store or site"
            )
    return dataclasses.replace(config, **found)


def is_resolved(config: SAEConfig) -> bool:
    """Returns whether nothing is left for `resolve` to fill in."""
    if None in (config.d_in, config.d_out):
        return False
    if config.kind == "crosscoder" and config.site_widths is None:
        return False
    return all(getattr(config, name) is not None for name in config.derived())
