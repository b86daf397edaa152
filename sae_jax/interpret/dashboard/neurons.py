"""Finds the neurons that a latent is most correlated with, over tokens.

A neuron is a column of what the SAE reads: at an MLP's activations a neuron of the model, elsewhere
a coordinate. By correlation, since neurons differ in scale, and the largest entry of the decoder's
row says less (Bricken et al. 2023, "Towards Monosemanticity").
"""

import dataclasses
import io
import pathlib

import numpy as np
import scipy.sparse

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.evaluate.batching import evenly_spaced
from sae_jax.evaluate.sources import HeldOutRows, ModelRows
from sae_jax.interpret.events import Encoder, Events
from sae_jax.numpy_files import read_npz
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE

TOKENS = 65_536
WIDEST = 4096  # columns; the rows are held in memory, 1 GB of float32 then
COUNT = 3
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

    def save(self, file: pathlib.Path) -> None:
        """Writes them to an .npz file, whole or not at all."""
        data = io.BytesIO()
        np.savez_compressed(data, index=self.index, pearson=self.pearson)
        paths.write(file, data.getvalue())

    @classmethod
    def load(cls, file: pathlib.Path) -> "Neurons":
        """Reads them from an .npz file. Raises UserError if it is missing or damaged."""
        found = read_npz(paths.path(file))
        if found.keys() != {"index", "pearson"}:
            raise UserError(f"{file} has no correlated neurons; remove it, and it is made again")
        return cls(**found)


def correlated_neurons(
    sae: SAE, source: HeldOutRows | ModelRows, tokens: int = TOKENS
) -> Neurons | None:
    """Returns the neurons with the largest Pearson correlations over some of a source's tokens.

    Rows are encoded once. Products are added up of what fires alone, so that their cost is that of
    decoding. Returns None where the SAE reads more than 4096 columns: the rows are held in memory.

    Args:
      sae: the SAE.
      source: where rows are read, spread evenly. Excluded ones do not count.
      tokens: about how many rows to read.
    """
    if sae.config.d_in > WIDEST:
        return None
    rows = _read(source, tokens)
    events = _events(sae, rows)
    x = np.asarray(sae.split(rows)[0], np.float32)
    x = x - x.mean(axis=0)  # then a sum of products is a covariance
    deviation = np.sqrt(np.square(x).mean(axis=0, dtype=np.float64))
    columns = np.flatnonzero(deviation > 0)
    x, deviation = np.ascontiguousarray(x[:, columns]), deviation[columns]
    shape, d_sae = (len(x), sae.config.d_sae), sae.config.d_sae
    activations = scipy.sparse.csc_array((events.values, (events.rows, events.latents)), shape)
    mean = activations.mean(axis=0)
    squares = activations.multiply(activations).mean(axis=0)
    spread = np.sqrt(np.maximum(squares - mean**2, 0))
    count = min(COUNT, len(columns))
    index = np.full((d_sae, COUNT), -1, np.int32)
    pearson = np.zeros((d_sae, COUNT), np.float32)
    for first in range(0, d_sae, _BLOCK):
        part = slice(first, first + _BLOCK)
        covariance = activations[:, part].T @ x / len(x)
        product = spread[part, None] * deviation
        r = np.divide(covariance, product, out=np.zeros(product.shape), where=product > 0)
        best = np.argsort(-r, axis=1, kind="stable")[:, :count]
        varies = np.flatnonzero(spread[part] > 0)
        index[first + varies, :count] = columns[best][varies]
        pearson[first + varies, :count] = np.take_along_axis(r, best, axis=1)[varies]
    return Neurons(index, pearson)


def _read(source, tokens: int) -> np.ndarray:
    """Returns rows (N, width) that count."""
    text = source.texts()
    sequences, length = text.tokens.shape
    groups = np.arange(-(-sequences // text.at_once))
    groups = evenly_spaced(groups, -(-tokens // (text.at_once * length)))
    rows = []
    for group in progress(groups, "reading what neurons do"):
        places = np.arange(group * text.at_once, min((group + 1) * text.at_once, sequences))
        x = source.read(places).reshape(len(places) * length, -1)
        rows.append(x[text.used[places].reshape(-1)])
    return np.concatenate(rows)


def _events(sae: SAE, rows: np.ndarray) -> Events:
    """Returns the events on rows (N, width)."""
    encoder, found = Encoder(sae), []
    starts = range(0, len(rows), encoder.rows_at_once)
    batches = (rows[first : first + encoder.rows_at_once] for first in starts)
    batches = progress(batches, "correlating latents with neurons", len(starts))
    masked = ((x, np.ones(len(x), bool)) for x in batches)
    for first, events in zip(starts, encoder(masked), strict=True):
        found.append(events._replace(rows=events.rows + first))
    return Events(*map(np.concatenate, zip(*found, strict=True)))
