"""TopK with the auxiliary loss for dead latents (Gao et al. 2024)."""

import jax
import jax.numpy as jnp

from sae_jax import ops
from sae_jax.config import SAEConfig, UserError
from sae_jax.sae.base import SAE, Losses, squared_error


class TopK(SAE):
    """f = ReLU(TopK((x - b_dec) W_enc + b_enc)), unit-norm decoder;
    L = E[ ||x - x_hat||^2 + alpha ||e - e_hat||^2 ], e = x - x_hat held fixed, and e_hat the
    decoding of the aux_k largest pre-activations among dead latents.

    Source: "Scaling and evaluating sparse autoencoders" (Gao et al. 2024), sections 2.3, 2.4
    and A.2: alpha 1/32, aux_k about d/2, dead after 10M tokens, lr proportional to
    1/sqrt(d_sae). As in the formula, the auxiliary pick has no ReLU, so that dead latents
    whose pre-activations are negative learn too, and e_hat no bias: it would stand on both
    sides of e - e_hat.
    """

    DEFAULTS = {
        "k": 32,
        "aux_k": lambda d_in: max(1, d_in // 2),
        "aux_coefficient": 1 / 32,
        "apply_b_dec_to_input": True,
        "unit_norm_decoder": True,
        "decoder_init_norm": 1.0,
        "b_dec_init": "geometric_median",
    }

    def activate(self, preactivations: jax.Array) -> jax.Array:
        N = preactivations.shape[-1]
        values, indices = ops.top_k(preactivations.reshape(-1, N), self.config.k)
        rows = jnp.arange(values.shape[0])[:, None]
        latents = jnp.zeros((values.shape[0], N), values.dtype)
        latents = latents.at[rows, indices].set(jax.nn.relu(values), unique_indices=True)
        return latents.reshape(preactivations.shape)

    def encode_sparse(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The k latents of each row of x (B, d_in), without the dense (B, d_sae) latents:
        values (B, k), largest first, and int32 indices (B, k). On one device."""
        encoder = (self._input_shift(), self.w_enc[...], self.b_enc[...])
        code, _ = ops.encode_top_k(self._scaled(x), *encoder, None, self.config.k, 0)
        return jax.nn.relu(code.values), code.indices

    def fold(self) -> "TopK":
        norms = jnp.linalg.norm(self.w_dec[...], axis=1)
        if self.config.unit_norm_decoder and bool(jnp.all(jnp.abs(norms - 1) < 1e-5)):
            return super().fold()
        raise UserError(
            "this TopK SAE's decoder rows are not of norm 1, and scaling them would change which "
            "latents are largest; train with sae.unit_norm_decoder=true"
        )

    def loss(self, x: jax.Array, dead: jax.Array, coefficient: jax.Array) -> Losses:
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        w_dec = self.w_dec[...]
        encoder = (self._input_shift(), self.w_enc[...], self.b_enc[...])
        code, aux_code = ops.encode_top_k(x, *encoder, dead, config.k, config.aux_k, dtype)
        code = code._replace(values=jax.nn.relu(code.values))
        any_dead = dead.any()
        decoded, error_hat = ops.sparse_decode(code, aux_code, any_dead, w_dec)
        x_hat = decoded + self.b_dec[...]
        mse = squared_error(x, x_hat)
        error = jax.lax.stop_gradient(x - x_hat)
        aux = jnp.where(any_dead, squared_error(error, error_hat), 0.0)

        norms = jnp.linalg.norm(w_dec, axis=1, keepdims=True)
        l1, _ = ops.sparse_decode(code, None, None, norms)
        return Losses(
            total=mse + config.aux_coefficient * aux,
            mse=mse,
            l0=jnp.sum(code.values > 0) / x.shape[0],
            l1=jnp.sum(l1) / x.shape[0],
            fired=ops.fired_latents(code, config.d_sae),
        )

    @classmethod
    def learning_rate(cls, d_sae: int) -> float:
        return 2e-4 / (d_sae / 2**14) ** 0.5

    @classmethod
    def flops_per_token(cls, config: SAEConfig) -> int:
        # Dense only in the encoder's forward pass; decoder forward, both its gradients and
        # the encoder's weight gradient touch k latents. The auxiliary loss is not counted.
        return 2 * config.d_in * config.d_sae + 8 * config.k * config.d_in

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        if not 1 <= config.k <= config.d_sae:
            raise UserError(f"sae.k is {config.k}, but must be from 1 to sae.d_sae, {config.d_sae}")
        if config.aux_k < 1:
            raise UserError(f"sae.aux_k must be 1 or more, not {config.aux_k}")
        if config.aux_coefficient < 0:
            raise UserError(f"sae.aux_coefficient must be 0 or more, not {config.aux_coefficient}")
