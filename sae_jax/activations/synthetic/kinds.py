"""The kinds of synthetic world: their settings, and what each makes of its features.

A world is named where a store is, "world:KIND,setting=value,...": the settings are the fields of
the dataclasses below. To add a kind is one dataclass here and its line in KINDS.
"""

import dataclasses

import numpy as np

from sae_jax.activations.synthetic import sampling
from sae_jax.config import from_dict
from sae_jax.errors import UserError, choose

PREFIX = "world:"
_MOST_SHARED = 0.95  # of a feature's variance in the copula: what the common factors explain
_SIBLINGS = 0.8  # of a parent's rate: what its children's add up to at most


@dataclasses.dataclass(frozen=True)
class Features:
    """What a world's rows are drawn from, for G features. A feature spans `dims` directions; with
    1 its amount lies along its direction, with more on a sphere in their span."""

    rates: np.ndarray  # (G,) probability that the feature fires on a row
    magnitude_mean: np.ndarray  # (G,) of the amount before it is made positive
    magnitude_std: np.ndarray  # (G,)
    dims: int = 1
    children: np.ndarray | None = None  # (G, branching): features that fire only with it; -1: none
    exclusive: bool = True  # at most one child at a time
    loadings: np.ndarray | None = None  # (G, rank): correlation of the firings


@dataclasses.dataclass(frozen=True)
class Orthonormal:
    """x = offset + sum_i z_i a_i q_i with orthonormal q_i, z_i ~ Bernoulli(p_i) independent,
    p_i = rate * i^-(1 + alpha), and a_i = |N(magnitude, magnitude_std)|. `optimal_mse` is exact."""

    width: int = 64
    features: int = 64
    rate: float = 0.4
    alpha: float = 0.5
    magnitude: float = 1.0
    magnitude_std: float = 0.0
    offset: float = 0.0  # norm of a constant added to every row
    sites: int = 1
    seed: int = 0

    def build(self) -> Features:
        if self.features > self.width:
            raise UserError(
                f"a world of orthonormal features has at most width={self.width} of them, not "
                f"features={self.features}; for more use world:superposition"
            )
        mean, std = (np.full(self.features, v) for v in (self.magnitude, self.magnitude_std))
        return Features(_power_law(self), mean, std)

    def directions(self, numbers: sampling.Numbers) -> np.ndarray:
        gaussian = numbers.normal(self.features * self.width).reshape(self.width, self.features)
        return np.linalg.qr(gaussian)[0].T


@dataclasses.dataclass(frozen=True)
class Superposition:
    """More features than dimensions, in the manner of SynthSAEBench (arXiv:2602.14687): unit
    directions made nearly orthogonal; rates that fall as i^-exponent, rescaled to
    [min_rate, max_rate]; amounts |N(mean_i, std_i)|, the mean linear in i from `magnitude` to
    `last_magnitude` and std_i = |N(magnitude_std, std_spread)|.

    With `roots` above 0 the first features form trees, level by level: each feature of a level has
    `branching` children in the next, `depth` levels of children in all, and a child fires only
    where its parent does, at most one child at a time if `exclusive`. With `correlation_rank`
    above 0 the firings of all features without a parent follow a Gaussian copula with loadings
    N(0, correlation_scale) on so many factors. Every feature fires with its rate all the same:
    unlike SynthSAEBench, which lets a child fire rarer for each ancestor, unless it compensates.
    Rates of siblings that add up to more than 0.8 of their parent's are lowered to that.

    SynthSAEBench-16k: width=768,features=16384,min_rate=5e-4,max_rate=0.4,roots=128,branching=4,
    depth=3,correlation_rank=25,offset=0.5."""

    width: int = 64
    features: int = 256
    min_rate: float = 0.005
    max_rate: float = 0.2
    exponent: float = 0.5
    magnitude: float = 5.0
    last_magnitude: float = 4.0
    magnitude_std: float = 0.5
    std_spread: float = 0.5
    orthogonalise: bool = True  # else directions are random
    roots: int = 0
    branching: int = 4
    depth: int = 3
    exclusive: bool = True
    correlation_rank: int = 0
    correlation_scale: float = 0.1
    offset: float = 0.0
    sites: int = 1
    seed: int = 0

    def build(self) -> Features:
        if not 0 < self.min_rate <= self.max_rate <= 1:
            raise UserError(
                f"a world's rates need 0 < min_rate <= max_rate <= 1, not min_rate={self.min_rate},"
                f" max_rate={self.max_rate}"
            )
        law = np.arange(1, self.features + 1) ** -self.exponent
        span = max(law[0] - law[-1], np.finfo(float).tiny)
        rates = self.min_rate + (self.max_rate - self.min_rate) * (law - law[-1]) / span
        numbers = sampling.Numbers(self.seed, sampling.MAGNITUDES, 0)
        std = np.abs(self.magnitude_std + self.std_spread * numbers.normal(self.features))
        children = self._children() if self.roots else None
        if children is not None:
            rates = _lower_children(rates, children)
        return Features(
            rates,
            np.linspace(self.magnitude, self.last_magnitude, self.features),
            std,
            children=children,
            exclusive=self.exclusive,
            loadings=self._loadings() if self.correlation_rank else None,
        )

    def directions(self, numbers: sampling.Numbers) -> np.ndarray:
        draw = sampling.nearly_orthogonal if self.orthogonalise else sampling.unit_rows
        return draw(numbers, self.features, self.width)

    def _children(self) -> np.ndarray:
        levels = [self.roots * self.branching**level for level in range(self.depth + 1)]
        if sum(levels) > self.features:
            raise UserError(
                f"a world with roots={self.roots}, branching={self.branching}, depth={self.depth} "
                f"has {sum(levels)} features in its trees, more than features={self.features}"
            )
        parents = sum(levels[:-1])
        children = np.full((self.features, self.branching), -1)
        first = self.roots + self.branching * np.arange(parents)
        children[:parents] = first[:, None] + np.arange(self.branching)
        return children

    def _loadings(self) -> np.ndarray:
        share = self.correlation_rank * self.correlation_scale**2
        if share >= _MOST_SHARED:
            raise UserError(
                f"a world with correlation_rank={self.correlation_rank} and correlation_scale="
                f"{self.correlation_scale} leaves features no variance of their own; keep "
                f"rank * scale^2, now {share:.2g}, below {_MOST_SHARED}"
            )
        numbers = sampling.Numbers(self.seed, sampling.LOADINGS, 0)
        shape = (self.features, self.correlation_rank)
        loadings = self.correlation_scale * numbers.normal(np.prod(shape)).reshape(shape)
        norms = np.linalg.norm(loadings, axis=1, keepdims=True)
        return loadings * np.minimum(1.0, np.sqrt(_MOST_SHARED) / norms)


