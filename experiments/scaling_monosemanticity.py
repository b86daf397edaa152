"""ReLU SAEs as in "Scaling Monosemanticity" (Templeton et al. 2024), by the recipe of April 2024.

  sae-jax train --config=scaling_monosemanticity --workdir=runs/relu \\
      --config.data.store=stores/residual --config.mesh.model=8

  sae-jax plan --config=scaling_monosemanticity:34m --topology=v5p:4x4x4 \\
      --mesh=1,1,64

L1 weighted by decoder norms, lambda 5 with E||x||^2 = d, reached linearly over the first 5% of
steps; gradient clipped to norm 1; 200,000 steps of 4,096 tokens, the learning rate linear to 0
over the last 20%. By default 131,072 latents, the April update's; `:1m`, `:4m` and `:34m` are the
paper's dictionaries. Operands of products are bfloat16, all else float32;
--config.sae.compute_dtype=float32 for these too. `:tiny` is the recipe on a laptop, of float32, for
the store of `sae-jax demo`.
"""

from sae_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from sae_jax.errors import choose
from sae_jax.sae import ReLUConfig

LATENTS = {"131k": 131_072, "1m": 2**20, "4m": 2**22, "34m": 2**25}
SIZES = (*LATENTS, "tiny")


def get_config(size: str = "131k") -> Config:
    choose(size, SIZES, "the size of scaling_monosemanticity")
    if size == "tiny":
        return Config(
            sae=ReLUConfig(d_sae=1024, dead_after_tokens=200_000),
            data=DataConfig(store="sae_demo/store", site="mlp_act.0", batch_size=1024),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            train=TrainConfig(tokens=500_000, log_every=20),
        )
    return Config(
        # Products of float32 would leave the tensor cores of a GPU idle, and take a TPU six times
        # as long; parameters, moments and sums stay float32.
        sae=ReLUConfig(d_sae=LATENTS[size], compute_dtype="bfloat16"),
        data=DataConfig(batch_size=4096),
        optimizer=OptimizerConfig(learning_rate=5e-5, schedule="linear_tail", warmup_fraction=0.0),
        train=TrainConfig(tokens=200_000 * 4096),
    )
