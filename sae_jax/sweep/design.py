"""Groups the runs of a sweep into packs and passes: what can be trained together.

A pack is a set of runs that one program trains (`train.pack`): they have one shape and one budget.
Packs of different budgets that are the same until the shorter ones begin to decay share a trunk:
the longest pack is trained, and each shorter one branches off from its state (Hagele et al. 2024,
"Scaling laws and compute-optimal training beyond fixed training durations"). A pass is a set of
packs that read the same rows of a store, once, each pack the sites of its own; a worker claims it
as a whole.

All of it is a function of the runs alone, so that every worker finds the same passes.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence

from sae_jax import config as configs
from sae_jax import sae as saes
from sae_jax.activations import is_world
from sae_jax.activations.sites import split_names
from sae_jax.config import Config, DataConfig
from sae_jax.train.pack import VARIED, get_field, set_fields
from sae_jax.train.results import flops, run_id
from sae_jax.train.schedule_steps import ScheduleSteps, count_steps, has_trunk, trunk_steps

__all__ = ["VARIED", "Pack", "Pass", "make_passes", "trunk_key"]

_WINDOW_BYTES = 16 << 30  # of host memory, for the two windows of a pass at 16 bits a number
_LARGEST_SHARE = 1.2  # of the mean compute of a pass; above it the largest family is cut in two


@dataclasses.dataclass(frozen=True)
class Pack:
    """Runs that differ only in the fields `VARIED`, and are trained by one program.

    Attributes:
      runs: the resolved configs of the runs.
      trunk: the index in its pass of the pack that this one branches off; None where it starts
        afresh.
      start: the step of the trunk at which it branches off.
      parents: for each run, the index of the trunk's run whose state it goes on from.
    """

    runs: tuple[Config, ...]
    trunk: int | None = None
    start: int = 0
    parents: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """The number of steps of each run."""
        return count_steps(self.runs[0])

    @property
    def flops(self) -> int:
        """The FLOPs that are spent on the pack, from where it leaves its trunk: 12 n d a token."""
        run = self.runs[0]
        return len(self.runs) * flops(run, (self.steps - self.start) * run.data.batch_size)["flops"]


@dataclasses.dataclass(frozen=True)
class Pass:
    """Packs that are trained together over one reading of the data.

    Attributes:
      name: the pass's name, which no other pass of the sweep has.
      packs: its packs, each after the trunk that it branches off.
    """

    name: str
    packs: tuple[Pack, ...]

    @property
    def runs(self) -> tuple[Config, ...]:
        """The configs of all runs, pack by pack."""
        return tuple(run for pack in self.packs for run in pack.runs)

    @property
    def data(self) -> DataConfig:
        """The data section that reads the sites of all runs."""
        return reading(self.runs)

    @property
    def steps(self) -> int:
        """The number of steps of the longest run."""
        return max(pack.steps for pack in self.packs)

    @property
    def flops(self) -> int:
        """The FLOPs of all packs."""
        return sum(pack.flops for pack in self.packs)


def reading(runs: Sequence[Config]) -> DataConfig:
    """Returns the data section that reads what all of some runs of a pass read, each site once."""
    data = runs[0].data
    if len(set(map(_sites, runs))) == 1:
        return data
    union = dict.fromkeys(site for run in runs for site in _sites(run))
    return dataclasses.replace(data, site=",".join(union), target_site="")


def _sites(run: Config) -> tuple[str, ...]:
    """Returns the sites that a resolved run reads, its target's last."""
    target = [run.data.target_site] if run.data.target_site else []
    return (*split_names(run.data.site), *target)


def make_passes(runs: Sequence[Config], passes: int = 1) -> list[Pass]:
    """Groups resolved runs into passes over the data.

    Runs whose data configs differ in nothing but the sites share a pass, up to as many sites as
    memory may hold windows of. Further passes cut its work for more workers, and each reads the
    data once.

    Args:
      runs: resolved configs.
      passes: the number of passes for each reading. They have about equal compute, and are fewer
        where there are not as many runs.
    """
    made = []
    for group in _readings(runs):
        families: list[_Family] = []
        for alike in _group_by(group, _sharing_key):
            families += _make_families(alike)
        for share in _split_evenly(families, passes):
            packs: list[Pack] = []
            for family in share:
                packs += _make_packs(family, len(packs))
            made.append(Pass(_pass_name(packs), tuple(packs)))
    return made


def _readings(runs: Sequence[Config]) -> list[list[Config]]:
    """Groups the runs that one reading of the data serves."""
    groups = []
    for alike in _group_by(runs, _rows_key):
        left = 0
        for of_sites in _group_by(alike, _sites):
            sae = of_sites[0].sae
            width = sae.d_in + (sae.d_out if of_sites[0].data.target_site else 0)
            if width > left:
                groups.append([])
                left = _WINDOW_BYTES // (2 * 2 * of_sites[0].data.window_rows)
            groups[-1] += of_sites
            left -= width
    return groups


