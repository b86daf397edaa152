"""Starts a run from an SAE that exists, another framework's or an earlier run's."""

import dataclasses

import jax
import numpy as np

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.sae import SAE
from sae_jax.train.step import TrainState

_MUST_AGREE = ("architecture", "kind", "d_sae", "d_in", "d_out", "apply_b_dec_to_input")


def start_fresh(sae: SAE, state: TrainState) -> TrainState:
    """Returns a fresh `state` with the parameters of a fresh SAE in place of those that were drawn.

    They are taken to be in the run's own units, as those that were drawn are. b_dec stays what the
    recipe computed from the data.
    """
    names = state.parameters.keys() - {"b_dec"}
    return _with_parameters(state, {name: np.asarray(sae.parameters()[name]) for name in names})


def start_from(sae: SAE, config: Config, state: TrainState) -> TrainState:
    """Returns a fresh `state` with the parameters of `sae`, in the run's units.

    The run's SAE is then the same function of activations as `sae`. Moments and counters are fresh,
    and k is the run's. Raises UserError, naming the fields to set, if the run's config describes
    another SAE.
    """
    _check(sae, config)
    scale, target_scale = float(state.scale), float(state.target_scale)
    folded = jax.tree.map(np.asarray, sae).fold()  # its devices may not be those of the mesh
    values = {name: np.asarray(value, np.float64) for name, value in folded.parameters().items()}
    # The run's latents are those of the folded SAE times target_scale, its decoder's rows the same.
    for name in ("w_enc", "w_skip"):
        if name in values:
            values[name] *= target_scale / scale
    for name in ("b_dec", *folded.PER_LATENT_SCALED):
        values[name] *= target_scale
    norms = np.linalg.norm(values["w_dec"], axis=1)
    if config.sae.unit_norm_decoder and not np.allclose(norms, 1.0, atol=1e-4):
        raise UserError(
            "train.init: the rows of its decoder have norms of "
            f"{norms.min():.3g} to {norms.max():.3g}; add --config.sae.unit_norm_decoder=false"
        )

    return _with_parameters(state, values)


def _with_parameters(state: TrainState, values: dict[str, np.ndarray]) -> TrainState:
    """Returns `state` with the parameters in `values`, of which each device holds its own share."""

    def placed(name: str) -> jax.Array:
        like, value = state.parameters[name], values[name].astype(np.float32)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])

    return dataclasses.replace(
        state, parameters=state.parameters | {name: placed(name) for name in values}
    )


def _check(sae: SAE, config: Config) -> None:
    given = {name: getattr(sae.config, name) for name in _MUST_AGREE}
    described = {name: getattr(config.sae, name) for name in _MUST_AGREE}
    if given["kind"] == "crosscoder":
        raise UserError("train.init: a crosscoder, whose sites have a scale each, cannot go on yet")
    wrong = [name for name in _MUST_AGREE if given[name] != described[name]]
    if wrong:
        flags = " ".join(f"--config.sae.{name}={str(given[name]).lower()}" for name in wrong)
        raise UserError(
            f"train.init is {config.train.init}, which the run's config does not describe; "
            f"add {flags}"
        )
