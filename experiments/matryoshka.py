"""Matryoshka SAEs as in "Learning multi-level features with Matryoshka sparse autoencoders"
(Bussmann, Nabeshima et al. 2025, arXiv:2503.17547).

  sae-jax train --config=matryoshka --workdir=runs/matryoshka \\
      --config.data.store=stores/gemma_resid_8

BatchTopK whose first 1/16, 1/8, 1/4 and 1/2 of the latents reconstruct on their own too, all with
the same weight (section 3). By default what the first author's repository runs on Gemma 2 2B:
36,864 latents, k 32, 500M tokens, and Adam and AuxK as for BatchTopK. It counts b_dec alone as one
more prefix, we do not; SAEBench's prefixes, our architecture's default, are 1/32, 3/32, 7/32 and
15/32. Operands of products are bfloat16, all else, the threshold too, is float32;
--config.sae.compute_dtype=float32 for these too. `:tiny` is the recipe on a laptop, of float32, for
the store of `sae-jax demo`.
"""

from sae_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from sae_jax.errors import choose
from sae_jax.sae import MatryoshkaConfig

SIZES = ("paper", "tiny")


def get_config(size: str = "paper") -> Config:
    choose(size, SIZES, "the size of matryoshka")
    adam = {"schedule": "constant", "b2": 0.99}
    if size == "tiny":
        return Config(
            sae=MatryoshkaConfig(
                d_sae=1024,
                prefix_widths=nested(1024),
                k=16,
                dead_after_tokens=200_000,
            ),
            data=DataConfig(store="sae_demo/store", site="mlp_act.0", batch_size=1024),
            optimizer=OptimizerConfig(learning_rate=1e-3, **adam),
            train=TrainConfig(tokens=500_000, log_every=20),
        )
    return Config(
        sae=MatryoshkaConfig(
            d_sae=36_864,
            prefix_widths=nested(36_864),
            k=32,
            aux_k=512,
            dead_after_tokens=5 * 4096,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(batch_size=4096),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_fraction=0.0, clip_norm=None, **adam),
        train=TrainConfig(tokens=500_000_000),
    )


def nested(d_sae: int) -> tuple[int, ...]:
    return tuple(d_sae // part for part in (16, 8, 4, 2, 1))
