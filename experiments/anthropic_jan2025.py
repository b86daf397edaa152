"""JumpReLU SAEs with a tanh penalty: "Dictionary learning optimization techniques" (Circuits
Updates, January 2025).

  sae-jax train --config=anthropic_jan2025 --workdir=runs/jumprelu_tanh \\
      --config.data.store=stores/residual --config.mesh.model=8

lambda sum_i tanh(4 f_i ||W_dec,i||), lambda linear from 0 to 20 over the whole run; a small loss on
the pre-activations of latents that do not fire, against their death; thresholds from 0.1, a kernel
of width 2 with gradients to everything; batches of 32,768, the learning rate linear to 0 over the
last 20%. The dictionary and the steps are those of the April 2024 study, to compare with it.

Where public implementations disagree: lambda 10 to 20, here 20; W_dec uniform in 1 / d or in 1 /
sqrt(d), here of the latter's norm, 1 / sqrt(3); the threshold's logarithm is theirs to train, here
it is the threshold. They also set b_enc so that a latent fires 10,000 / d_sae of the time at first;
here b_enc starts at 0.

Operands of products are bfloat16, all else, thresholds too, is float32;
--config.sae.compute_dtype=float32 for these too. `:tiny` is the recipe on a laptop, of float32, for
the store of `sae-jax demo`, with lambda 2: so short a run at 20 leaves too few latents.
"""

from sae_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from sae_jax.errors import choose
from sae_jax.sae import JumpReLUConfig

SIZES = ("paper", "tiny")


def get_config(size: str = "paper") -> Config:
    choose(size, SIZES, "the size of anthropic_jan2025")
    recipe = {
        "sparsity_loss": "tanh",
        "sparsity_warmup_fraction": 1.0,
        "tanh_scale": 4.0,
        "preactivation_coefficient": 3e-6,
        "initial_threshold": 0.1,
        "bandwidth": 2.0,
        "gradient_to": "all",
        "apply_b_dec_to_input": False,
        "unit_norm_decoder": False,
        "decoder_init_norm": 3**-0.5,
    }
    if size == "tiny":
        return Config(
            sae=JumpReLUConfig(
                d_sae=1024, sparsity_coefficient=2.0, dead_after_tokens=200_000, **recipe
            ),
            data=DataConfig(store="sae_demo/store", site="mlp_act.0", batch_size=1024),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            train=TrainConfig(tokens=500_000, log_every=20),
        )
    return Config(
        sae=JumpReLUConfig(
            d_sae=131_072, sparsity_coefficient=20.0, compute_dtype="bfloat16", **recipe
        ),
        data=DataConfig(batch_size=32_768),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_fraction=0.0),
        train=TrainConfig(tokens=200_000 * 32_768),
    )
