"""How many steps the parts of a run have."""

import dataclasses

import jax

from sae_jax.config import Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScheduleSteps:
    """In steps. Numbers; traced in a program that runs of several budgets share."""

    steps: int  # the whole run
    warmup: int  # of the learning rate
    decay: int  # of the learning rate, at the end
    sparsity_warmup: int  # until the sparsity coefficient has its full value
    horizon: float  # of running means: 1/20 of the run, at least 10 and at most 1,000

    @classmethod
    def from_config(cls, config: Config, steps: int) -> "ScheduleSteps":
        """The lengths of a run of so many steps."""
        return cls(
            steps=steps,
            warmup=round(config.optimizer.warmup_fraction * steps),
            decay=max(1, round(config.optimizer.decay_fraction * steps)),
            sparsity_warmup=round((config.sae.sparsity_warmup_fraction or 0) * steps),
            horizon=min(max(steps / 20, 10.0), 1000.0),
        )
