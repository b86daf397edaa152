"""Gated SAEs as in "Improving dictionary learning with gated sparse autoencoders" (Rajamanoharan
et al. 2024, arXiv:2404.16014).

  sae-jax train --config=gated --workdir=runs/gated \\
      --config.data.store=stores/residual --config.mesh.model=8

L1 on the gates' pre-activations, an auxiliary reconstruction through the frozen decoder (eqs. 5 to
8), Adam with b1 = 0, learning rate 3e-4 (5e-5 in dictionary_learning), activations with E||x||^2 =
1. By default the sizes of the comparison in the same authors' JumpReLU paper (arXiv:2407.14435):
131,072 latents, 8B tokens in batches of 4,096. Lambda 0.04 is from the middle of SAEBench's 0.012
to 0.08. Operands of products are bfloat16, all else float32; --config.sae.compute_dtype=float32 for
these too. `:tiny` is the recipe on a laptop, of float32, for the store of `sae-jax demo`.
"""

from sae_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from sae_jax.errors import choose
from sae_jax.sae import GatedConfig

SIZES = ("paper", "tiny")


def get_config(size: str = "paper") -> Config:
    choose(size, SIZES, "the size of gated")
    adam = {"schedule": "constant", "b1": 0.0}
    if size == "tiny":
        return Config(
            sae=GatedConfig(
                d_sae=1024,
                normalize="unit",
                sparsity_coefficient=0.2,
                dead_after_tokens=200_000,
            ),
            data=DataConfig(store="sae_demo/store", site="mlp_act.0", batch_size=1024),
            optimizer=OptimizerConfig(learning_rate=1e-3, **adam),
            train=TrainConfig(tokens=500_000, log_every=20),
        )
    return Config(
        sae=GatedConfig(
            d_sae=131_072,
            normalize="unit",
            sparsity_coefficient=0.04,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(batch_size=4096),
        optimizer=OptimizerConfig(learning_rate=3e-4, **adam),
        train=TrainConfig(tokens=8_000_000_000),
    )
