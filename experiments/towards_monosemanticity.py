"""ReLU SAEs with unit-norm decoders and resampling: "Towards Monosemanticity" (Bricken et al.
2023).

  sae-jax train --config=towards_monosemanticity --workdir=runs/relu_2023 \\
      --config.data.store=stores/mlp --config.data.site=mlp_act.0

A million steps of 8,192 tokens at a constant learning rate; every 25,000 steps, four times, latents
that did not fire in the last 12,500 are resampled (appendix on training the autoencoders). By
default 4,096 latents, run A/1 of the paper; `:512`, `:16k` and `:131k` are A/0, A/2 and the
largest. `:tiny` is the recipe on a laptop, for the store of `sae-jax demo`: an MLP of the paper's
kind and width.

The paper does not scale its activations, so its lambda does not carry over; 2 holds for E||x||^2 =
d. Operands of products are bfloat16, in `:tiny` float32, and all else is float32;
--config.sae.compute_dtype=float32 for these too.
"""

from sae_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from sae_jax.errors import choose
from sae_jax.sae import ReLUL1UnitConfig

LATENTS = {"512": 512, "4k": 4096, "16k": 16_384, "131k": 131_072}
SIZES = (*LATENTS, "tiny")


def get_config(size: str = "4k") -> Config:
    choose(size, SIZES, "the size of towards_monosemanticity")
    if size == "tiny":
        return Config(
            sae=ReLUL1UnitConfig(
                d_sae=1024,
                sparsity_coefficient=2.0,
                resample_every_tokens=125_000,
                resample_times=2,
                dead_after_tokens=60_000,
            ),
            data=DataConfig(store="sae_demo/store", site="mlp_act.0", batch_size=1024),
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
            train=TrainConfig(tokens=500_000, log_every=20),
        )
    return Config(
        sae=ReLUL1UnitConfig(
            d_sae=LATENTS[size],
            sparsity_coefficient=2.0,
            resample_every_tokens=25_000 * 8192,
            resample_times=4,
            dead_after_tokens=12_500 * 8192,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(batch_size=8192),
        optimizer=OptimizerConfig(schedule="constant", warmup_fraction=0.0, clip_norm=None),
        train=TrainConfig(tokens=1_000_000 * 8192),
    )
