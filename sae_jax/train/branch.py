"""Branches: runs that go on from a checkpoint of another run.

A branch has the optimiser's state of that run and its place in the data. It changes what does not
say what the state is: the learning rate, the sparsity, the number of tokens. A branch that changes
nothing is the run that it left, bit for bit. An extension is a branch off the run's trunk, and is
the longer run, bit for bit.
"""

import contextlib
import dataclasses
import re

import jax
from absl import logging

from sae_jax import config as configs
from sae_jax import paths
from sae_jax import sae as saes
from sae_jax.config import Config, DataConfig
from sae_jax.errors import UserError, some
from sae_jax.paths import AnyPath
from sae_jax.train import optimizer
from sae_jax.train.checkpoints import Checkpoints, saved_steps
from sae_jax.train.directory import (
    Ancestor,
    data_fingerprint,
    find_store,
    read_config,
    read_lineage,
    run_there,
)
from sae_jax.train.results import run_id
from sae_jax.train.schedule_steps import ScheduleSteps, count_steps, trunk_steps
from sae_jax.train.step import Trainer, TrainState, idleness

# What says what the state is, or where in the data the run is.
_KEPT = {
    "sae": (
        *("architecture", "kind", "d_in", "d_out", "d_sae", "site_widths", "normalize"),
        *("apply_b_dec_to_input", "unit_norm_decoder", "decoder_init_norm", "b_dec_init"),
    ),
    "data": tuple(
        field.name
        for field in dataclasses.fields(DataConfig)
        if field.name not in ("store", "epochs")
    ),
    "train": ("seed", "init"),
}
# What an extension may change: it is no part of the trunk.
_NOT_OF_THE_TRUNK = (
    *("optimizer.schedule", "optimizer.decay_fraction", "data.store", "data.epochs"),
    *("train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.keep_trunk"),
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint that a branch goes on from.

    Attributes:
      run: the directory of the run.
      step: the checkpoint's step.
      config: the run's config.
    """

    run: AnyPath
    step: int
    config: Config

    @classmethod
    def open(cls, name: str) -> "Origin":
        """Finds the checkpoint that `name` means: RUN/checkpoints/STEP, or RUN for its latest.

        Raises UserError if there is no run, or it has no such checkpoint.
        """
        run, step = split(name)
        config = read_config(run)
        steps = saved_steps(run)
        if not steps:
            raise UserError(f"{run} holds no checkpoint to branch from; train it first")
        if step is not None and step not in steps:
            raise UserError(
                f"{run} holds no checkpoint of step {step} to branch from, only of {steps}; a run "
                "keeps its latest ones (train.keep_checkpoints), and where its decay begins"
            )
        return cls(run, max(steps) if step is None else step, config)

    @property
    def name(self) -> str:
        """The checkpoint as RUN/checkpoints/STEP, which is how a config names it."""
        return str(self.run / "checkpoints" / str(self.step))

    def branch(self) -> Config:
        """Returns the config of the branch that changes nothing."""
        config = configs.assign(self.config, {"train.branch_from": self.name})
        return dataclasses.replace(config, data=find_store(self.run, config.data))

    def check(self, config: Config, fingerprint: str) -> None:
        """Checks that a run of `config` can go on from here.

        Args:
          config: the resolved config.
          fingerprint: that of its data.

        Raises UserError, naming what differs, for other data, another dictionary, or fewer tokens.
        """
        changed = configs.difference(_kept(self.config), _kept(config))
        if idleness(self.config)[0] != idleness(config)[0]:  # of tokens, or of steps
            changed.append(
                f"sae.dead_after_tokens: {self.config.sae.dead_after_tokens} -> "
                f"{config.sae.dead_after_tokens}"
            )
        if changed:
            raise UserError(
                f"a branch of {self.run} keeps its data, its order and its dictionary, but here is "
                f"{some(changed, 4)}; leave that out, or start a new run with its SAE: "
                f"--config.train.init={self.name}"
            )
        began_with = data_fingerprint(self.run)
        if began_with != fingerprint and (
            began_with is not None or config.data.store != self.config.data.store
        ):
            raise UserError(
                f"{config.data.store} is not the data that {self.run} was trained on, in which a "
                "branch goes on; give --config.data.store=STORE, or start a new run with its SAE: "
                f"--config.train.init={self.name}"
            )
        if count_steps(config) <= self.step:
            raise UserError(
                f"train.tokens {config.train.tokens} end at step {count_steps(config)}, and the "
                f"branch begins at step {self.step} of {self.run}; give more tokens, or an earlier "
                "checkpoint"
            )

    def restore(self, trainer: Trainer, variance: float) -> TrainState:
        """Returns the state that a branch begins with, on the shardings of its own.

        Args:
          trainer: that of the branch.
          variance: the variance of the scaled targets, as for `Trainer`.

        Raises UserError if the checkpoint cannot be read, or if it has other parameters than the
        branch's config describes.
        """
        like = trainer.abstract()
        config = dataclasses.replace(self.config, mesh=trainer.config.mesh)
        saved = Trainer(config, count_steps(config), variance).abstract()
        if _shapes(saved) != _shapes(like):
            raise UserError(
                f"the branch's config describes other parameters than {self.name} has; leave out "
                "what changes their shapes"
            )
        with contextlib.closing(Checkpoints(self.run, None, self.config)) as checkpoints:
            state = checkpoints.restore(saved, self.step)
        # With a clip_norm, or without, the parts of the optimiser have other places in the chain.
        moments = jax.tree.unflatten(
            jax.tree.structure(like.optimizer), jax.tree.leaves(state.optimizer)
        )
        logging.info("went on from step %d of %s", self.step, self.run)
        return dataclasses.replace(state, optimizer=moments)

    def changed(self, config: Config) -> list[str]:
        """Returns a line "section.field: a -> b" for each field that a branch with a resolved
        config changes.
        """
        before, after = configs.identity(self.config), configs.identity(config)
        for values in (before, after):
            values["train"].pop("branch_from", None)
            values["data"].pop("store")
        return configs.difference(before, after)

    def lineage(self, config: Config) -> list[dict]:
        """Returns what config.json notes of a branch with a resolved config: its ancestors.

        The eldest is first; `directory.Ancestor` has the fields.
        """
        parent = Ancestor(
            run=str(self.run),
            run_id=run_id(self.config),
            step=self.step,
            tokens=self.step * self.config.data.batch_size,
            changed=self.changed(config),
        )
        return [dataclasses.asdict(run) for run in (*read_lineage(self.run), parent)]


def split(name: str) -> tuple[AnyPath, int | None]:
    """Returns the directory of the run in RUN/checkpoints/STEP, and the step, None for RUN alone.

    Raises UserError for a place that cannot be one.
    """
    found = re.fullmatch(r"(.+?)/checkpoints/([0-9]{1,18})/*", name)
    return (paths.path(found[1]), int(found[2])) if found else (paths.path(name), None)


def find(
    name: str, tokens: int | None, overrides: dict[str, str], workdir: str | AnyPath | None
) -> Config:
    """Returns the config of a branch, or of an extension.

    Args:
      name: the checkpoint to go on from, RUN/checkpoints/STEP, or RUN.
      tokens: how many tokens the longer run has, from its beginning; None for a branch.
      overrides: fields that are changed, as text.
      workdir: the directory of the branch. If it is there it stays what it is, also where the run
        that it left is gone, or has other checkpoints by now.

    Raises UserError as `Origin.open` and `extension` do, and if there is another run in `workdir`.
    """
    there = None if workdir is None else run_there(paths.path(workdir))
    if there is not None:
        _check_same(there, name, tokens, workdir)
        return configs.override(there, overrides)
    if tokens is not None:
        return extension(name, tokens, overrides)
    return configs.override(Origin.open(name).branch(), overrides)


def _check_same(there: Config, name: str, tokens: int | None, workdir: str | AnyPath) -> None:
    """Raises UserError if a run that is there is not the branch that is asked for."""
    (run, step), begun = split(name), there.train.branch_from
    found, found_step = split(begun) if begun else (None, None)
    if found is None or found.absolute() != run.absolute() or step not in (None, found_step):
        raise UserError(
            f"{workdir} holds a run that is {f'a branch of {begun}' if begun else 'no branch'}, "
            f"not one of {name}; give the branch another --workdir"
        )
    if tokens is not None and tokens // there.data.batch_size != count_steps(there):
        raise UserError(
            f"{workdir} holds a run of {there.train.tokens} tokens, not {tokens}; give the longer "
            "run another --workdir"
        )


def extension(name: str, tokens: int, overrides: dict[str, str]) -> Config:
    """Returns the config of the run at `name`, made longer.

    It goes on from the last checkpoint of the run's trunk: there the longer run is the same, as it
    has equal warm-ups, and its decay, of the same fraction, begins later.

    Args:
      name: the run's directory.
      tokens: the tokens of the longer run, from the beginning.
      overrides: fields that are no part of the trunk, as text, such as optimizer.decay_fraction.

    Raises UserError if the run is as long already, if its schedule has no trunk, if there is no
    checkpoint of the trunk, or for another field.
    """
    run, step = split(name)
    if step is not None:
        raise UserError(
            f"an extension goes on from the last checkpoint of the trunk; give --branch_from={run} "
            "without a step, or leave --extend_tokens out"
        )
    for field in overrides:
        if field not in _NOT_OF_THE_TRUNK and not field.startswith("mesh."):
            raise UserError(
                f"--config.{field} would make it another run than {run}, not a longer one; leave "
                f"it out, or branch with it: --branch_from={run}/checkpoints/STEP"
            )
    config = read_config(run)
    longer = _with_warmups_of(configs.assign(config, {"train.tokens": tokens}), config)
    longer = configs.override(longer, overrides)
    optimizer.check(longer.optimizer)
    before, steps = count_steps(config), count_steps(longer)
    if steps <= before:
        raise UserError(
            f"--extend_tokens={tokens} are {steps} steps, and {run} has {before} already "
            f"({config.train.tokens} tokens); give more"
        )
    go_on = f"--branch_from={run} --config.train.tokens={tokens}"
    ends = [_trunk_end(config), _trunk_end(longer)]
    if None in ends:
        schedule = (config if ends[0] is None else longer).optimizer.schedule
        why = f"the schedule {schedule}"
        if config.sae.anneals:
            why = "settings of its SAE that change along the run (k_start, p_end or target_l0)"
        raise UserError(
            f"{run} has {why}: a longer run differs from its first step on; train that from the "
            f"beginning, or go on with what is there: {go_on}"
        )
    saved = saved_steps(run)
    trunk = [step for step in saved if step <= min(ends)]
    if not trunk:
        raise UserError(
            f"{run} has no checkpoint of its trunk, from which a longer run could go on: it ends "
            f"at step {min(ends)}, and there are {saved or 'none'} (train.keep_trunk keeps one, "
            "earlier versions did not); train the longer run from the beginning"
            + (f", or go on after the decay: {go_on}" if saved else "")
        )
    means = saes.architecture(config.sae).RUNNING_MEANS
    horizons = {ScheduleSteps.from_config(c, count_steps(c)).horizon for c in (config, longer)}
    if means and len(horizons) > 1:
        logging.warning(
            "the %s of the longer run is at first a mean over fewer steps than if it had been "
            "trained from the beginning; all else is the same",
            some(means),
        )
    changed = configs.difference(configs.to_dict(config), configs.to_dict(longer))
    logging.info(
        "the longer run keeps the steps of the warm-up and sae.dead_after_tokens %d; it changes %s",
        longer.sae.dead_after_tokens,
        some(changed),
    )
    return Origin(run, max(trunk), longer).branch()


def _with_warmups_of(longer: Config, config: Config) -> Config:
    """Returns `longer` with warm-ups of as many steps as `config` has."""
    lengths, steps = ScheduleSteps.from_config(config, count_steps(config)), count_steps(longer)
    fields = {"optimizer.warmup_fraction": lengths.warmup / steps}
    if lengths.sparsity_warmup:
        fields["sae.sparsity_warmup_fraction"] = lengths.sparsity_warmup / steps
    return configs.assign(longer, fields)


def _kept(config: Config) -> dict:
    """Returns the fields that a branch must not change, as plain values in their sections."""
    values = configs.to_dict(config)
    return {s: {name: values[s].get(name) for name in names} for s, names in _KEPT.items()}


def _trunk_end(config: Config) -> int | None:
    """Returns the step up to which a longer run is the same; None where there is no such step."""
    if config.optimizer.schedule == "constant" and not config.sae.anneals:
        return count_steps(config)
    return trunk_steps(config)


def _shapes(state: TrainState) -> list[tuple]:
    """Returns names and shapes of what a state consists of, without places in the optimiser."""
    parameters = sorted((name, leaf.shape) for name, leaf in state.parameters.items())
    return [parameters, [leaf.shape for leaf in jax.tree.leaves(state.optimizer)]]
