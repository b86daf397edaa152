"""TopK transcoders, from an MLP's input to its output: "Transcoders beat sparse autoencoders for
interpretability" (Paulo et al. 2025, arXiv:2501.18823).

  sae-jax train --config=transcoder:skip --workdir=runs/transcoder \\
      --config.data.store=stores/mlp --config.data.site=mlp_in.8 --config.data.target_site=mlp_out.8

`:skip` adds an affine skip, which starts at 0; without it, this is the transcoder of Dunefsky et
al. (2024, arXiv:2406.11944) with TopK for its L1. By default the setting of the authors' program,
sparsify: 32 latents a token and 32 for each input dimension (here of 768), Adam at 2e-4 /
sqrt(d_sae / 2^14), linear to 0, batches of 32 contexts of 2,048, no auxiliary loss. It starts W_dec
at 0; here its rows have norm 1 all along. The number of tokens, 1B, is ours. Operands of products
are bfloat16, all else float32; --config.sae.compute_dtype=float32 for these too.

`:tiny` and `:tiny-skip` are the recipe on a laptop, of float32, for the store of `sae-jax demo`.
"""

from sae_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from sae_jax.errors import choose
from sae_jax.sae import TopKConfig

SIZES = ("paper", "skip", "tiny", "tiny-skip")


def get_config(size: str = "paper") -> Config:
    choose(size, SIZES, "the size of transcoder")
    recipe = {
        "kind": "skip_transcoder" if size.endswith("skip") else "transcoder",
        "aux_coefficient": 0.0,
    }
    to_zero = {"schedule": "linear_tail", "warmup_fraction": 0.02, "decay_fraction": 0.98}
    if size.startswith("tiny"):
        return Config(
            sae=TopKConfig(d_sae=1024, k=16, dead_after_tokens=200_000, **recipe),
            data=DataConfig(
                store="sae_demo/store", site="mlp_in.0", target_site="mlp_out.0", batch_size=1024
            ),
            optimizer=OptimizerConfig(learning_rate=1.5e-3, **to_zero),
            train=TrainConfig(tokens=500_000, log_every=20),
        )
    return Config(
        sae=TopKConfig(d_sae=32 * 768, k=32, compute_dtype="bfloat16", **recipe),
        data=DataConfig(site="mlp_in.8", target_site="mlp_out.8", batch_size=32 * 2048),
        optimizer=OptimizerConfig(**to_zero),
        train=TrainConfig(tokens=1_000_000_000),
    )
