"""Evaluates many SAEs at once, and goes on where it was stopped.

SAEs of one kind, on the same rows, share one reading of them and runs of their language model
(`report.evaluate_each`), as many at a time as fit in memory.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax

from sae_jax.evaluate import report
from sae_jax.paths import AnyPath
from sae_jax.sae import SAE, SAEConfig
from sae_jax.train.directory import is_writer
from sae_jax.train.watching import at_once

_AT_ONCE = 32  # SAEs; of those that share a reading, a kill loses no more
_BYTES = 2**32  # of their parameters together, where the device does not say how much it has
_SHARE = 4  # the part of its memory that they may take otherwise


@dataclasses.dataclass(frozen=True)
class Job:
    """An SAE to evaluate.

    Attributes:
      name: what it is called.
      config: the SAE's config.
      load: reads it.
      out: the JSON file for its evaluation.
      settings: those of the evaluation (`report.full_settings`).
      overwrite: whether an evaluation with other settings is replaced.
    """

    name: str
    config: SAEConfig
    load: Callable[[], SAE]
    out: AnyPath
    settings: dict
    overwrite: bool = False

    @property
    def bytes(self) -> int:
        """The size of its parameters, about."""
        return 4 * self.config.d_sae * (self.config.d_in + (self.config.d_out or 0))


def read_done(jobs: list[Job]) -> dict[str, dict]:
    """Returns the evaluations that are there already, as `Evaluation.to_dict` has them, by name.

    One of an earlier checkpoint of the run is not, nor one that the job is to overwrite. Raises
    UserError where a job's file holds anything else but an evaluation with its settings.
    """
    found = at_once(lambda job: report.read_saved(job.out, job.settings, job.overwrite), jobs)
    return {job.name: saved for job, saved in zip(jobs, found, strict=True) if saved}


def evaluate_jobs(jobs: list[Job], source, model, spliced_tokens: int) -> Iterator[dict[str, dict]]:
    """Evaluates SAEs of one kind on one source, saves each, and yields what is new, by name.

    Args:
      jobs: the SAEs.
      source: the rows, as for `report.evaluate`.
      model: their language model, or None.
      spliced_tokens: about how many tokens to run it on.
    """
    for part in _parts(jobs):
        saes = [job.load() for job in part]
        settings = [job.settings for job in part]
        evaluations = report.evaluate_each(saes, source, model, spliced_tokens, settings)
        if is_writer():
            pairs = zip(evaluations, part, strict=True)
            at_once(lambda pair: report.save(pair[0], pair[1].out, pair[1].overwrite), pairs)
        del saes  # before those of the next part are read
        yield {job.name: found.to_dict() for job, found in zip(part, evaluations, strict=True)}


def _parts(jobs: list[Job]) -> Iterator[list[Job]]:
    """Yields as many jobs at a time as fit, those of like sizes together."""
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    limit = memory // _SHARE if memory else _BYTES
    part, size = [], 0
    for job in sorted(jobs, key=lambda job: job.bytes):
        if part and (len(part) == _AT_ONCE or size + job.bytes > limit):
            yield part
            part, size = [], 0
        part.append(job)
        size += job.bytes
    if part:
        yield part


def columns(evaluation: dict) -> dict[str, float | None]:
    """Returns the columns of a table of results for an evaluation of `Evaluation.to_dict`.

    They are named as those of a run's own held-out metrics are: eval_fvu, eval_l0,
    eval_dead_fraction, eval_rows, on how many rows these are, and with a language model
    eval_ce_recovered_zero and the like.
    """
    sparsity = {name: evaluation["sparsity"].get(name) for name in report.SPARSITY}
    parts = (evaluation["reconstruction"], sparsity, evaluation["language_model"])
    values = {"rows": evaluation["rows"]}
    for part in (*parts, evaluation["recovery"]):
        values |= part or {}
    return {f"eval_{name}": value for name, value in values.items()}
