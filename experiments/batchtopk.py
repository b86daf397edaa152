"""BatchTopK SAEs as in "BatchTopK sparse autoencoders" (Bussmann et al. 2024, arXiv:2412.06410).

  sae-jax train --config=batchtopk --workdir=runs/batchtopk \\
      --config.data.store=stores/gpt2_resid_8

By default what the authors' repository runs on GPT-2 small: 12,288 latents, k 32 (of 16, 32, 64),
500M tokens in batches of 4,096, learning rate 3e-4, Adam's b2 0.99, AuxK over 512 latents that five
batches did not fire. It normalises each token, we all by one scalar; dictionary_learning decays the
learning rate from 2e-4 / sqrt(d_sae / 2^14). Operands of products are bfloat16, all else, the
threshold too, is float32; --config.sae.compute_dtype=float32 for these too. `:tiny` is the recipe
on a laptop, of float32, for the store of `sae-jax demo`.
"""

from sae_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from sae_jax.errors import choose
from sae_jax.sae import BatchTopKConfig

SIZES = ("paper", "tiny")


def get_config(size: str = "paper") -> Config:
    choose(size, SIZES, "the size of batchtopk")
    adam = {"schedule": "constant", "b2": 0.99}
    if size == "tiny":
        return Config(
            sae=BatchTopKConfig(d_sae=1024, k=16, dead_after_tokens=200_000),
            data=DataConfig(store="sae_demo/store", site="mlp_act.0", batch_size=1024),
            optimizer=OptimizerConfig(learning_rate=1e-3, **adam),
            train=TrainConfig(tokens=500_000, log_every=20),
        )
    return Config(
        sae=BatchTopKConfig(
            d_sae=12_288,
            k=32,
            aux_k=512,
            dead_after_tokens=5 * 4096,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(batch_size=4096),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_fraction=0.0, clip_norm=None, **adam),
        train=TrainConfig(tokens=500_000_000),
    )
