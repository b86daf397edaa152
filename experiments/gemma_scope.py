"""JumpReLU SAEs as in "Gemma Scope" (Lieberum et al. 2024, arXiv:2408.05147), section 3.

  sae-jax train --config=gemma_scope:131k --workdir=runs/jumprelu \\
      --config.data.store=stores/residual --config.mesh.model=8

An L0 penalty with gradients to thresholds only (Rajamanoharan et al. 2024, arXiv:2407.14435) on
activations with E||x||^2 = 1; Adam with b1 = 0; lambda linear from 0 over 10,000 steps of 4,096
tokens. 4B tokens for 16,384 latents (the default), 16B for `:1m`, 8B for the sizes between: `:32k`,
`:65k`, `:131k`, `:262k`, `:524k`. The released SAEs' lambda goes from 2.5e-4 to 2e-3. The paper's
learning rate warms up by a cosine from a tenth; here it is linear from 0, over as many steps. The
paper trains in float32; here the operands of products are bfloat16 and all else, thresholds too, is
float32, unless --config.sae.compute_dtype=float32.

`:tiny` is the recipe on a laptop, for the store of `sae-jax demo`. So few steps of 7e-5 would not
move a threshold: learning rate, kernel and first threshold are larger there. A target_l0 needs a
larger rate still, which --config.optimizer.learning_rate=none finds.
"""

from sae_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from sae_jax.errors import choose
from sae_jax.sae import JumpReLUConfig

DICTIONARIES = {  # latents, tokens
    "16k": (2**14, 4_000_000_000),
    "32k": (2**15, 8_000_000_000),
    "65k": (2**16, 8_000_000_000),
    "131k": (2**17, 8_000_000_000),
    "262k": (2**18, 8_000_000_000),
    "524k": (2**19, 8_000_000_000),
    "1m": (2**20, 16_000_000_000),
}
SIZES = (*DICTIONARIES, "tiny")


def get_config(size: str = "16k") -> Config:
    choose(size, SIZES, "the size of gemma_scope")
    adam = {"schedule": "constant", "b1": 0.0, "clip_norm": None}
    if size == "tiny":
        return Config(
            sae=JumpReLUConfig(
                d_sae=1024,
                normalize="unit",
                sparsity_coefficient=3e-3,
                initial_threshold=0.005,
                bandwidth=0.01,
                dead_after_tokens=200_000,
            ),
            data=DataConfig(store="sae_demo/store", site="mlp_act.0", batch_size=1024),
            optimizer=OptimizerConfig(learning_rate=1e-3, **adam),
            train=TrainConfig(tokens=500_000, log_every=20),
        )
    d_sae, tokens = DICTIONARIES[size]
    steps = tokens // 4096
    return Config(
        sae=JumpReLUConfig(
            d_sae=d_sae,
            normalize="unit",
            sparsity_coefficient=6e-4,
            sparsity_warmup_fraction=10_000 / steps,
            initial_threshold=0.001,
            bandwidth=0.001,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(batch_size=4096, window_rows=2**20),
        optimizer=OptimizerConfig(learning_rate=7e-5, warmup_fraction=1000 / steps, **adam),
        train=TrainConfig(tokens=tokens),
    )
