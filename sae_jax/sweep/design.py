"""From runs to packs, trunks and passes: what can be trained together.

A pack is runs of one shape and one budget: one program (`train.pack`). Packs of several budgets
that agree until the shorter ones begin to decay share a trunk: the longest pack is trained, and
each shorter one branches off from its state (Hagele et al. 2024, "Scaling laws and compute-optimal
training beyond fixed training durations"). A pass is packs that read the same data, once; a worker
claims it as a whole. All of it is a function of the runs alone, so that every worker sees the same.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence

from sae_jax import config as configs
from sae_jax import sae as saes
from sae_jax.config import Config
from sae_jax.train import controls
from sae_jax.train.pack import VARIED, get_field, set_fields
from sae_jax.train.results import flops, run_id
from sae_jax.train.schedule_steps import ScheduleSteps

__all__ = ["VARIED", "Pack", "Pass", "make_passes"]

_BRANCHING_SCHEDULES = ("linear_tail", "warmup_stable_decay")
_UNFAIR = 1.2  # times the mean compute of a pass: then its largest packs are cut in two


@dataclasses.dataclass(frozen=True)
class Pack:
    """Runs that are the same but for `VARIED`. `trunk`: the place in its pass of the pack whose
    state after `start` steps is this one's, with the trunk's runs `parents`; or None."""

    runs: tuple[Config, ...]
    trunk: int | None = None
    start: int = 0
    parents: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        return count_steps(self.runs[0])

    @property
    def flops(self) -> int:
        """That are spent on it: 12 n d a token, from where it leaves its trunk."""
        run = self.runs[0]
        return len(self.runs) * flops(run, (self.steps - self.start) * run.data.batch_size)["flops"]


@dataclasses.dataclass(frozen=True)
class Pass:
    """Packs that are trained together over one reading of the data, trunks before branches."""

    name: str
    packs: tuple[Pack, ...]

    @property
    def runs(self) -> tuple[Config, ...]:
        return tuple(run for pack in self.packs for run in pack.runs)

    @property
    def steps(self) -> int:
        return max(pack.steps for pack in self.packs)

    @property
    def flops(self) -> int:
        return sum(pack.flops for pack in self.packs)


def count_steps(run: Config) -> int:
    return run.train.tokens // run.data.batch_size


def make_passes(runs: Sequence[Config], passes: int = 1) -> list[Pass]:
    """Passes over the data of resolved `runs`: `passes` for each data config, with about equal
    compute; fewer where there are not as many runs. More passes are work for more workers, and
    each reads the data once."""
    made = []
    for group in _grouped(runs, lambda run: configs.to_dict(run)["data"]):
        families = [family for shape in _grouped(group, _shape) for family in _families(shape)]
        for share in _shares(families, passes):
            packs: list[Pack] = []
            for family in share:
                packs += _packs(family, len(packs))
            made.append(Pass(_name(packs), tuple(packs)))
    return made


# A family: budgets (steps, largest first) and the runs of each, those of the others among the
# first's up to the budget.
_Family = list[list[Config]]


def _shape(run: Config) -> dict:
    """What the runs of a family have in common: all but VARIED and, where they can share a
    trunk, their budget."""
    key = configs.identity(set_fields(run, dict.fromkeys(VARIED)))
    key["given"] = [get_field(run, field) is None for field in VARIED]
    if not 0 <= run.train.seed < 2**31:  # what an int32, an argument of the program, holds
        key["train"]["seed"] = run.train.seed
    if not _can_branch(run):
        return key
    lengths = ScheduleSteps.from_config(run, count_steps(run))
    key["train"].pop("tokens")
    key["optimizer"].pop("warmup_fraction")
    key["sae"].pop("sparsity_warmup_fraction")
    key["absolute"] = [lengths.warmup, lengths.sparsity_warmup]
    if saes.architecture(run.sae).RUNNING_MEANS:
        key["absolute"].append(lengths.horizon)
    return key


def _can_branch(run: Config) -> bool:
    """Whether nothing but the decay at its end depends on the run's number of steps."""
    return run.optimizer.schedule in _BRANCHING_SCHEDULES and not controls.anneals(run.sae)


def _families(runs: list[Config]) -> list[_Family]:
    """Runs of one shape by budget; those without a longer twin make a family of their own."""
    families = []
    while runs:
        budgets = sorted(_grouped(runs, count_steps), key=lambda b: -count_steps(b[0]))
        trunk = {_varied(run) for run in budgets[0]}
        family = [budgets[0]]
        left = []
        for budget in budgets[1:]:
            twins = [run for run in budget if _varied(run) in trunk]
            left += [run for run in budget if _varied(run) not in trunk]
            if twins:
                family.append(twins)
        families.append(family)
        runs = left
    return families


def _varied(run: Config) -> tuple:
    return tuple(get_field(run, field) for field in VARIED)


def _packs(family: _Family, place: int) -> list[Pack]:
    """The packs of a family whose trunk is number `place` of its pass."""
    trunk = Pack(tuple(family[0]))
    parents = {_varied(run): i for i, run in enumerate(trunk.runs)}
    packs = [trunk]
    for runs in family[1:]:
        steps = count_steps(runs[0])
        packs.append(
            Pack(
                tuple(runs),
                trunk=place,
                start=steps - ScheduleSteps.from_config(runs[0], steps).decay,
                parents=tuple(parents[_varied(run)] for run in runs),
            )
        )
    return packs


def _shares(families: list[_Family], count: int) -> list[list[_Family]]:
    """`families` in `count` shares of about equal compute, the largest cut in two for as long as
    that is needed and possible."""
    while True:
        shares: list[list[_Family]] = [[] for _ in range(min(count, len(families)))]
        for family in sorted(families, key=_cost, reverse=True):
            min(shares, key=_total_cost).append(family)
        largest = max(max(shares, key=_total_cost), key=_cost)
        fair = _total_cost(families) / count
        if max(map(_total_cost, shares)) < _UNFAIR * fair or len(largest[0]) == 1:
            return shares
        at = families.index(largest)
        families = [*families[:at], *_halves(largest), *families[at + 1 :]]


def _total_cost(families: list[_Family]) -> int:
    return sum(map(_cost, families))


def _cost(family: _Family) -> int:
    return sum(pack.flops for pack in _packs(family, 0))


def _halves(family: _Family) -> list[_Family]:
    """The runs of the trunk in two halves, each with its own branches."""
    middle = (len(family[0]) + 1) // 2
    halves = []
    for part in (family[0][:middle], family[0][middle:]):
        kept = {_varied(run) for run in part}
        budgets = [[run for run in budget if _varied(run) in kept] for budget in family]
        halves.append([budget for budget in budgets if budget])
    return halves


def _name(packs: list[Pack]) -> str:
    """Of a pass: that of its first run, which is in no other."""
    return f"pass-{run_id(packs[0].runs[0])}"


def _grouped(items: Iterable[Config], key) -> list[list[Config]]:
    """Items with equal (JSON) keys together, in the order of their first."""
    groups: dict[str, list[Config]] = {}
    for item in items:
        groups.setdefault(json.dumps(key(item), sort_keys=True), []).append(item)
    return list(groups.values())
