"""Finds the neurons that a latent is most correlated with, over tokens.

A neuron is a column of what the SAE reads: at an MLP's activations a neuron of the model, elsewhere
a coordinate. By correlation, since neurons differ in scale, and the largest entry of the decoder's
row says less (Bricken et al. 2023, "Towards Monosemanticity").
"""

import dataclasses

import jax
import numpy as np
import scipy.sparse

from sae_jax.evaluate.sources import HeldOutRows, ModelRows
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE

TOKENS = 65_536
WIDEST = 4096  # columns; the rows are held in memory, 1 GB of float32 then
COUNT = 3
_LATENTS = 2**25  # elements of one batch's dense latents
_BLOCK = 4096  # latents whose moments with all columns are held at once


@dataclasses.dataclass(frozen=True)
class Neurons:
    """The most correlated neurons of every latent.

    Attributes:
      index: the columns of what the SAE reads, (d_sae, COUNT) int32, the most correlated first; -1
        where there are no more, as for a latent that did not fire.
      pearson: the correlations, (d_sae, COUNT) float32.
    """

    index: np.ndarray
    pearson: np.ndarray

    def of(self, latent: int) -> list[tuple[int, float]]:
        """Returns (column, correlation) of a latent's neurons, the most correlated first."""
        pairs = zip(self.index[latent], self.pearson[latent], strict=True)
        return [(int(i), round(float(r), 4)) for i, r in pairs if i >= 0]


def correlated_neurons(sae: SAE, source: HeldOutRows | ModelRows) -> Neurons:
    """Returns the neurons with the largest Pearson correlations over the rows of a source.

    It encodes all the rows once, keeps what fires, and adds up products of that alone.
    """
    size = min(max(128, _LATENTS // sae.config.d_sae), 8192)
    encode = jax.jit(lambda rows: sae.encode(rows.astype(np.float32)))
    inputs, fired = [], []
    batches = source.batches(size)
    for rows, used in progress(batches, "correlating with neurons", source.num_batches(size)):
        x, _ = sae.split(rows)
        latents = np.asarray(encode(x))[used]
        fired.append(scipy.sparse.csr_array(latents))
        inputs.append(np.asarray(x, np.float32)[used])
    x = np.concatenate(inputs)
    x -= x.mean(axis=0)  # then a sum of products is a covariance
    deviation = np.sqrt(np.square(x).mean(axis=0, dtype=np.float64))
    columns = np.flatnonzero(deviation > 0)
    x, deviation = np.ascontiguousarray(x[:, columns]), deviation[columns]
    latents = scipy.sparse.vstack(fired).tocsc()
    mean = latents.mean(axis=0)
    squares = (latents.astype(np.float64) ** 2).mean(axis=0)
    spread = np.sqrt(np.maximum(squares - mean.astype(np.float64) ** 2, 0))
    count = min(COUNT, len(columns))
    index = np.full((sae.config.d_sae, COUNT), -1, np.int32)
    pearson = np.zeros((sae.config.d_sae, COUNT), np.float32)
    for first in range(0, sae.config.d_sae, _BLOCK):
        part = slice(first, first + _BLOCK)
        covariance = latents[:, part].T @ x / len(x)
        product = spread[part, None] * deviation
        some = np.divide(covariance, product, out=np.zeros(product.shape), where=product > 0)
        best = np.argsort(-some, axis=1, kind="stable")[:, :count]
        varies = spread[part] > 0
        index[part][varies, :count] = columns[best][varies]
        pearson[part][varies, :count] = np.take_along_axis(some, best, axis=1)[varies]
    return Neurons(index, pearson)
