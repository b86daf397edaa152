"""The arguments of an SAE's constructor: resolved, checked, and shown by editors."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sae_jax.errors import UserError, nearest
from sae_jax.sae.config import TRANSCODERS, SAEConfig
from sae_jax.sae.resolve import is_resolved, resolve


def resolve_arguments(cls: type, config: SAEConfig | None, fields: dict) -> SAEConfig:
    """Returns the config that a constructor's arguments describe, with all of it filled in."""
    if config is None:
        config = cls.Config(**fields)
    elif getattr(config, "architecture", None) != cls.Config.architecture:
        raise UserError(f"{cls.__name__} takes a {cls.Config.__name__}, not {config!r}")
    elif fields:
        for name in fields:
            config.check_field(name)
        config = dataclasses.replace(config, **fields)
    elif is_resolved(config):
        return config  # its values may be traced, which nothing can check
    sites, target = (config.d_in,), None
    if config.kind == "crosscoder":
        sites = config.site_widths
        if sites is None:
            raise UserError(f"{cls.__name__} of a crosscoder needs site_widths=(width, width, ...)")
    elif config.d_in is None:
        raise UserError(f"{cls.__name__} needs d_in, the width of its inputs")
    if config.kind in TRANSCODERS:
        target = config.d_out
        if target is None:
            raise UserError(f"{cls.__name__} of a transcoder needs d_out, the width of its targets")
    return resolve(config, sites, target)


def random_key(rngs: nnx.Rngs | int) -> jax.Array:
    """Returns the key of a seed, or the next one of nnx.Rngs. Raises UserError for another type."""
    if isinstance(rngs, nnx.Rngs):
        return rngs.params()
    if isinstance(rngs, bool) or not isinstance(rngs, int | np.integer):
        raise UserError(f"rngs must be nnx.Rngs or a seed, not {rngs!r}")
    return jax.random.key(rngs)


def check_parameters(cls: type, config: SAEConfig, parameters: dict) -> None:
    """Raises UserError if the names or shapes are not those that the architecture makes."""
    if config.kind not in TRANSCODERS and config.d_in != config.d_out:
        raise UserError(
            f"a config of kind {config.kind} has d_in {config.d_in} and d_out {config.d_out}; it "
            "reconstructs its input, so they are equal"
        )

    def fresh():
        return cls.init_parameters(jax.random.key(0), config, jnp.zeros(config.d_out))

    expected = jax.eval_shape(fresh)
    what = f"{cls.__name__} of kind {config.kind}"
    if missing := sorted(expected.keys() - parameters.keys()):
        raise UserError(f"a {what} has a parameter {missing[0]}, which was not given")
    if extra := sorted(parameters.keys() - expected.keys()):
        raise UserError(f"a {what} has no parameter {extra[0]}; {nearest(extra[0], expected)}")
    for name, like in expected.items():
        if (shape := np.shape(parameters[name])) != like.shape:
            turned = ", transposed" if shape == like.shape[::-1] else ""
            raise UserError(
                f"{name} of a {what} has shape {shape}{turned}; it must be {like.shape}"
            )


def make_signature(config_class: type[SAEConfig]) -> inspect.Signature:
    """Returns the signature that a notebook completes and shows: the fields by keyword."""
    parameter, only = inspect.Parameter, inspect.Parameter.KEYWORD_ONLY
    fields = [
        parameter(field.name, only, default=field.default, annotation=field.type)
        for field in dataclasses.fields(config_class)
        if field.name != "architecture"
    ]
    config = parameter("config", parameter.POSITIONAL_OR_KEYWORD, default=None)
    others = {"rngs": 0, "scale": 1.0, "target_scale": None}
    more = [parameter(name, only, default=default) for name, default in others.items()]
    return inspect.Signature([config, *fields, *more])
