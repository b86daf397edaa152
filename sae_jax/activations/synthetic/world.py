"""A world: rows of activations whose features, firings and best dictionary are known.

Row `id` is a pure function of the world's spec and the id: rows are made in blocks of `BLOCK`,
each from random numbers of its own, so any process can make any rows.
"""

import functools

import numpy as np
import scipy.sparse
import scipy.special

from sae_jax.activations.synthetic import kinds, sampling
from sae_jax.errors import UserError

BLOCK = 512  # rows made together; part of what a world is
_MOMENT_ROWS = 2**16  # sample for the second moment where it has no closed form
_MOMENT_FIRST = 2**62  # first row of that sample, which no stream reaches


class World:
    """World(spec), spec "world:KIND,setting=value,...": see `kinds`. UserError for a bad one.

    features: for each site (G * dims, width) float32 directions of norm 1, `dims` for a feature
    rates: (G,) probability that a feature fires on a row
    offsets: for each site (width,) float32, added to every row
    """

    def __init__(self, spec: str):
        self.spec = spec
        self.settings = kind = kinds.parse(spec)
        self._drawn = drawn = kind.build()
        self.rates, self.dims = drawn.rates, drawn.dims
        self.num_features = len(drawn.rates)
        self.site_names = tuple(f"site.{i}" for i in range(kind.sites))
        self.site_widths = (kind.width,) * kind.sites
        self.features, self.offsets = [], []
        for site in range(kind.sites):
            numbers = sampling.Numbers(kind.seed, sampling.DICTIONARY, site)
            self.features.append(kind.directions(numbers).astype(np.float32))
            numbers = sampling.Numbers(kind.seed, sampling.OFFSET, site)
            offset = kind.offset * sampling.unit_rows(numbers, 1, kind.width)[0]
            self.offsets.append(offset.astype(np.float32))
        self._block = functools.lru_cache(maxsize=8)(self._make_block)

    # ------------------------------------------------------------------ rows

    def activations(self, ids) -> scipy.sparse.csr_array:
        """What rows `ids` (n,) are made of: (n, G * dims) float32, a coordinate for each direction.
        Zero where a feature does not fire, above zero where it does if dims is 1."""
        ids = np.asarray(ids, np.int64)
        numbers, block = np.unique(ids // BLOCK, return_inverse=True)
        blocks = scipy.sparse.vstack([self._block(number) for number in numbers], format="csr")
        places = block * BLOCK + ids % BLOCK
        whole = len(places) == blocks.shape[0] and (places == np.arange(len(places))).all()
        return blocks if whole else blocks[places]

    def magnitudes(self, activations: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
        """(n, G): how much of each feature there is in rows with these `activations`."""
        if self.dims == 1:
            return activations
        groups = np.repeat(np.arange(self.num_features), self.dims)
        ones = np.ones(len(groups), np.float32)
        sum_groups = scipy.sparse.csr_array((ones, (np.arange(len(groups)), groups)))
        squared = (activations.multiply(activations) @ sum_groups).tocsr()
        squared.data = np.sqrt(squared.data)
        return squared

    def render(self, activations: scipy.sparse.csr_array, sites=None) -> np.ndarray:
        """Rows (n, sum of the sites' widths) float32 of `activations`; sites: indices, or all."""
        sites = range(len(self.site_names)) if sites is None else sites
        features = np.concatenate([self.features[site] for site in sites], axis=1)
        return activations @ features + np.concatenate([self.offsets[site] for site in sites])

    def sample(self, ids) -> tuple[scipy.sparse.csr_array, np.ndarray]:
        """(activations (n, G * dims), rows (n, all sites' widths)) of the rows `ids` (n,)."""
        activations = self.activations(ids)
        return activations, self.render(activations)

    # ---------------------------------------------------------- known answers

    def mean(self, site: int) -> np.ndarray:
        """(width,) float64: the exact mean of the rows at a site."""
        amount = self._amount_moments()[0] if self.dims == 1 else 0.0
        shares = np.repeat(self.rates * amount, self.dims)
        return shares @ self.features[site].astype(np.float64) + self.offsets[site]

    @functools.cached_property
    def variances(self) -> tuple[float, ...]:
        """E||x - mean||^2 at each site: exact where features fire independently, else of a fixed
        sample of 65,536 rows."""
        if self._independent:
            shares = self._coordinate_variances()
            return tuple(
                float(shares @ np.sum(np.square(q, dtype=float), 1)) for q in self.features
            )
        totals = np.zeros(len(self.site_names))
        means = [self.mean(site) for site in range(len(totals))]
        for first in range(0, _MOMENT_ROWS, BLOCK):
            activations = self.activations(_MOMENT_FIRST + first + np.arange(BLOCK))
            for site, mean in enumerate(means):
                totals[site] += np.sum((self.render(activations, [site]) - mean) ** 2)
        return tuple((totals / _MOMENT_ROWS).tolist())

    @property
    def has_optimum(self) -> bool:
        return isinstance(self.settings, kinds.Orthonormal)

    def optimal_mse(self, n: int, rows: scipy.sparse.csr_array | None = None) -> float:
        """The least E||x - x_hat||^2 of any decoder of n latents, for one site of a world of
        orthonormal features: whatever the latents, x_hat lies in an affine space of dimension n,
        and the covariance of x has the features for eigenvectors and var_i = Var(z_i a_i) for
        eigenvalues; the sum of all but the n largest is reached by f_i = z_i a_i.

        With the activations of given `rows`, the mean over these rows of what the best decoder
        leaves, sum_i (z_i a_i - E z_i a_i)^2 over the features that it has no latent for: rare
        features make a sample's figure differ from the population's by several percent. UserError
        for a world without closed form."""
        if not self.has_optimum:
            raise UserError(
                f"the best error is known for world:orthonormal, not for {self.spec!r}: with more "
                "features than dimensions, or curved ones, there is no closed form"
            )
        variances = self._coordinate_variances()
        left = np.argsort(-variances, kind="stable")[n:]
        if rows is None:
            return float(variances[left].sum())
        mean = (self.rates * self._amount_moments()[0])[left]
        count, amounts = rows.shape[0], rows[:, left].astype(np.float64)
        squares = amounts.multiply(amounts).sum(axis=0)
        return float(np.sum((squares - 2 * mean * amounts.sum(axis=0)) / count + mean**2))

    @property
    def _independent(self) -> bool:
        return self._drawn.children is None and self._drawn.loadings is None

    def _coordinate_variances(self) -> np.ndarray:
        """(G * dims,) variance of each coordinate. On a sphere they have mean 0, no correlation and
        equal shares of its squared radius."""
        first, second = self._amount_moments()
        if self.dims == 1:
            return self.rates * second - (self.rates * first) ** 2
        return np.repeat(self.rates * second / self.dims, self.dims)

    def _amount_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """(G,) E a and E a^2 of a = |N(mean, std)| where the feature fires."""
        mean, std = self._drawn.magnitude_mean, self._drawn.magnitude_std
        safe = np.where(std > 0, std, 1.0)
        folded = std * np.sqrt(2 / np.pi) * np.exp(-((mean / safe) ** 2) / 2)
        folded += mean * scipy.special.erf(mean / safe / np.sqrt(2))
        return np.where(std > 0, folded, mean), mean**2 + std**2

    # -------------------------------------------------------------- sampling

    def _make_block(self, number: int) -> scipy.sparse.csr_array:
        numbers = sampling.Numbers(self.settings.seed, sampling.ROWS, int(number))
        row, feature = self._firings(numbers)
        amount = self._drawn.magnitude_mean[feature]
        if self._drawn.magnitude_std.any():
            amount = amount + self._drawn.magnitude_std[feature] * numbers.normal(len(feature))
            amount = np.abs(amount)
        if self.dims > 1:
            points = sampling.unit_rows(numbers, len(feature), self.dims)
            amount = (amount[:, None] * points).reshape(-1)
            feature = (feature[:, None] * self.dims + np.arange(self.dims)).reshape(-1)
            row = np.repeat(row, self.dims)
        shape = (BLOCK, self.num_features * self.dims)
        block = scipy.sparse.coo_array((amount.astype(np.float32), (row, feature)), shape).tocsr()
        block.sort_indices()  # so that rows are summed in one order
        return block

    def _firings(self, numbers: sampling.Numbers) -> tuple[np.ndarray, np.ndarray]:
        """(row, feature) of every firing in a block."""
        top = self._top_level
        if self._drawn.loadings is None:
            row, index = sampling.bernoulli(numbers, self.rates[top], BLOCK)
        else:
            row, index = sampling.correlated_bernoulli(
                numbers, self.rates[top], self._drawn.loadings[top], BLOCK
            )
        feature = top[index]
        if self._drawn.children is None:
            return row, feature
        levels = [(row, feature)]
        while len(levels[-1][0]):
            levels.append(self._children_of(numbers, *levels[-1]))
        rows, features = zip(*levels, strict=True)
        return np.concatenate(rows), np.concatenate(features)

    def _children_of(self, numbers, row, feature) -> tuple[np.ndarray, np.ndarray]:
        """(row, feature) of the children that fire, given their parents' firings."""
        children = self._drawn.children
        has_children = children[feature, 0] >= 0
        row, feature = row[has_children], feature[has_children]
        shares = self._child_shares[feature]
        if self._drawn.exclusive:
            chosen = numbers.uniform(len(feature))[:, None] < np.cumsum(shares, axis=1)
            chosen[:, 1:] &= ~chosen[:, :-1]  # the first of the true ones
        else:
            chosen = numbers.uniform(shares.size).reshape(shares.shape) < shares
        parent, child = np.nonzero(chosen)
        return row[parent], children[feature[parent], child]

    @functools.cached_property
    def _top_level(self) -> np.ndarray:
        """Features without a parent."""
        children = self._drawn.children
        every = np.arange(self.num_features)
        return every if children is None else np.setdiff1d(every, children)

    @functools.cached_property
    def _child_shares(self) -> np.ndarray:
        """(G, branching): probability of each child given its parent."""
        children = self._drawn.children
        shares = self.rates[children] / self.rates[:, None]
        return np.where(children >= 0, shares, 0.0)
