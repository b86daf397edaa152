"""The lengths of the parts of a run's schedules, in steps."""

import dataclasses

import jax

from sae_jax.config import Config

DECAYING = ("linear_tail", "warmup_stable_decay")  # the schedules
_DEAD_AFTER = 10_000_000  # tokens, in long runs (Gao et al. 2024; Templeton et al. 2024)
_DEAD_AFTER_PART = 8  # of the tokens of a shorter one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScheduleSteps:
    """The lengths of the parts of a run's schedules, in steps.

    They are numbers, or traced arrays in a program that runs of several lengths share.

    Attributes:
      steps: the whole run.
      warmup: the growth of the learning rate at the start.
      decay: the fall of the learning rate at the end.
      sparsity_warmup: the growth of the sparsity coefficient at the start.
      horizon: what running means average over: 1/20 of the run, at least 10 and at most 1,000.
    """

    steps: int
    warmup: int
    decay: int
    sparsity_warmup: int
    horizon: float

    @classmethod
    def from_config(cls, config: Config, steps: int) -> "ScheduleSteps":
        """Returns the lengths for a run of `steps` steps, by the fractions in its config."""
        return cls(
            steps=steps,
            warmup=round(config.optimizer.warmup_fraction * steps),
            decay=max(1, round(config.optimizer.decay_fraction * steps)),
            sparsity_warmup=round((config.sae.sparsity_warmup_fraction or 0) * steps),
            horizon=min(max(steps / 20, 10.0), 1000.0),
        )


def count_steps(config: Config) -> int:
    """Returns the number of steps of a run."""
    return config.train.tokens // config.data.batch_size


def has_trunk(config: Config) -> bool:
    """Whether nothing but the decay at the end of a run depends on how many steps it has.

    Until its decay begins such a run is the same as a longer one, if the warm-ups of both have
    equal numbers of steps. What they have in common is called their trunk.
    """
    return config.optimizer.schedule in DECAYING and not config.sae.anneals


def trunk_steps(config: Config) -> int | None:
    """Returns after how many steps the learning rate begins to fall; None if a run has no trunk."""
    if not has_trunk(config):
        return None
    steps = count_steps(config)
    return steps - ScheduleSteps.from_config(config, steps).decay


def kept_step(config: Config) -> int | None:
    """Returns the step whose checkpoint a run keeps besides the latest; None where it keeps none.

    It is the end of the run's trunk, where longer runs go on.
    """
    return trunk_steps(config) if config.train.keep_trunk else None


def dead_after_tokens(config: Config) -> int:
    """Returns for how many tokens a dead latent has not fired.

    It is what the config says. By default it is 10 million, or an eighth of a run that is shorter
    than 80 million tokens, which would otherwise end before it could know a latent to be dead.
    """
    if config.sae.dead_after_tokens is not None:
        return config.sae.dead_after_tokens
    return min(_DEAD_AFTER, max(config.data.batch_size, config.train.tokens // _DEAD_AFTER_PART))
