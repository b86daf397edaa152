"""Measures how much of a synthetic world's true features an SAE has found.

There are G features and N latents. cos(i, j) is the cosine between feature i and decoder row j,
over all sites where there are several. A feature or a latent fires, or is on, where it is above
zero. Means are over all rows unless they are said to be over something else:

    mmcs          mean over features of max_j cos(i, j) (Sharkey et al. 2022, "Taking features out
                  of superposition with sparse autoencoders")
    mcc           mean of |cos| over pairs of the one-to-one matching, of min(G, N) pairs, that
                  makes it largest (Hungarian; Song et al. 2025, arXiv:2505.20254)
    matched_correlation
                  mean, over pairs of the matching that makes it largest, of Pearson's correlation
                  between the magnitude of a feature and the activation of a latent; 0 where one of
                  them is constant
    uniqueness    how many features are the best (largest |cos|) of some latent, over N
    precision     mean over latents of the part of the rows with the latent on that have its best
                  feature on; 0 for a dead latent
    recall        mean over latents of the part of the rows with its best feature on that have the
                  latent on
    f1            mean over latents of the harmonic mean of its precision and recall
    shrinkage     mean of activation / magnitude over (row, latent) with the latent and its best
                  feature on; below 1: shrunk
    dead_fraction latents that never fire

mcc, uniqueness, precision, recall and f1 are SynthSAEBench's (arXiv:2602.14687), whose code also
takes |cos|. Its shrinkage is another one, the ratio of norms that `metrics` has. An activation is
the length that its latent adds to the reconstruction, as in `metrics`. Where a feature spans
several directions (a manifold), cos is the length of the unit decoder row's projection on their
span.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.sparse

from sae_jax.evaluate.batching import pad_rows
from sae_jax.evaluate.worlds import WorldRows
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE

_LATENTS = 2**24  # elements of one batch's dense latents
_NONE = -1


@dataclasses.dataclass(frozen=True)
class Recovery:
    """How well features were found.

    Attributes:
      rows: how many rows were looked at.
      scalars: the metrics above, by name.
      features: arrays (G,) by name: `rate`, the part of the rows with the feature on; `cosine`,
        max_j cos; `match`, its latent in mcc's matching, -1 for none; with that latent its `f1`;
        and `magnitude` and `activation`, means over the rows with both on, NaN where there are
        none.
      latents: arrays (N,) by name: `best`, the feature of the largest |cos|; `cosine`, that |cos|;
        `precision`, `recall`, `f1` and `density`.
    """

    rows: int
    scalars: dict[str, float]
    features: dict[str, np.ndarray]
    latents: dict[str, np.ndarray]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns all arrays by the names "features/NAME" and "latents/NAME"."""
        both = {"features": self.features, "latents": self.latents}
        return {f"{part}/{name}": a for part, arrays in both.items() for name, a in arrays.items()}

    @classmethod
    def from_parts(cls, rows: int, scalars: dict[str, float], arrays) -> "Recovery":
        """Returns a recovery of its parts. `arrays` are by the names that `arrays()` gives them."""
        parts = {"features": {}, "latents": {}}
        for key in arrays:
            part, name = key.split("/")
            parts[part][name] = arrays[key]
        return cls(rows, scalars, **parts)


