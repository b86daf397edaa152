"""What a config asks for and a run of its length does not do.

Schedules are parts of a run, and so is what counts as a dead latent. In a short run a part may come
to no step at all, and Adam's steps, whose length is the learning rate, may not lead anywhere.
"""

import math

from sae_jax.config import Config
from sae_jax.train import resample
from sae_jax.train.schedule_steps import DECAYING, ScheduleSteps, count_steps, dead_after_tokens

_LEAST_TRAVEL = 0.1  # of a parameter: its steps times their length, at which little is learnt yet
_LEAST_TRAVEL_TO_TARGET = 1.0  # from half the latents firing to a few
_LEAST_STEPS_TO_TARGET = 100
_LEAST_PART_AT_END = 0.05  # of a run, in which k is what it was annealed to


def doubts(config: Config) -> dict[str, str]:
    """Returns what a run of a resolved config will not do, in words, by the field that asks for it.

    Each is one sentence, with what to set instead. It is empty where the run is long enough.
    """
    steps = count_steps(config)
    lengths = ScheduleSteps.from_config(config, steps)
    return (
        _learning_rate(config, lengths)
        | _target(config, steps)
        | _annealing(config, steps)
        | _dead_latents(config, steps)
    )


def _learning_rate(config: Config, lengths: ScheduleSteps) -> dict[str, str]:
    adam, out = config.optimizer, {}
    travel = adam.learning_rate * lengths.steps
    needed, how = _LEAST_TRAVEL, ""
    if config.sae.target_l0 is not None:
        needed, how = _LEAST_TRAVEL_TO_TARGET, ", or to none, for one that reaches target_l0"
    if travel < needed:
        out["optimizer.learning_rate"] = (
            f"optimizer.learning_rate {adam.learning_rate:.3g} moves no parameter by more than "
            f"{travel:.2g} in {lengths.steps} steps, where {needed:g} is little; train longer, or "
            f"set it to {_rounded_up(needed / lengths.steps):.2g} or more{how}"
        )
    if adam.warmup_fraction and not lengths.warmup:
        out["optimizer.warmup_fraction"] = (
            f"optimizer.warmup_fraction {adam.warmup_fraction:.3g} is none of {lengths.steps} "
            "steps: the learning rate does not warm up"
        )
    if adam.schedule in DECAYING and round(adam.decay_fraction * lengths.steps) < 1:
        out["optimizer.decay_fraction"] = (
            f"optimizer.decay_fraction {adam.decay_fraction:.3g} is none of {lengths.steps} steps: "
            f"the learning rate never decays, though optimizer.schedule is {adam.schedule}"
        )
    return out


def _rounded_up(value: float) -> float:
    """Returns the next number of two digits, so that who sets it is told no more."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit - 1e-9) * unit


def _target(config: Config, steps: int) -> dict[str, str]:
    if config.sae.target_l0 is None or steps >= _LEAST_STEPS_TO_TARGET:
        return {}
    return {
        "sae.target_l0": f"sae.target_l0 {config.sae.target_l0:g} is rarely reached in {steps} "
        f"steps; train {_LEAST_STEPS_TO_TARGET} or more, by more train.tokens or a smaller "
        "data.batch_size"
    }


def _annealing(config: Config, steps: int) -> dict[str, str]:
    sae, out = config.sae, {}
    if sae.k_start is not None and sae.k_start != sae.k:
        changing = round(sae.k_anneal_fraction * steps)
        if changing < 2:
            out["sae.k_start"] = (
                f"sae.k_start {sae.k_start} is k for one step only, since sae.k_anneal_fraction "
                f"{sae.k_anneal_fraction:g} is no more of {steps} steps; set a larger one"
            )
        elif steps - changing < _LEAST_PART_AT_END * steps:
            out["sae.k_anneal_fraction"] = (
                f"sae.k {sae.k} is reached {steps - changing} steps before the end of {steps}; set "
                f"sae.k_anneal_fraction, now {sae.k_anneal_fraction:g}, lower"
            )
    if sae.p_end < 1 and steps - 1 - sae.p_anneal_start * steps < 1:
        out["sae.p_anneal_start"] = (
            f"the exponent does not come to sae.p_end {sae.p_end:g} in {steps} steps; set "
            f"sae.p_anneal_start, now {sae.p_anneal_start:g}, lower"
        )
    warmup = sae.sparsity_warmup_fraction
    if sae.sparsity_coefficient and warmup and round(warmup * steps) < 1:
        out["sae.sparsity_warmup_fraction"] = (
            f"sae.sparsity_warmup_fraction {warmup:.3g} is none of {steps} steps: the coefficient "
            "is whole from the first step on"
        )
    return out


def _dead_latents(config: Config, steps: int) -> dict[str, str]:
    sae, batch = config.sae, config.data.batch_size
    tokens, window = steps * batch, dead_after_tokens(config)
    if window >= tokens:
        idle = ["AuxK does nothing"] if sae.aux_coefficient else []
        idle += ["resampling does nothing"] if sae.resample_every_tokens else []
        so = " and ".join([*idle, "dead_fraction is null"])
        return {
            "sae.dead_after_tokens": f"sae.dead_after_tokens {window} is no less than the run's "
            f"{tokens} tokens, so {so}; leave it out for "
            "an eighth of the run"
        }
    asked = resample.steps(config)
    done = [step for step in asked if step < steps and step * batch >= window]
    if len(done) == len(asked):
        return {}
    return {
        "sae.resample_every_tokens": f"sae.resample_every_tokens {sae.resample_every_tokens} asks "
        f"for {len(asked)} resamplings, of which {len(done)} are before the end of the run's "
        f"{tokens} tokens and after sae.dead_after_tokens {window}; lower them, or "
        "sae.resample_times"
    }
