"""TopK SAEs as in "Scaling and evaluating sparse autoencoders" (Gao et al. 2024).

  sae-jax train --config=openai_topk --workdir=runs/topk \\
      --config.data.store=stores/gpt2_resid_8

By default the paper's setting for GPT-2 small: batches of 131,072 tokens, constant learning rate,
Adam's eps 6.25e-10, AuxK with alpha 1/32 (section 2 and appendix A). Operands of products are
bfloat16, all else float32; --config.sae.compute_dtype=float32 for these too. `:tiny` is the same
recipe on a laptop, of float32, for the store that `sae-jax demo` leaves in sae_demo/store.
"""

from sae_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from sae_jax.errors import choose
from sae_jax.sae import TopKConfig

SIZES = ("paper", "tiny")


def get_config(size: str = "paper") -> Config:
    choose(size, SIZES, "the size of openai_topk")
    adam = {"schedule": "constant", "eps": 6.25e-10}
    if size == "tiny":
        return Config(
            sae=TopKConfig(d_sae=1024, k=16, dead_after_tokens=200_000),
            data=DataConfig(store="sae_demo/store", site="mlp_act.0", batch_size=1024),
            optimizer=OptimizerConfig(**adam),
            train=TrainConfig(tokens=500_000, log_every=20),
        )
    return Config(
        sae=TopKConfig(d_sae=2**15, k=32, compute_dtype="bfloat16"),
        data=DataConfig(batch_size=131_072, window_rows=2**21),
        optimizer=OptimizerConfig(**adam),
        train=TrainConfig(tokens=1_300_000_000),
    )
