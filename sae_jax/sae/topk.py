"""TopK with the auxiliary loss for dead latents (Gao et al. 2024)."""

import dataclasses

import jax
import jax.numpy as jnp

from sae_jax import ops
from sae_jax.sae.base import SAE
from sae_jax.sae.config import KConfig
from sae_jax.sae.losses import Losses, LossInputs, auxiliary_code, squared_error


@dataclasses.dataclass(frozen=True)
class TopKConfig(KConfig):
    """The config of a TopK SAE."""

    architecture: str = "topk"
    multi_topk: bool = False
    """Whether the loss has a second term, at 4k, so that codes of other k can be used."""


class TopK(SAE):
    """A TopK SAE keeps the k largest latents of each token, with decoder rows of norm 1.

        f = ReLU(TopK((x - b_dec) W_enc + b_enc))
        L = E[ ||y - y_hat||^2 + alpha ||e - e_hat||^2 ]

    The second term is the `auxiliary_loss`. With `multi_topk` the loss also has
    ||y - y_hat||^2 / 8 of a code of 4k latents, so that codes of other k can be used.

    Source: "Scaling and evaluating sparse autoencoders" (Gao et al. 2024), sections 2.3, 2.4,
    5.3.1 and A.2: alpha 1/32, aux_k about d/2, dead after 10M tokens, lr proportional to
    1/sqrt(d_sae).
    """

    Config = TopKConfig

    def activate(self, preactivations: jax.Array) -> jax.Array:
        rows = preactivations.reshape(-1, preactivations.shape[-1])
        return ops.top_k_latents(rows, self.config.k).reshape(preactivations.shape)

    def encode_sparse(self, x) -> tuple[jax.Array, jax.Array]:
        """Returns the k latents of each of the activations x (..., d_in), without dense latents.

        x is in the model's own units, of any type that `encode` takes, and on one device. Raises
        UserError if x has another width.

        Returns:
          The values (..., k), largest first, and their indices (..., k), which are int32.
        """
        x, restore = self.inputs(x)
        rows, bias = self.encoder_input(x.reshape(-1, x.shape[-1]) * self.scale)
        code, _ = ops.encode_top_k(rows, self.w_enc[...], bias, None, self.config.k, 0)
        shape = (*x.shape[:-1], self.config.k)
        values = jax.nn.relu(code.values).reshape(shape)
        return restore(values), restore(code.indices.reshape(shape))

    def fold(self) -> "TopK":
        """Returns an SAE of the same function with scales 1.

        Decoder rows get norm 1 only if they all have the same norm. Factors that differ would
        change which latents are largest.
        """
        norms = self._row_norms()
        equal = bool(jnp.all(jnp.abs(norms - norms[0]) < 1e-5 * norms[0]))
        return self._rescaled(norms if equal else 1.0)

    def training_loss(self, x: jax.Array, y: jax.Array, inputs: LossInputs) -> Losses:
        config = self.config
        k = config.k if inputs.k is None else inputs.k
        most = max(config.k, config.k_start or 0)
        slots = min(4 * most if config.multi_topk else most, config.d_sae)
        w_enc, w_dec = self.w_enc[...], self.w_dec[...]
        x_in, bias = self.encoder_input(x)
        few = many = any_many = None
        if config.aux_coefficient:
            few, many = ops.few_and_many(inputs.dead, config.aux_k)
            of_few, w_enc, bias, w_dec = self.decode_few_dead(x_in, bias, few)
        code, aux = ops.encode_top_k(x_in, w_enc, bias, many, slots, config.aux_k, self.dtype)
        wide = code._replace(values=jax.nn.relu(code.values))
        code = wide if inputs.k is None and slots == k else ops.keep_top_k(wide, k, slots)
        if many is not None:
            aux, any_many = auxiliary_code(aux), many.any()
        decoded, error_hat = ops.sparse_decode(code, aux, any_many, w_dec, self.dtype)
        y_hat = self.output(decoded, x)
        mse = total = squared_error(y, y_hat)
        if few is not None:
            error = jax.lax.stop_gradient(y - y_hat)
            error_hat = of_few if many is None else of_few + error_hat
            total += config.aux_coefficient * jnp.where(
                inputs.dead.any(), squared_error(error, error_hat), 0.0
            )
        if config.multi_topk:
            wide = ops.keep_top_k(wide, 4 * k, slots)
            decoded, _ = ops.sparse_decode(wide, None, None, w_dec, self.dtype)
            total += squared_error(y, self.output(decoded, x)) / 8

        l1, _ = ops.sparse_decode(code, None, None, self.decoder_norms()[:, None])
        return Losses(
            total=total,
            mse=mse,
            l0=jnp.sum(code.values > 0) / x.shape[0],
            l1=jnp.sum(l1) / x.shape[0],
            fired=ops.fired_latents(code, config.d_sae),
        )

    @classmethod
    def learning_rate(cls, d_sae: int) -> float:
        return 2e-4 / (d_sae / 2**14) ** 0.5

    @classmethod
    def flops_per_token(cls, config: TopKConfig) -> int:
        # Dense only in the encoder's forward pass; decoder forward, both its gradients and
        # the encoder's weight gradient touch k latents, with multi-TopK 4k more.
        picked = 5 * config.k if config.multi_topk else config.k
        return 2 * config.d_in * config.d_sae + picked * (2 * config.d_in + 6 * config.d_out)