@dataclasses.dataclass(frozen=True)
class Manifolds:
    """Features that are circles (dims=2) or spheres in subspaces of their own: a feature that
    fires puts a point uniform over its sphere of `radius`; p_i = rate * i^-(1 + alpha) (Michaud,
    Gorton and McGrath 2025, the toy of "scaling laws of SAEs and feature manifolds"). The
    subspaces are orthogonal where features * dims <= width, else nearly so; the directions of one
    feature always are."""

    width: int = 64
    features: int = 32
    dims: int = 2
    rate: float = 0.3
    alpha: float = 0.5
    radius: float = 1.0
    offset: float = 0.0
    sites: int = 1
    seed: int = 0

    def build(self) -> Features:
        if self.dims < 2:
            raise UserError(
                f"a world of manifolds needs dims of 2 or more, not dims={self.dims}; for "
                "features along one direction use world:orthonormal or world:superposition"
            )
        if self.dims > self.width:
            raise UserError(
                f"a world of manifolds with dims={self.dims} needs a width of as many, not "
                f"width={self.width}"
            )
        radius = np.full(self.features, self.radius)
        return Features(_power_law(self), radius, np.zeros(self.features), self.dims)

    def directions(self, numbers: sampling.Numbers) -> np.ndarray:
        count = self.features * self.dims
        near = sampling.nearly_orthogonal(numbers, count, self.width)
        spans = near.reshape(self.features, self.dims, self.width).swapaxes(1, 2)
        return np.linalg.qr(spans)[0].swapaxes(1, 2).reshape(count, self.width)


KINDS = {"orthonormal": Orthonormal, "superposition": Superposition, "manifolds": Manifolds}
Kind = Orthonormal | Superposition | Manifolds


def parse(spec: str) -> Kind:
    """The settings of "world:KIND,setting=value,...". UserError for a kind, setting or value that
    there is not, with the nearest right one."""
    name, *assignments = spec.removeprefix(PREFIX).split(",")
    kind = KINDS[choose(name, KINDS, "the kind of world in data.store")]
    prefix = f"{PREFIX}{name},"
    values = {}
    for assignment in assignments:
        field, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"{prefix}{field} has no value; write {field}=VALUE in data.store")
        if field in values:
            raise UserError(f"{prefix}{field} is given twice in data.store")
        values[field] = _value(text)
    settings = from_dict(values, kind, prefix)
    for field, least in _LEAST.items():
        value = getattr(settings, field, least)
        if value < least:
            raise UserError(f"{prefix}{field} must be {least} or more, not {value}")
    if settings.seed >= 2**64:  # a word of Philox's key
        raise UserError(f"{prefix}seed must be below 2^64, not {settings.seed}")
    return settings


_LEAST = {
    "width": 1, "features": 1, "sites": 1, "seed": 0, "branching": 1, "depth": 1, "roots": 0,
    "correlation_rank": 0, "correlation_scale": 0, "magnitude_std": 0,
    "std_spread": 0, "offset": 0, "exponent": 0, "alpha": -1, "radius": 0, "magnitude": 0,
    "last_magnitude": 0,
}  # fmt: skip


def _value(text: str):
    """Text as what it looks like; `from_dict` says where that is not what the field takes."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _power_law(kind: Orthonormal | Manifolds) -> np.ndarray:
    if not 0 < kind.rate <= 1:
        raise UserError(f"a world's rate is a probability above 0, not rate={kind.rate}")
    return kind.rate * np.arange(1, kind.features + 1) ** -(1 + kind.alpha)


def _lower_children(rates: np.ndarray, children: np.ndarray) -> np.ndarray:
    """`rates` with siblings' lowered, in proportion, to 0.8 of their parent's where they add up to
    more. Parents come before their children, and theirs are final when these are looked at."""
    rates = rates.copy()
    for parent in np.flatnonzero(children[:, 0] >= 0):
        siblings = children[parent]
        rates[siblings] *= min(1.0, _SIBLINGS * rates[parent] / rates[siblings].sum())
    return rates
