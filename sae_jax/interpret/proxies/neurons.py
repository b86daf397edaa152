"""Reads the neurons of a site, with values of both signs, beside an activity on the same text."""

import os
from collections.abc import Iterator

import numpy as np

from sae_jax.activations import Store
from sae_jax.errors import UserError
from sae_jax.evaluate.sources import HeldOutRows, ModelRows
from sae_jax.interpret.activity import Activity
from sae_jax.interpret.passes import rows_of
from sae_jax.interpret.proxies.units import pearson
from sae_jax.progress_bar import progress

_ROWS = 2**14  # tokens that are read at once, about


class Neurons:
    """The neurons of a site, or of several side by side, on the text of an activity."""

    def __init__(
        self, source: HeldOutRows | ModelRows | Store | str | os.PathLike, activity: Activity
    ):
        """Finds the activity's sequences in a source.

        Raises UserError if the source lacks one of them, or has another text.
        """
        self._source = rows_of(source, activity.tokens.size)
        texts = self._source.texts()
        places = np.searchsorted(texts.numbers, activity.numbers)
        known = np.minimum(places, len(texts.numbers) - 1)
        same_length = texts.tokens.shape[1] == activity.tokens.shape[1]
        if not (
            same_length
            and (texts.numbers[known] == activity.numbers).all()
            and (texts.tokens[known] == activity.tokens).all()
        ):
            raise UserError(
                f"{self._source.origin} lacks sequences of {activity.path}, or has other tokens; "
                "give what that activity was recorded of"
            )
        self._places, self._at_once = known, texts.at_once
        self._length = activity.tokens.shape[1]

    def blocks(self, what: str) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields the tokens of some sequences, as a part of all, and their neurons' values.

        Values are (tokens, neurons) float32. what: what it is for, beside the progress bar.
        """
        size = max(1, _ROWS // (self._length * self._at_once)) * self._at_once
        starts = range(0, len(self._places), size)
        for start in progress(starts, what, len(starts), "block"):
            x = np.asarray(self._source.read(self._places[start : start + size]), np.float32)
            first = start * self._length
            x = x.reshape(-1, x.shape[-1])
            yield slice(first, first + len(x)), x

    def correlations(self, targets: list[np.ndarray], where: np.ndarray) -> np.ndarray:
        """Returns the Pearson correlation of targets with all neurons, (targets, neurons).

        It is NaN where one of both is constant.

        Args:
          targets: values of each token, (n*T,) each.
          where: the tokens that count, (n*T,) bool.
        """
        products = None
        for part, x in self.blocks("correlating neurons"):
            here = where[part]
            x = x[here].astype(np.float64)
            v = np.stack([target[part][here] for target in targets], axis=1).astype(np.float64)
            found = (x.sum(axis=0), (x**2).sum(axis=0), v.T @ x, v.sum(axis=0), (v**2).sum(axis=0))
            products = found if products is None else tuple(map(np.add, products, found))
        sums, squares, products, target_sums, target_squares = products
        return pearson(
            int(where.sum()), sums, squares, target_sums[:, None], target_squares[:, None], products
        )

    def values(self, neurons: list[int]) -> np.ndarray:
        """Returns the values of some neurons on all tokens, (neurons, n*T) float32."""
        found = np.zeros((len(neurons), len(self._places) * self._length), np.float32)
        for part, x in self.blocks("reading neurons"):
            found[:, part] = x[:, neurons].T
        return found
