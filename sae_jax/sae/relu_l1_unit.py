"""ReLU with a plain L1 penalty and a unit-norm decoder (Bricken et al. 2023)."""

import dataclasses

import jax

from sae_jax.ops.sharding import ENCODER, out_sharding
from sae_jax.sae.relu import ReLU, ReLUConfig


@dataclasses.dataclass(frozen=True)
class ReLUL1UnitConfig(ReLUConfig):
    """The config of a ReLUL1Unit SAE."""

    architecture: str = "relu_l1_unit"
    sparsity_coefficient: float = 1.0
    unit_norm_decoder: bool = True
    decoder_init_norm: float = 1.0
    b_dec_init: str = "geometric_median"
    resample_every_tokens: int = 204_800_000  # 25,000 steps of 8,192

    shifts_inputs = True


class ReLUL1Unit(ReLU):
    """A ReLUL1Unit SAE has a plain L1 penalty and decoder rows of norm 1.

        f = ReLU((x - b_dec) W_enc + b_enc)
        L = E[ ||y - y_hat||^2 + lambda sum_i f_i ]

    Source: "Towards Monosemanticity" (Bricken et al. 2023), appendix: the pre-encoder bias tied
    to b_dec, which starts at the geometric median; W_enc and W_dec are not tied and start
    Kaiming-uniform; the gradient along each decoder row is removed before Adam and the row
    renormalised after it; latents that died are resampled four times (`train/resample.py`).
    """

    Config = ReLUL1UnitConfig

    @classmethod
    def init_parameters(
        cls, key: jax.Array, config: ReLUL1UnitConfig, b_dec: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the parameters of `SAE.init_parameters`, with w_enc drawn Kaiming-uniform.

        The arguments are those of `SAE.init_parameters`.
        """
        key, key_enc = jax.random.split(key)
        bound = (6 / config.d_in) ** 0.5
        shape = (config.d_in, config.d_sae)
        w_enc = jax.random.uniform(
            key_enc, shape, minval=-bound, maxval=bound, out_sharding=out_sharding(ENCODER)
        )
        return super().init_parameters(key, config, b_dec) | {"w_enc": w_enc}

    @classmethod
    def learning_rate(cls, d_sae: int) -> float:
        return 3e-4
