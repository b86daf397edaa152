"""Reads the neurons of a site, with values of both signs, beside an activity on the same text."""

import os
from collections.abc import Callable, Iterator, Sequence

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

    def correlations(
        self, targets: list[Callable[[slice], np.ndarray]], halves: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Returns the Pearson correlation of targets with all neurons, (targets, neurons), on each
        of several parts of the text.

        It is NaN where one of both is constant.

        Args:
          targets: functions that give the values of a part of the tokens.
          halves: the tokens that count, (n*T,) bool each.
        """
        sums, center = [None] * len(halves), None
        for part, x in self.blocks("correlating neurons"):
            center = x.mean(axis=0) if center is None else center
            x = x - center  # so that float32 is enough for products within a block
            v = np.stack([target(part) for target in targets], axis=1).astype(np.float32)
            for place, half in enumerate(halves):
                found = _sums(x[half[part]], v[half[part]])
                before = sums[place]
                sums[place] = found if before is None else tuple(map(np.add, before, found))
        return [
            pearson(int(half.sum()), x, xx, v[:, None], vv[:, None], vx)
            for half, (x, xx, v, vv, vx) in zip(halves, sums, strict=True)
        ]

    def values(self, neurons: list[int]) -> np.ndarray:
        """Returns the values of some neurons on all tokens, (neurons, n*T) float32."""
        found = np.zeros((len(neurons), len(self._places) * self._length), np.float32)
        for part, x in self.blocks("reading neurons"):
            found[:, part] = x[:, neurons].T
        return found


def _sums(x: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the sums of values, squares and products, of neurons and of targets, float64."""
    sums = (part.sum(axis=0, dtype=np.float64) for part in (x, x**2, v, v**2))
    return (*sums, (v.T @ x).astype(np.float64))