def measure_recovery(sae: SAE, source: WorldRows) -> Recovery:
    """Measures how well `sae` has found the features of a world, on the rows of `source`.

    The features are looked at in the sites that the SAE reconstructs. It takes 16 bytes of memory
    for each pair of a feature and a latent.
    """
    features = np.asarray(sae.split(source.stream.features)[1])
    decoder = np.asarray(sae.w_dec[...] / sae.target_scale)
    meter = RecoveryMeter(features, decoder, source.world.dims)
    norms = jnp.linalg.norm(decoder, axis=1)
    size = min(max(128, _LATENTS // len(decoder)), 8192)
    what = f"looking for {source.world.num_features:,} features in {len(decoder):,} latents"
    for ids in progress(source.ids(size), what, source.num_batches(size)):
        activations = source.world.activations(ids)
        rows = pad_rows(source.stream.read_rows(ids), size)
        latents = np.asarray(_activations(sae, rows, norms))[: len(ids)]
        meter.add(source.world.magnitudes(activations), latents)
    return meter.finish()


@jax.jit
def _activations(sae: SAE, rows: jax.Array, norms: jax.Array) -> jax.Array:
    return sae.encode(sae.split(rows)[0]) * norms


class RecoveryMeter:
    """Measures recovery from batches, for any SAE given as arrays: `add` batches, then `finish`."""

    def __init__(self, features_GxD: np.ndarray, decoder_NxD: np.ndarray, dims: int = 1):
        """Takes the true directions and the decoder.

        Args:
          features_GxD: the true directions, `dims` orthonormal rows for each feature.
          decoder_NxD: the decoder's rows, with the same columns.
          dims: how many directions a feature spans.
        """
        norms = np.linalg.norm(features_GxD, axis=1)
        self._norms = norms[::dims]  # sqrt(sites) where several sites show a feature
        self._cosines = _cosines(features_GxD / norms[:, None], decoder_NxD, dims)
        similarity = np.abs(self._cosines)
        self._best = similarity.argmax(axis=0)
        self._best_cosine = similarity.max(axis=0)
        self._matched, self._match = _assign(similarity)  # features, and the latent of each
        G, N = similarity.shape
        self._rows = 0
        self._sums = _Sums.zeros(G), _Sums.zeros(N)  # for features, for latents
        self._cross = np.zeros((G, N), np.float32)  # sum of magnitude * activation
        self._by_latent = _Pairs.zeros(N)  # each latent with its best feature
        self._by_feature = _Pairs.zeros(len(self._matched))  # each with its matched latent

    def add(self, magnitudes, latents) -> None:
        """Adds a batch, whose arrays may be dense or of scipy.sparse.

        Args:
          magnitudes: the magnitude of each feature on each row, 0 where it is off, (B, G).
          latents: each latent times the norm of its decoder row, (B, N).
        """
        true = (scipy.sparse.csr_array(magnitudes) * self._norms).tocsr()
        true.eliminate_zeros()
        found = scipy.sparse.csr_array(latents)
        self._rows += true.shape[0]
        for sums, x in zip(self._sums, (true, found), strict=True):
            sums.add(x)
        cross = (true.T @ found).tocoo()
        self._cross[cross.coords] += cross.data
        self._by_latent.add(true[:, self._best], found)
        self._by_feature.add(true[:, self._matched], found[:, self._match])

    def finish(self) -> Recovery:
        """Returns the recovery over all batches."""
        true, found = self._sums
        correlation = self._correlation()
        precision, recall, f1 = self._by_latent.scores(true.on[self._best], found.on)
        scalars = {
            "mmcs": self._cosines.max(axis=1).mean(),
            "mcc": np.abs(self._cosines[self._matched, self._match]).mean(),
            "matched_correlation": correlation[_assign(correlation)].mean(),
            "uniqueness": len(np.unique(self._best)) / len(self._best),
            "precision": precision.mean(),
            "recall": recall.mean(),
            "f1": f1.mean(),
            "shrinkage": _ratio(self._by_latent.ratio.sum(), self._by_latent.both.sum(), np.nan),
            "dead_fraction": np.mean(found.on == 0),
        }
        pairs = self._by_feature
        of_matched = {
            "match": self._match,
            "f1": pairs.scores(true.on[self._matched], found.on[self._match])[2],
            "magnitude": _ratio(pairs.true, pairs.both, np.nan),
            "activation": _ratio(pairs.found, pairs.both, np.nan),
        }
        features = {"rate": true.on / self._rows, "cosine": self._cosines.max(axis=1)}
        for name, values in of_matched.items():
            features[name] = np.full(len(true.on), _NONE if name == "match" else np.nan)
            features[name][self._matched] = values
        latents = {
            "best": self._best,
            "cosine": self._best_cosine,
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "density": found.on / self._rows,
        }
        scalars = {name: float(value) for name, value in scalars.items()}
        return Recovery(self._rows, scalars, features, latents)

    def _correlation(self) -> np.ndarray:
        """Returns Pearson's correlation (G, N), float32, 0 where one side is constant."""
        n = self._rows
        deviations = [
            np.sqrt(np.maximum(s.squared / n - (s.total / n) ** 2, 0)) for s in self._sums
        ]
        means = [(s.total / n).astype(np.float32) for s in self._sums]
        inverse = [_ratio(1.0, d, 0.0).astype(np.float32) for d in deviations]
        covariance = self._cross / np.float32(n)
        covariance -= means[0][:, None] * means[1]
        covariance *= inverse[0][:, None]
        covariance *= inverse[1]
        return covariance


@dataclasses.dataclass
class _Sums:
    """Counts and sums for each column: the rows where it is on, its sum, its sum of squares."""

    on: np.ndarray
    total: np.ndarray
    squared: np.ndarray

    @classmethod
    def zeros(cls, n: int) -> "_Sums":
        return cls(*np.zeros((3, n)))

    def add(self, x: scipy.sparse.csr_array) -> None:
        self.on += (x > 0).sum(axis=0)
        self.total += x.sum(axis=0, dtype=np.float64)
        self.squared += x.multiply(x).sum(axis=0, dtype=np.float64)


@dataclasses.dataclass
class _Pairs:
    """Counts and sums for pairs of a feature and a latent, over the rows where both are on.

    Attributes:
      both: the number of these rows.
      true: the sum of the feature's magnitude.
      found: the sum of the latent's activation.
      ratio: the sum of activation / magnitude.
    """

    both: np.ndarray
    true: np.ndarray
    found: np.ndarray
    ratio: np.ndarray

    @classmethod
    def zeros(cls, n: int) -> "_Pairs":
        return cls(*np.zeros((4, n)))

    def add(self, true: scipy.sparse.csr_array, found: scipy.sparse.csr_array) -> None:
        true_on, found_on = true > 0, found > 0
        inverse = true.copy()
        inverse.data = 1 / inverse.data
        self.both += true_on.multiply(found_on).sum(axis=0)
        self.true += true.multiply(found_on).sum(axis=0, dtype=np.float64)
        self.found += found.multiply(true_on).sum(axis=0, dtype=np.float64)
        self.ratio += found.multiply(inverse).sum(axis=0, dtype=np.float64)

    def scores(self, true_on: np.ndarray, found_on: np.ndarray):
        """Returns (precision, recall, f1) of each pair, 0 where undefined."""
        precision = _ratio(self.both, found_on, 0.0)
        recall = _ratio(self.both, true_on, 0.0)
        return precision, recall, _ratio(2 * precision * recall, precision + recall, 0.0)


def _cosines(features_GxD: np.ndarray, decoder_NxD: np.ndarray, dims: int) -> np.ndarray:
    """Returns the cosines (G / dims, N), float32, 0 for a decoder row of norm 0."""
    norms = np.linalg.norm(decoder_NxD, axis=1, keepdims=True)
    decoder = decoder_NxD / np.where(norms > 0, norms, 1)
    cosines = features_GxD.astype(np.float32) @ decoder.astype(np.float32).T
    if dims == 1:
        return cosines
    return np.linalg.norm(cosines.reshape(-1, dims, len(decoder)), axis=1)


def _assign(score_GxN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (features, latents) of the one-to-one matching with the largest sum of scores."""
    return scipy.optimize.linear_sum_assignment(score_GxN, maximize=True)


def _ratio(a, b, otherwise: float):
    """Returns a / b, and `otherwise` where b is 0."""
    return np.where(b == 0, otherwise, a / np.where(b == 0, 1, b))
