"""Half of a text, in which tokens, and what is known of each, are found fast."""

import numpy as np

from sae_jax.interpret.activity import Activity
from sae_jax.interpret.hashes import mix
from sae_jax.interpret.proxies import Indicators

_SAMPLE = 1024  # tokens that stand for all of the text
_NEIGHBOURS = 2048  # so many tokens in a row may be of one document


class IndexedText:
    """The half of an activity's text that rules are found on, or the one that they are tested on.

    Its rows are counted by themselves: row r is token r % length of its sequence r // length.

    Attributes:
      indicators: what is known of each token of the whole text.
      length: the tokens of a sequence.
      sequences: how many there are in this half.
      neighbourhoods: in which neighbourhood of the text each of them is, (sequences,): those that
        are close together may be of one document.
      used: which rows count, (R,) bool.
      all_rows: those that count, rising.
      flag_counts: at how many of these each indicator holds, (P,).
      sample: some of those that count, the same for every latent.
    """

    def __init__(self, activity: Activity, indicators: Indicators, held_out: bool):
        """Indexes one half of the text."""
        mine = activity.held_out == held_out
        tokens, used = activity.tokens[mine], activity.used[mine]
        self._place = np.where(mine, np.cumsum(mine) - 1, -1)  # of the activity's sequences, here
        self.indicators, self.sequences, self.length = indicators, *tokens.shape
        near = activity.numbers[mine] // max(1, _NEIGHBOURS // self.length)
        _, self.neighbourhoods = np.unique(near, return_inverse=True)
        self.used = used.reshape(-1)
        self.all_rows = np.flatnonzero(self.used).astype(np.int32)
        self._vocabulary = int(activity.tokens.max(initial=0)) + 1
        self._tokens = {offset: _shifted(tokens, offset) for offset in (-1, 0, 1)}
        self._index = {offset: self._indexed(offset) for offset in (-1, 0, 1)}
        self._holds = indicators.array[:, mine]
        # What holds at a row lies together too, since it is looked up at few rows. After the last
        # row is one at which nothing holds: that is what is known before a sequence begins.
        self._flags = np.zeros((tokens.size + 1, len(self._holds)), bool)
        self._flags[:-1] = self._holds.reshape(len(self._holds), -1).T
        self.flag_counts = (self._holds & used).sum(axis=(1, 2))
        self.sample = some(self.all_rows, _SAMPLE)

    def rows_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns those of an activity's rows that are in this half, as rows of it."""
        place = self._place[rows // self.length]
        return (place * self.length + rows % self.length)[place >= 0]

    def tokens(self, rows: np.ndarray, offset: int = 0) -> np.ndarray:
        """Returns the tokens `offset` (-1 to 1) places after these; -1 beyond the sequence."""
        return self._tokens[offset][rows]

    def is_one(self, rows: np.ndarray, tokens, offset: int = 0) -> np.ndarray:
        """Returns which of these rows have one of the tokens `offset` places after them, (m,)."""
        known = np.zeros(self._vocabulary + 1, bool)  # the last is for -1
        known[np.asarray(tokens)] = True
        return known[self._tokens[offset][rows]]

    def counts(self, tokens: np.ndarray, offset: int = 0) -> np.ndarray:
        """Returns at how many rows that count each of the tokens is `offset` places after them."""
        return np.diff(self._index[offset][1])[tokens]

    def rows(self, tokens, offset: int = 0) -> np.ndarray:
        """Returns the rows that count with one of the tokens `offset` places after them, rising."""
        order, starts = self._index[offset]
        return np.sort(np.concatenate([order[starts[t] : starts[t + 1]] for t in tokens]))

    def flags(self, rows: np.ndarray, offset: int = 0) -> np.ndarray:
        """Returns which indicators hold `offset` places after these rows, up to 0, (m, P) bool."""
        return self._flags[self._at(rows, offset)]

    def is_flagged(self, rows: np.ndarray, indicators, offset: int = 0) -> np.ndarray:
        """Returns which rows have one of the indicators `offset` places after them, (m,) bool."""
        return self._flags[self._at(rows, offset)[:, None], list(indicators)].any(axis=1)

    def flagged(self, indicators, offset: int = 0) -> np.ndarray:
        """Returns the rows that count with one of the indicators `offset` places after, rising."""
        holds = np.zeros((self.sequences, self.length), bool)
        for indicator in indicators:
            holds[:, -offset:] |= self._holds[indicator, :, : self.length + offset]
        return np.flatnonzero(holds.reshape(-1) & self.used).astype(np.int32)

    def _at(self, rows: np.ndarray, offset: int) -> np.ndarray:
        return np.where(rows % self.length >= -offset, rows + offset, -1) if offset else rows

    def _indexed(self, offset: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows that count by the tokens `offset` places after, and where each begins.

        Rows that have none there are left out.
        """
        tokens = self._tokens[offset][self.all_rows]
        rows, tokens = self.all_rows[tokens >= 0], tokens[tokens >= 0]
        counts = np.bincount(tokens, minlength=self._vocabulary)
        return rows[np.argsort(tokens, kind="stable")], np.append(0, np.cumsum(counts))


def some(rows: np.ndarray, count: int) -> np.ndarray:
    """Returns at most `count` of the rows, drawn by hashes."""
    return rows if len(rows) <= count else rows[np.argpartition(mix(rows), count)[:count]]


def _shifted(tokens: np.ndarray, offset: int) -> np.ndarray:
    """Returns the tokens `offset` (-1 to 1) places after each, -1 beyond the sequence, (R,)."""
    around = np.pad(tokens, ((0, 0), (1, 1)), constant_values=-1)
    return around[:, 1 + offset : 1 + offset + tokens.shape[1]].reshape(-1)
