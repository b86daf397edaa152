"""The kinds of synthetic world: their settings, and the features that each makes.

A world is named where a store is, "world:KIND,setting=value,...": the settings are the fields of
the dataclasses below. To add a kind is one dataclass here and its line in `KINDS`.
"""

import dataclasses

import numpy as np

from sae_jax.activations.synthetic import sampling
from sae_jax.config import from_dict
from sae_jax.errors import UserError, choose

PREFIX = "world:"
_MOST_SHARED = 0.95  # the most of a feature's variance that the copula's factors may explain
_MOST_OF_PARENT = 0.8  # the most that children's rates add up to, as a part of their parent's


@dataclasses.dataclass(frozen=True)
class Features:
    """What a world's rows are drawn from, for G features.

    A feature spans `dims` directions. With one direction its amount lies along it, with more on a
    sphere in their span.

    Attributes:
      rates: the probability (G,) that the feature fires on a row.
      magnitude_mean: the mean (G,) of the feature's amount before it is made positive.
      magnitude_std: the standard deviation (G,) of that amount.
      dims: directions of a feature.
      children: features (G, branching) that fire only together with this one; -1 stands for none.
      exclusive: whether at most one child fires at a time.
      loadings: the loadings (G, rank) of the factors that correlate the firings; None where firings
        are independent.
    """

    rates: np.ndarray
    magnitude_mean: np.ndarray
    magnitude_std: np.ndarray
    dims: int = 1
    children: np.ndarray | None = None
    exclusive: bool = True
    loadings: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Orthonormal:
    """Settings of worlds with orthonormal features, whose best error is known exactly.

    A row is x = offset + sum_i z_i a_i q_i with orthonormal q_i, independent z_i ~ Bernoulli(p_i)
    with p_i = rate * i^-(1 + alpha), and `a_i = |N(magnitude, magnitude_std)|`.

    Attributes:
      width: the width of a row.
      features: the number of features, at most the width.
      rate: the probability that the first feature fires.
      alpha: how fast probabilities fall.
      magnitude: the mean amount of a feature.
      magnitude_std: the standard deviation of the amount.
      offset: the norm of a constant that is added to every row.
      sites: the number of sites, each with directions of its own for the same features.
      seed: the seed of everything random.
    """

    width: int = 64
    features: int = 64
    rate: float = 0.4
    alpha: float = 0.5
    magnitude: float = 1.0
    magnitude_std: float = 0.0
    offset: float = 0.0
    sites: int = 1
    seed: int = 0

    def build(self) -> Features:
        """Returns the world's features. Raises UserError where there are more than directions."""
        if self.features > self.width:
            raise UserError(
                f"a world of orthonormal features has at most width={self.width} of them, not "
                f"features={self.features}; for more use world:superposition"
            )
        mean, std = (np.full(self.features, v) for v in (self.magnitude, self.magnitude_std))
        return Features(_power_law(self), mean, std)

    def directions(self, numbers: sampling.Numbers) -> np.ndarray:
        """Returns orthonormal directions (features, width) of one site."""
        gaussian = numbers.normal(self.features * self.width).reshape(self.width, self.features)
        return np.linalg.qr(gaussian)[0].T


