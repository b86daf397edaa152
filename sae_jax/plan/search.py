"""Searches the meshes of a topology for the fastest that fits and for the least memory.

All meshes are traced (`estimate.screen`, a second each). Then the most promising ones are compiled,
in the order of their traced estimates, until the next one could only be better if its traced
estimate were further off than those of the meshes compiled so far.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from sae_jax import config as configs
from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.plan.chips import Topology
from sae_jax.plan.estimate import Estimate, candidates, estimate, least_bytes, screen
from sae_jax.progress_bar import progress

_SLACK = 0.9  # how much lower than the lowest so far compiled : traced may be for other meshes


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
      screened: the traced estimate of every mesh that may fit.
      compiled: the compiled estimates, in the order in which they were made.
      fastest: the estimate with the least time for a token; None where peaks are unknown, or
        nothing fits.
      least_memory: the estimate of least memory, the faster of equal ones; None where nothing fits.
    """

    screened: tuple[Estimate, ...]
    compiled: tuple[Estimate, ...]
    fastest: Estimate | None
    least_memory: Estimate | None


def variants(
    config: Config, count: int, batch_sizes: Sequence[int] = (), dtypes: Sequence[str] = ()
) -> list[Config]:
    """Returns `config` on every mesh of `count` devices, with every batch size and dtype.

    Args:
      config: a resolved config.
      count: the number of devices.
      batch_sizes: what to try for data.batch_size; nothing for the config's.
      dtypes: what to try for sae.compute_dtype; nothing for the config's.

    Raises UserError where no mesh divides a batch and the dictionary.
    """
    tried = []
    for batch, dtype in itertools.product(
        batch_sizes or [config.data.batch_size], dtypes or [config.sae.compute_dtype]
    ):
        fields = {"data.batch_size": batch, "sae.compute_dtype": dtype}
        tried += candidates(configs.assign(config, fields), count)
    if not tried:
        raise UserError(
            f"no mesh of {count} devices divides data.batch_size {config.data.batch_size} and "
            f"sae.d_sae {config.sae.d_sae}; change one of them, or the number of devices"
        )
    return tried


def check_batch_sizes(config: Config, batch_sizes: Sequence[int]) -> None:
    """Raises UserError for a batch size that the config's run cannot have."""
    if config.data.virtual_shards < 1:
        raise UserError(f"data.virtual_shards must be 1 or more, not {config.data.virtual_shards}")
    for batch in batch_sizes:
        if batch < 1 or batch % config.data.virtual_shards:
            raise UserError(
                f"a batch size of {batch} is no multiple of data.virtual_shards, "
                f"{config.data.virtual_shards}; choose one that is, or set that"
            )


def search(tried: Sequence[Config], topology: Topology, most: int) -> Found:
    """Returns the fastest config that fits a topology, and the one of least memory.

    Args:
      tried: the configs, as `variants` makes them.
      topology: the devices.
      most: the most configs to compile for each of the two, or until one fits. 0: the traced
        estimates decide.
    """
    possible = [config for config in tried if least_bytes(config) <= topology.capacity]
    screened = [
        screen(config, topology)
        for config in progress(possible, "tracing every mesh", len(possible), "program")
    ]
    compiled: dict[int, Estimate] = {}

    def confirm(cost: Callable[[Estimate], tuple]) -> Estimate | None:
        return _confirm(screened, cost, compiled, most)

    def time(e: Estimate) -> tuple:
        return float(f"{e.token_seconds:.2e}"), e.total  # of two as fast the smaller one

    fastest = confirm(time) if topology.chip else None
    least = confirm(lambda e: (e.total, e.token_seconds or 0))
    return Found(tuple(screened), tuple(compiled.values()), fastest, least)


def _confirm(
    screened: list[Estimate], cost: Callable, compiled: dict[int, Estimate], most: int
) -> Estimate | None:
    """Returns the estimate of least cost that fits, None where none does.

    Args:
      screened: the traced estimates.
      cost: what is to be least, a tuple whose first entry is positive.
      compiled: what has been compiled, by the place in `screened`; more is added.
      most: how many may be compiled, once one is found that fits.
    """
    order = sorted(range(len(screened)), key=lambda i: (not screened[i].fits, cost(screened[i])))
    if not most:
        return next((screened[i] for i in order if screened[i].fits), None)
    best, ratio, done = None, float("inf"), 0
    for i in progress(order, "compiling the best meshes", unit="program"):
        expected = cost(screened[i])[0]
        if best is not None and _SLACK * ratio * expected >= cost(best)[0]:
            continue
        if i not in compiled:
            if best is not None and done >= most:
                break
            compiled[i] = estimate(screened[i].config, screened[i].topology)
            done += 1
        found = compiled[i]
        if found.flops is not None:
            ratio = min(ratio, cost(found)[0] / expected)
        if found.fits and (best is None or cost(found) < cost(best)):
            best = found
    return best
