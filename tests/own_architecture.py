"""An architecture outside the package: its config, its formula, and a config to train it with.

TopK whose penalty pulls the kept latents towards one `level`: a hyperparameter of its own.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sae_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from sae_jax.errors import UserError
from sae_jax.sae import SAE, Losses, LossInputs, SAEConfig
from sae_jax.sweep import grid


@dataclasses.dataclass(frozen=True)
class LevelConfig(SAEConfig):
    """The config of a Level SAE."""

    architecture: str = "level"
    sparsity_coefficient: float = 0.1
    """Coefficient of the penalty."""
    level: float = 1.0
    """What latents above zero are pulled towards."""

    def __post_init__(self):
        super().__post_init__()
        self.not_below_zero("sparsity_coefficient")
        if self.level <= 0:
            raise UserError(f"sae.level must be above 0, not {self.level}")


class Level(SAE):
    """f = ReLU((x - b_dec) W_enc + b_enc);
    L = E[ ||y - y_hat||^2 + lambda sum_i |f_i - level| for f_i > 0 ]."""

    Config = LevelConfig

    def activate(self, preactivations: jax.Array) -> jax.Array:
        return jax.nn.relu(preactivations)

    def training_loss(self, x: jax.Array, y: jax.Array, inputs: LossInputs) -> Losses:
        latents = self.activate(self.scaled_preactivations(x))
        y_hat = self.scaled_reconstruction(latents, x)
        mse = jnp.mean(jnp.sum(jnp.square(y - y_hat), axis=-1))
        fired = latents > 0
        away = jnp.where(fired, jnp.abs(latents - self.config.level), 0.0)
        return Losses(
            total=mse + inputs.coefficient * jnp.sum(away) / x.shape[0],
            mse=mse,
            l0=jnp.sum(fired) / x.shape[0],
            l1=jnp.sum(latents * self.decoder_norms()) / x.shape[0],
            fired=fired.any(axis=0),
        )

    @classmethod
    def learning_rate(cls, d_sae: int) -> float:
        return 1e-3


def pull_biases(sae: SAE, x: jax.Array, y: jax.Array) -> jax.Array:
    """An extra loss term, for any architecture."""
    return jnp.sum(jnp.square(sae.b_enc[...] - 0.5))


def get_config(store: str = "store") -> Config:
    return Config(
        sae=LevelConfig(d_sae=64, level=0.5),
        data=DataConfig(store=store, batch_size=64, virtual_shards=8, window_rows=1024),
        train=TrainConfig(tokens=40 * 64, log_every=1, checkpoint_every=20),
        mesh=MeshConfig(data=1, model=1),
    )


def get_sweep(store: str = "store"):
    del store
    return grid.product(grid.sweep("sae.level", [0.5, 1.0]), grid.sweep("train.seed", [0, 1]))
