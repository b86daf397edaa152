"""A world: rows of activations whose features, firings and best dictionary are known.

A row is a pure function of the world's spec and the row's id. Rows are made in blocks of `BLOCK`,
each from random numbers of its own, so that any process can make any rows.
"""

import functools

import numpy as np
import scipy.sparse
import scipy.special

from sae_jax.activations.synthetic import kinds, sampling
from sae_jax.errors import UserError

BLOCK = 512  # rows made together; another number makes other worlds
_MOMENT_ROWS = 2**16  # rows of a sample for the second moment where it has no closed form
_MOMENT_FIRST = 2**62  # first row of that sample, which no stream reaches


class World:
    """A synthetic source of activations whose features are known.

    Attributes:
      spec: the world's name, "world:KIND,setting=value,...".
      settings: its settings, one of the classes in `kinds`.
      rates: the probability (G,) that a feature fires on a row.
      dims: the directions of a feature.
      num_features: the number G of features.
      site_names: the names of the sites.
      site_widths: their widths.
      features: for each site, directions (G * dims, width) float32 of norm 1, those of a feature
        together.
      offsets: for each site, what is added to every row (width,) float32.
    """

    def __init__(self, spec: str):
        """Makes the world that `spec` names. Raises UserError for a spec that names none."""
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
        """Returns what rows are made of: a coordinate for each direction, (n, G * dims) float32.

        A coordinate is zero where the feature does not fire. Where it does and dims is 1, it is
        above zero.

        Args:
          ids: the ids (n,) of the rows.
        """
        ids = np.asarray(ids, np.int64)
        numbers, block = np.unique(ids // BLOCK, return_inverse=True)
        blocks = scipy.sparse.vstack([self._block(number) for number in numbers], format="csr")
        places = block * BLOCK + ids % BLOCK
        whole = len(places) == blocks.shape[0] and (places == np.arange(len(places))).all()
        return blocks if whole else blocks[places]

    def magnitudes(self, activations: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
        """Returns how much (n, G) of each feature there is in rows with these `activations`."""
        if self.dims == 1:
            return activations
        groups = np.repeat(np.arange(self.num_features), self.dims)
        ones = np.ones(len(groups), np.float32)
        sum_groups = scipy.sparse.csr_array((ones, (np.arange(len(groups)), groups)))
        squared = (activations.multiply(activations) @ sum_groups).tocsr()
        squared.data = np.sqrt(squared.data)
        return squared

    def render(self, activations: scipy.sparse.csr_array, sites=None) -> np.ndarray:
        """Returns the rows (n, sum of the sites' widths) float32 of some activations.

        Args:
          activations: what the rows are made of, (n, G * dims).
          sites: indices of sites; all by default.
        """
        sites = range(len(self.site_names)) if sites is None else sites
        features = np.concatenate([self.features[site] for site in sites], axis=1)
        return activations @ features + np.concatenate([self.offsets[site] for site in sites])

    def sample(self, ids) -> tuple[scipy.sparse.csr_array, np.ndarray]:
        """Returns the activations (n, G * dims) and the rows (n, all sites' widths) with the ids
        `ids` (n,).
        """
        activations = self.activations(ids)
        return activations, self.render(activations)

    # ---------------------------------------------------------- known answers

    def mean(self, site: int) -> np.ndarray:
        """Returns the exact mean (width,) float64 of the rows at a site."""
        amount = self._amount_moments()[0] if self.dims == 1 else 0.0
        shares = np.repeat(self.rates * amount, self.dims)
        return shares @ self.features[site].astype(np.float64) + self.offsets[site]

    @functools.cached_property
    def variances(self) -> tuple[float, ...]:
        """The mean of ||x - mean||^2 at each site.

        It is exact where features fire independently. Elsewhere it is that of a fixed sample of
        65,536 rows.
        """
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
        """Whether `optimal_mse` is known."""
        return isinstance(self.settings, kinds.Orthonormal)

    def optimal_mse(self, n: int, rows: scipy.sparse.csr_array | None = None) -> float:
        """Returns the least mean of ||x - x_hat||^2 that any decoder of n latents can reach, for
        one site.

        Whatever the latents, x_hat lies in an affine space of dimension n. The covariance of x has
        the features for eigenvectors and var_i = Var(z_i a_i) for eigenvalues. So the least error
        is the sum of all eigenvalues but the n largest, and f_i = z_i a_i reaches it.

        Rare features make the figure of a sample differ from that of the population by several
        percent. So for given rows the error is the mean over these rows of what the best decoder
        leaves: sum_i (z_i a_i - E z_i a_i)^2 over the features for which it has no latent.

        Args:
          n: the number of latents.
          rows: the activations of rows (m, G) that the error is for; by default it is for the
            population.

        Raises UserError for worlds other than of orthonormal features, which have no closed form.
        """
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
        """Returns the variance (G * dims,) of each coordinate.

        Coordinates on a sphere have mean 0, no correlation and equal shares of its squared radius.
        """
        first, second = self._amount_moments()
        if self.dims == 1:
            return self.rates * second - (self.rates * first) ** 2
        return np.repeat(self.rates * second / self.dims, self.dims)

    def _amount_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns E a and E a^2 (G,) of the amounts `a = |N(mean, std)|` of features that fire."""
        mean, std = self._drawn.magnitude_mean, self._drawn.magnitude_std
        safe = np.where(std > 0, std, 1.0)
        folded = std * np.sqrt(2 / np.pi) * np.exp(-((mean / safe) ** 2) / 2)
        folded += mean * scipy.special.erf(mean / safe / np.sqrt(2))
        return np.where(std > 0, folded, mean), mean**2 + std**2

    # -------------------------------------------------------------- sampling

    def _make_block(self, number: int) -> scipy.sparse.csr_array:
        """Returns the activations of a block of rows."""
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
        """Draws the row and the feature of every firing in a block."""
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
        """Draws the children that fire, as (row, feature), given the firings of their parents."""
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
        """The features without a parent."""
        children = self._drawn.children
        every = np.arange(self.num_features)
        return every if children is None else np.setdiff1d(every, children)

    @functools.cached_property
    def _child_shares(self) -> np.ndarray:
        """The probability (G, branching) of each child given its parent."""
        children = self._drawn.children
        shares = self.rates[children] / self.rates[:, None]
        return np.where(children >= 0, shares, 0.0)