def _rows_key(run: Config) -> dict:
    """Returns what says which rows a run reads, as JSON values: its data config without the sites.

    A synthetic world computes its rows, which reading together would not spare.
    """
    data = configs.to_dict(run)["data"]
    return data if is_world(run.data.store) else data | {"site": "", "target_site": ""}


# Runs that share a trunk: a list of runs for each budget, the largest budget first. Each run of a
# smaller budget is the same as one of the largest's until it begins to decay.
_Family = list[list[Config]]


def _sharing_key(run: Config) -> dict:
    """Returns what the runs of a family have in common, as JSON values.

    It is all but the fields `VARIED` and, where runs of several budgets can share a trunk, the
    budget.
    """
    key = configs.identity(set_fields(run, dict.fromkeys(VARIED)))
    key["given"] = [get_field(run, field) is None for field in VARIED]
    if not 0 <= run.train.seed < 2**31:  # what an int32, an argument of the program, holds
        key["train"]["seed"] = run.train.seed
    if not has_trunk(run) or run.train.branch_from:
        return key
    lengths = ScheduleSteps.from_config(run, count_steps(run))
    key["train"].pop("tokens")
    key["optimizer"].pop("warmup_fraction")
    key["sae"].pop("sparsity_warmup_fraction", None)
    key["absolute"] = [lengths.warmup, lengths.sparsity_warmup]
    if saes.architecture(run.sae).RUNNING_MEANS:
        key["absolute"].append(lengths.horizon)
    return key


@functools.lru_cache(maxsize=4096)
def trunk_key(run: Config) -> str | None:
    """Returns what two runs agree in that are the same until the first of them begins to decay.

    It is None for a run without a trunk, and for one that begins at another's checkpoint.
    """
    if not has_trunk(run) or run.train.branch_from:
        return None
    return json.dumps([_sharing_key(run), _varied_values(run)], sort_keys=True)


def _make_families(runs: list[Config]) -> list[_Family]:
    """Groups runs with one sharing key into families.

    A run goes into the family of a run that is the same but for a larger budget. Runs without one
    make a family of their own.
    """
    families = []
    while runs:
        budgets = sorted(_group_by(runs, count_steps), key=lambda b: -count_steps(b[0]))
        trunk = {_varied_values(run) for run in budgets[0]}
        family = [budgets[0]]
        left = []
        for budget in budgets[1:]:
            branches = [run for run in budget if _varied_values(run) in trunk]
            left += [run for run in budget if _varied_values(run) not in trunk]
            if branches:
                family.append(branches)
        families.append(family)
        runs = left
    return families


def _varied_values(run: Config) -> tuple:
    """Returns the run's values of the fields `VARIED`."""
    return tuple(get_field(run, field) for field in VARIED)


def _make_packs(family: _Family, place: int) -> list[Pack]:
    """Makes the packs of a family whose trunk has the index `place` in its pass."""
    trunk = Pack(tuple(family[0]))
    parents = {_varied_values(run): i for i, run in enumerate(trunk.runs)}
    packs = [trunk]
    for runs in family[1:]:
        packs.append(
            Pack(
                tuple(runs),
                trunk=place,
                start=trunk_steps(runs[0]),
                parents=tuple(parents[_varied_values(run)] for run in runs),
            )
        )
    return packs


def _split_evenly(families: list[_Family], count: int) -> list[list[_Family]]:
    """Splits families into `count` shares of about equal compute.

    The largest family is cut in two for as long as that is needed and possible.
    """
    while True:
        shares: list[list[_Family]] = [[] for _ in range(min(count, len(families)))]
        for family in sorted(families, key=_cost, reverse=True):
            min(shares, key=_total_cost).append(family)
        largest = max(max(shares, key=_total_cost), key=_cost)
        fair = _total_cost(families) / count
        if max(map(_total_cost, shares)) < _LARGEST_SHARE * fair or len(largest[0]) == 1:
            return shares
        at = families.index(largest)
        families = [*families[:at], *_split_family(largest), *families[at + 1 :]]


def _total_cost(families: list[_Family]) -> int:
    """Returns the FLOPs of families."""
    return sum(map(_cost, families))


def _cost(family: _Family) -> int:
    """Returns the FLOPs of a family."""
    return sum(pack.flops for pack in _make_packs(family, 0))


def _split_family(family: _Family) -> list[_Family]:
    """Cuts the runs of the trunk into two halves, each with its own branches."""
    middle = (len(family[0]) + 1) // 2
    halves = []
    for part in (family[0][:middle], family[0][middle:]):
        kept = {_varied_values(run) for run in part}
        budgets = [[run for run in budget if _varied_values(run) in kept] for budget in family]
        halves.append([budget for budget in budgets if budget])
    return halves


def _pass_name(packs: list[Pack]) -> str:
    """Returns the name of a pass, by its first run, which is in no other pass."""
    return f"pass-{run_id(packs[0].runs[0])}"


def _group_by(items: Iterable[Config], key: Callable[[Config], object]) -> list[list[Config]]:
    """Groups items with equal keys (as JSON), in the order of each group's first item."""
    groups: dict[str, list[Config]] = {}
    for item in items:
        groups.setdefault(json.dumps(key(item), sort_keys=True), []).append(item)
    return list(groups.values())
