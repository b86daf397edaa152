"""Filling in and checking an SAE's configuration, before any device is touched."""

import dataclasses
import math
from typing import Any

from sae_jax.config import SAEConfig
from sae_jax.errors import UserError, choose
from sae_jax.sae.base import SAE

KINDS = ("autoencoder", "transcoder", "skip_transcoder", "crosscoder")
TRANSCODERS = ("transcoder", "skip_transcoder")

_EVERY_ARCHITECTURE = {
    "aux_k": lambda config: max(1, config.d_out // 2),
    "aux_coefficient": 0.0,
    "resample_every_tokens": 0,
    "resample_times": 4,
}
_SIZES = {"d_in", "d_out", "site_widths"}  # the store's
_ABOVE_ZERO = """d_sae d_in d_out k k_start aux_k decoder_init_norm bandwidth tanh_scale target_l0
p_end dead_after_tokens""".split()
_NOT_BELOW_ZERO = """sparsity_coefficient aux_coefficient preactivation_coefficient
initial_threshold resample_every_tokens resample_times""".split()
_FRACTIONS = "sparsity_warmup_fraction k_anneal_fraction p_anneal_start".split()
_UP_TO_D_SAE = "k k_start target_l0".split()


def resolve_fields(
    cls: type[SAE],
    config: SAEConfig,
    site_widths: tuple[int, ...],
    target_width: int | None = None,
) -> SAEConfig:
    """`config` with the widths and the architecture's defaults filled in, and checked.

    site_widths: of the input sites. target_width: of a transcoder's target site.

    Raises UserError for sites that do not fit the kind, widths other than the data's, a field
    that the architecture does not use, and values that contradict each other."""
    config = _with_widths(config, tuple(site_widths), target_width)
    defaults = _EVERY_ARCHITECTURE | cls.DEFAULTS
    if config.kind in TRANSCODERS and "apply_b_dec_to_input" in defaults:
        defaults["apply_b_dec_to_input"] = False  # b_dec lies in another space than x
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(SAEConfig):
        name, value = field.name, getattr(config, field.name)
        if field.default is not None or name in _SIZES:
            continue
        if name not in defaults:
            if value is not None:
                raise UserError(
                    f"sae.{name} is set to {value!r}, but the architecture {config.architecture} "
                    f"has no such setting; it has: {', '.join(defaults)}"
                )
        elif value is None:
            default = defaults[name]
            changes[name] = default(config) if callable(default) else default
    resolved = dataclasses.replace(config, **changes)
    _check_common(resolved)
    cls.check(resolved)
    return resolved


def _with_widths(config: SAEConfig, sites: tuple[int, ...], target: int | None) -> SAEConfig:
    choose(config.kind, KINDS, "sae.kind")
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


def _check_common(config: SAEConfig) -> None:
    choose(config.normalize, ("sqrt_d", "unit", "none"), "sae.normalize")
    choose(config.compute_dtype, ("float32", "bfloat16"), "sae.compute_dtype")
    choose(config.b_dec_init, ("geometric_median", "mean", "zero"), "sae.b_dec_init")
    for names, valid, must in (
        (_ABOVE_ZERO, lambda v: v > 0, "above 0"),
        (_NOT_BELOW_ZERO, lambda v: v >= 0, "0 or more"),
        (_FRACTIONS, lambda v: 0 <= v <= 1, "a part of all steps, from 0 to 1"),
        (_UP_TO_D_SAE, lambda v: v <= config.d_sae, f"at most sae.d_sae, {config.d_sae}"),
    ):
        for name in names:
            value = getattr(config, name)
            if value is not None and not (math.isfinite(value) and valid(value)):
                raise UserError(f"sae.{name} must be {must}, not {value}")
    if config.apply_b_dec_to_input and config.kind in TRANSCODERS:
        raise UserError(
            f"sae.apply_b_dec_to_input=true makes no sense for sae.kind={config.kind}: b_dec is an "
            "offset of the target, not of the input; leave it out"
        )
    if config.target_l0 is not None and config.sparsity_coefficient == 0:
        raise UserError(
            "sae.target_l0 is reached by scaling sae.sparsity_coefficient, which is 0; set it above"
        )
