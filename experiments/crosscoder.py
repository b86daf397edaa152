"""Crosscoders over layers of one model: "Sparse crosscoders for cross-layer features and model
diffing" (Lindsey et al. 2024).

  sae-jax train --config=crosscoder --workdir=runs/crosscoder \\
      --config.data.store=stores/residual --config.data.site=resid_post.4,resid_post.8,resid_post.12

All sites share their latents, and the L1 penalty weighs a latent with the sum of the norms of its
decoder rows, one for each site. The paper gives no sizes; by default those of its best-known
replication (ckkissane/crosscoder-model-diff-replication): 16,384 latents, 400M tokens in batches of
4,096, lambda 2, linear from 0 over the first 5% of steps, learning rate 5e-5, linear to 0 over the
last 20%, decoder rows of norm 0.08 at first. It reads one layer of two models; any sites of one
store will do. Operands of products are bfloat16, all else float32;
--config.sae.compute_dtype=float32 for these too. `:tiny` is the recipe on a laptop, of float32, for
the store of `sae-jax demo`.
"""

from sae_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from sae_jax.errors import choose
from sae_jax.sae import ReLUConfig

SIZES = ("paper", "tiny")


def get_config(size: str = "paper") -> Config:
    choose(size, SIZES, "the size of crosscoder")
    recipe = {"kind": "crosscoder", "decoder_init_norm": 0.08}
    if size == "tiny":
        return Config(
            sae=ReLUConfig(
                d_sae=1024, sparsity_coefficient=2.0, dead_after_tokens=200_000, **recipe
            ),
            data=DataConfig(
                store="sae_demo/store", site="resid_pre.0,resid_mid.0,resid_post.0", batch_size=1024
            ),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            train=TrainConfig(tokens=500_000, log_every=20),
        )
    return Config(
        sae=ReLUConfig(d_sae=2**14, sparsity_coefficient=2.0, compute_dtype="bfloat16", **recipe),
        data=DataConfig(site="resid_post.4,resid_post.8,resid_post.12", batch_size=4096),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_fraction=0.0),
        train=TrainConfig(tokens=400_000_000),
    )