@dataclasses.dataclass(frozen=True)
class Superposition:
    """Settings of worlds with more features than dimensions, as in SynthSAEBench
    (arXiv:2602.14687).

    With `roots` above 0 the first features form trees, level by level. A child fires only where its
    parent does. With `correlation_rank` above 0 the firings of all features without a parent follow
    a Gaussian copula with so many factors.

    Every feature fires with its rate all the same. This is unlike SynthSAEBench, which lets a child
    fire rarer for each ancestor, unless it compensates. Rates of siblings that add up to more than
    0.8 of their parent's are lowered to that.

    The settings of SynthSAEBench-16k are

        width=768,features=16384,min_rate=5e-4,max_rate=0.4,roots=128,branching=4,depth=3,
        correlation_rank=25,offset=0.5

    Attributes:
      width: the width of a row.
      features: the number of features.
      min_rate: the probability that the last feature fires.
      max_rate: the probability that the first feature fires.
      exponent: rates fall as i^-exponent, rescaled to [min_rate, max_rate].
      magnitude: the mean amount of the first feature.
      last_magnitude: the mean amount of the last one; those between are linear.
      magnitude_std: the amount of feature i is `|N(mean_i, std_i)|`, where std_i is
        `|N(magnitude_std, std_spread)|`.
      std_spread: the spread of std_i over features.
      orthogonalise: whether the unit directions are made nearly orthogonal; else they are random.
      roots: the number of trees.
      branching: the children of each feature in a tree.
      depth: the levels of children.
      exclusive: whether at most one child fires at a time.
      correlation_rank: the number of factors.
      correlation_scale: the standard deviation of their loadings.
      offset: the norm of a constant that is added to every row.
      sites: the number of sites, each with directions of its own for the same features.
      seed: the seed of everything random.
    """

    width: int = 64
    features: int = 256
    min_rate: float = 0.005
    max_rate: float = 0.2
    exponent: float = 0.5
    magnitude: float = 5.0
    last_magnitude: float = 4.0
    magnitude_std: float = 0.5
    std_spread: float = 0.5
    orthogonalise: bool = True
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
        """Returns the world's features.

        Raises UserError for settings that contradict each other.
        """
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
            rates = _limit_children(rates, children)
        return Features(
            rates,
            np.linspace(self.magnitude, self.last_magnitude, self.features),
            std,
            children=children,
            exclusive=self.exclusive,
            loadings=self._loadings() if self.correlation_rank else None,
        )

    def directions(self, numbers: sampling.Numbers) -> np.ndarray:
        """Returns unit directions (features, width) of one site."""
        draw = sampling.nearly_orthogonal if self.orthogonalise else sampling.unit_rows
        return draw(numbers, self.features, self.width)

    def _children(self) -> np.ndarray:
        """Returns the children (features, branching) of each feature."""
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
        """Returns the loadings (features, rank) of the factors."""
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
    """Settings of worlds whose features are circles or spheres in subspaces of their own.

    A feature that fires puts a point uniformly on its sphere. This is the toy model of Michaud,
    Gorton and McGrath (2025), "Understanding sparse autoencoder scaling in the presence of feature
    manifolds". The subspaces are orthogonal where features * dims <= width, and nearly so
    elsewhere. The directions of one feature always are.

    Attributes:
      width: the width of a row.
      features: the number of features.
      dims: directions of a feature: 2 for circles.
      rate: the probability that the first feature fires; it is rate * i^-(1 + alpha) for feature i.
      alpha: how fast probabilities fall.
      radius: the radius of every sphere.
      offset: the norm of a constant that is added to every row.
      sites: the number of sites, each with directions of its own for the same features.
      seed: the seed of everything random.
    """

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
        """Returns the world's features. Raises UserError for dims below 2 or above the width."""
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
        """Returns unit directions (features * dims, width) of one site, those of a feature
        together.
        """
        count = self.features * self.dims
        near = sampling.nearly_orthogonal(numbers, count, self.width)
        spans = near.reshape(self.features, self.dims, self.width).swapaxes(1, 2)
        return np.linalg.qr(spans)[0].swapaxes(1, 2).reshape(count, self.width)


KINDS = {"orthonormal": Orthonormal, "superposition": Superposition, "manifolds": Manifolds}
Kind = Orthonormal | Superposition | Manifolds


def parse(spec: str) -> Kind:
    """Returns the settings that "world:KIND,setting=value,..." names.

    Raises UserError for a kind, setting or value that does not exist, with the nearest one that
    does.
    """
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
        values[field] = _parse_value(text)
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


def _parse_value(text: str):
    """Returns text as the type that it looks like; `from_dict` says where that is not what the
    field takes.
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _power_law(kind: Orthonormal | Manifolds) -> np.ndarray:
    """Returns rates (features,) that fall as a power of the feature's number."""
    if not 0 < kind.rate <= 1:
        raise UserError(f"a world's rate is a probability above 0, not rate={kind.rate}")
    return kind.rate * np.arange(1, kind.features + 1) ** -(1 + kind.alpha)


def _limit_children(rates: np.ndarray, children: np.ndarray) -> np.ndarray:
    """Returns rates with those of siblings lowered to 0.8 of their parent's, where they add up to
    more.

    Siblings are lowered in proportion. Parents come before their children, so that a parent's rate
    is final when its children are looked at.
    """
    rates = rates.copy()
    for parent in np.flatnonzero(children[:, 0] >= 0):
        siblings = children[parent]
        rates[siblings] *= min(1.0, _MOST_OF_PARENT * rates[parent] / rates[siblings].sum())
    return rates
