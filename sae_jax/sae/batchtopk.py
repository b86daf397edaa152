"""BatchTopK keeps k latents a token on average over the batch (Bussmann et al. 2024)."""

import dataclasses

import jax
import jax.numpy as jnp

from sae_jax import ops
from sae_jax.sae.base import SAE
from sae_jax.sae.config import KConfig
from sae_jax.sae.losses import Losses, LossInputs, squared_error
from sae_jax.sae.topk import TopK


@dataclasses.dataclass(frozen=True)
class BatchTopKConfig(KConfig):
    """The config of a BatchTopK SAE."""

    architecture: str = "batchtopk"


class BatchTopK(SAE):
    """A BatchTopK SAE keeps the k B largest latents of a batch of B tokens.

    In training, with z = (x - b_dec) W_enc + b_enc,

        f = ReLU(z) where that is among the k B largest of the whole batch, else 0
        L = E[ ||y - y_hat||^2 ] + `auxiliary_loss`

    After training there is no batch, and f = z 1[z > threshold]. The threshold is the running mean
    of the smallest value that was kept in each batch.

    Source: "BatchTopK sparse autoencoders" (arXiv:2412.06410), sections 3 and 3.1. The batch is
    the global one, whatever the mesh. The running mean is corrected for its start, so that it
    does not depend on an initial value.
    """

    Config = BatchTopKConfig
    PER_LATENT_SCALED = ("b_enc", "threshold")
    RUNNING_MEANS = ("threshold",)

    def activate(self, preactivations: jax.Array) -> jax.Array:
        kept = (preactivations > self.threshold[...]) & (preactivations > 0)
        return jnp.where(kept, preactivations, 0.0)

    @classmethod
    def fresh_latent(cls, config: KConfig) -> dict[str, float]:
        return {"b_enc": 0.0, "threshold": 0.0}

    def training_loss(self, x: jax.Array, y: jax.Array, inputs: LossInputs) -> Losses:
        x_in, bias = self.encoder_input(x)
        pre = self.encoder_product(x_in, bias)
        latents, running = self.activate(pre), {}
        if inputs.training:
            k = self.config.k if inputs.k is None else inputs.k
            latents, smallest = self.activate_batch(pre, k)
            running = {"threshold": jnp.full_like(self.threshold[...], smallest)}
        y_hats = self.reconstructions(latents, x)
        mse = squared_error(y, y_hats[-1])
        fired = latents > 0
        auxiliary = self.auxiliary_loss(x_in, bias, y - y_hats[-1], inputs.dead)
        return Losses(
            total=squared_error(y, y_hats) + auxiliary,
            mse=mse,
            l0=jnp.mean(jnp.sum(fired, axis=1)),  # a sum over both may be above 2^31
            l1=jnp.sum(latents * self.decoder_norms()) / x.shape[0],
            fired=fired.any(axis=0),
            running=running,
        )

    def activate_batch(self, preactivations: jax.Array, k) -> tuple[jax.Array, jax.Array]:
        """Returns the latents (B, d_sae) of a whole batch, and the smallest that was kept.

        The smallest is 0 where no latent is above 0.

        Args:
          preactivations: (B, d_sae) the batch's pre-activations.
          k: how many latents a token are kept on average.
        """
        latents = jax.nn.relu(preactivations)
        picked, smallest = ops.batch_top_k(latents, k * latents.shape[0])
        latents = jnp.where(picked, latents, 0.0)
        return latents, jnp.where(jnp.isfinite(smallest), smallest, 0.0)

    def reconstructions(self, latents: jax.Array, x: jax.Array) -> jax.Array:
        """Returns the reconstructions (1, B, d_out) of latents (B, d_sae) for the loss.

        x (B, d_in) are the inputs, which a skip transcoder's skip reads.
        """
        return self.scaled_reconstruction(latents, x)[None]

    @classmethod
    def learning_rate(cls, d_sae: int) -> float:
        return TopK.learning_rate(d_sae)
