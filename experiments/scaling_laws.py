"""Sweeps for scaling laws: loss against compute, and loss against dictionary size and k.

  sae-jax sweep --config=scaling_laws:tiny --workdir=sweeps/compute
  sae-jax fit --results=sweeps/compute --law=isoflop --predict_flops=5e12 --out=fits/compute

Loss against compute is the study of "Scaling Monosemanticity" (Templeton et al. 2024, Scaling
Laws): ReLU SAEs with lambda fixed at 5, every dictionary size with every number of tokens, the
batch fixed. Here the learning rate falls with 1/sqrt(d_sae), and the token budgets of a size branch
from one trunk. Loss against d_sae and k is L(n, k) of Gao et al. 2024 (section 3.1.3): TopK SAEs
at a fixed number of tokens.

  :tiny       6 sizes x 5 budgets on the store that `sae-jax demo` leaves: minutes on two cores
  :tiny-nk    5 sizes x 4 k on the same
  :frontier   6 sizes, 2^15 to 2^20, x 5 budgets up to 8B tokens: give a store and a mesh, and as
              many workers as there are passes:
              --config.data.store=STORE --config.data.site=SITE --config.mesh.model=8 --passes=6
  :frontier-nk  L(n, k) at the same sizes

The frontiers' operands of products are bfloat16 and all else float32;
--config.sae.compute_dtype=float32 for these too.
"""

from sae_jax.config import Config, DataConfig, TrainConfig
from sae_jax.errors import choose
from sae_jax.sae import ReLUConfig, TopKConfig
from sae_jax.sweep import grid

# Of each: dictionary sizes, token budgets, the learning rate of the size beside it, batch, warm-up
# in tokens. Of rates 5e-4 to 8e-3 at 128, 512 and 2,048 latents, 4e-3 to 8e-3 were best.
# The frontier's rate is a place to start: sweep it first (grid.learning_rates with factors).
COMPUTE = {
    "tiny": {
        "d_sae": [64, 128, 256, 512, 1024, 2048],
        "tokens": [50_000, 100_000, 200_000, 400_000, 800_000],
        "rate": (6e-3, 512),
        "batch_size": 512,
        "warmup_tokens": 10_000,
    },
    "frontier": {
        "d_sae": [2**i for i in range(15, 21)],
        "tokens": [500_000_000 * 2**i for i in range(5)],
        "rate": (1e-4, 2**17),
        "batch_size": 8192,
        "warmup_tokens": 20_000_000,
    },
}
NK = {
    "tiny-nk": {
        "d_sae": [128, 256, 512, 1024, 2048],
        "k": [1, 2, 4, 8],
        "tokens": 500_000,
        "rate": (4e-3, 512),
        "batch_size": 512,
    },
    "frontier-nk": {
        "d_sae": [2**i for i in range(15, 21)],
        "k": [16, 32, 64, 128, 256],
        "tokens": 8_000_000_000,
        "rate": (2e-4, 2**14),
        "batch_size": 131_072,
    },
}

SIZES = (*COMPUTE, *NK)


def get_config(design: str = "tiny") -> Config:
    plan = _plan(design)
    frontier = design.startswith("frontier")
    dtype = "bfloat16" if frontier else "float32"
    if design in COMPUTE:
        sae = ReLUConfig(sparsity_coefficient=5.0, compute_dtype=dtype)
    else:
        sae = TopKConfig(compute_dtype=dtype)
    return Config(
        sae=sae,
        data=DataConfig(
            store="" if frontier else "sae_demo/store",
            site="" if frontier else "resid_post.0",
            batch_size=plan["batch_size"],
            epochs=1 if frontier else 2,
        ),
        train=TrainConfig(
            tokens=plan["tokens"] if design in NK else max(plan["tokens"]),
            log_every=100,
            checkpoint_every=2000,
        ),
    )


def get_sweep(design: str = "tiny") -> grid.Grid:
    plan = _plan(design)
    rate, at = plan["rate"]
    if design in NK:
        return grid.learning_rates(grid.nk(plan["d_sae"], plan["k"]), rate, at=at)
    sizes = grid.learning_rates(grid.sweep("sae.d_sae", plan["d_sae"]), rate, at=at)
    budgets = grid.budgets(
        plan["tokens"],
        batch_size=plan["batch_size"],
        warmup_tokens=plan["warmup_tokens"],
        sparsity_warmup_tokens=plan["warmup_tokens"],
    )
    return grid.product(sizes, budgets)


def _plan(design: str) -> dict:
    plans = COMPUTE | NK
    return plans[choose(design, plans, "the design of scaling_laws")]
