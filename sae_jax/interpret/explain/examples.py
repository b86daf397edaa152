"""Draws windows of text on which a latent is active, or is not, to explain it and to test that.

Windows are those of a collection (`collection.Example`). They are drawn from one half of the
sequences of an activity, so that what an explanation is tested on is never among what it was made
of. All draws are by hashes: the same for a latent whatever else is drawn.
"""

import dataclasses

import numpy as np

from sae_jax.interpret.activity import Activity, peaks
from sae_jax.interpret.collection import Example
from sae_jax.interpret.hashes import mix, priorities
from sae_jax.interpret.slots import parts_of


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How many windows of each sort are wanted of a latent, and how large they are.

    Attributes:
      top: the windows with the highest peaks.
      intervals: into how many equal parts 0 to the latent's maximum is cut.
      per_interval: further windows of each part, by their peaks.
      random: windows without the latent, anywhere in the text.
      out_of_context: windows without the latent around a token on which it is often active: on
        which the peaks of the strongest windows lie.
      before: tokens of a window before the peak.
      after: tokens of a window after it.
    """

    top: int = 0
    intervals: int = 12
    per_interval: int = 0
    random: int = 0
    out_of_context: int = 0
    before: int = 4
    after: int = 4


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The windows of a latent, of each sort as many as there are up to those wanted.

    Attributes:
      top: those with the highest peaks, the highest first.
      intervals: those of each part of 0 to the maximum, the highest part first.
      random: those without the latent.
      out_of_context: those without it around one of its tokens.
    """

    top: list[Example]
    intervals: list[list[Example]]
    random: list[Example]
    out_of_context: list[Example]

    @property
    def active(self) -> list[Example]:
        """All windows on which the latent is active."""
        return [*self.top, *(example for part in self.intervals for example in part)]

    @property
    def inactive(self) -> list[Example]:
        """All windows on which it is not."""
        return [*self.random, *self.out_of_context]


def draw(
    activity: Activity, latent: int, wanted: Wanted, *, held_out: bool, seed: int = 0
) -> Drawn:
    """Returns windows of a latent from one half of the sequences.

    A sequence gives one window on which the latent is active, around its peak there, and sequences
    whose window has the same tokens give one. Windows without the latent have no activation above
    zero, and their middle is a token that counts.

    Args:
      activity: where the latent is active.
      latent: the number of the latent.
      wanted: how many windows of each sort.
      held_out: whether they are of the half that explanations are tested on.
      seed: the seed of what is drawn.

    Raises UserError if there is no such latent.
    """
    return _Draw(activity, latent, wanted, held_out, seed).drawn()


class _Draw:
    """The drawing of one latent's windows."""

    def __init__(self, activity: Activity, latent: int, wanted: Wanted, held_out: bool, seed: int):
        self.activity, self.latent, self.wanted, self.seed = activity, latent, wanted, seed
        self.half = activity.held_out == held_out
        self.length = activity.tokens.shape[1]
        self.rows, self.values = activity.of(latent)
        inside = self.half[self.rows // self.length]
        self.rows, self.values = self.rows[inside], self.values[inside]
        self.on = np.zeros(activity.tokens.size + 1, bool)  # the last for what is beyond the text
        self.on[activity.of(latent)[0]] = True

    def drawn(self) -> Drawn:
        wanted = self.wanted
        of_sequences, strength = self._peaks()
        top, rest = of_sequences[: wanted.top], np.arange(wanted.top, len(of_sequences))
        intervals = [[] for _ in range(wanted.intervals)]
        if wanted.per_interval and len(rest):
            maximum = np.full(len(rest), strength[0])
            part = wanted.intervals - 1 - parts_of(strength[rest], maximum, wanted.intervals)
            for number in range(wanted.intervals):
                members = self._chosen(of_sequences[rest[part == number]], wanted.per_interval, 1)
                intervals[number] = [self._example(row) for row in members]
        used = (self.activity.used & self.half[:, None]).reshape(-1)
        places = np.flatnonzero(used)
        tokens = self.activity.tokens.reshape(-1)
        of_latent = np.unique(tokens[of_sequences[: max(wanted.top, 10)]])
        around = places[np.isin(tokens[places], of_latent)] if wanted.out_of_context else places[:0]
        return Drawn(
            [self._example(row) for row in top],
            intervals,
            self._without(places, wanted.random, 2),
            self._without(around, wanted.out_of_context, 3),
        )

    def _peaks(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the row of the highest peak of each sequence, and its activation, the strongest
        first, of windows with the same tokens only the first."""
        seen, kept = set(), []
        for place in peaks(self.rows, self.values, self.length).tolist():
            window = self._window(self.rows[place])
            text = self.activity.tokens.reshape(-1)[slice(*window)].tobytes()
            if text not in seen:
                seen.add(text)
                kept.append(place)
        return self.rows[kept], self.values[kept]

    def _window(self, row: int) -> tuple[int, int]:
        """Returns the first row of the window around a row and the one after its last."""
        begin = row // self.length * self.length
        return (
            max(int(row) - self.wanted.before, int(begin)),
            min(int(row) + self.wanted.after + 1, int(begin) + self.length),
        )

    def _chosen(self, rows: np.ndarray, count: int, purpose: int) -> np.ndarray:
        """Returns `count` of the rows, a uniform sample by hashes."""
        seed = int(mix(self.seed * 8 + purpose)[0] >> np.uint64(1))
        drawn = priorities(seed, np.full(len(rows), self.latent), rows)
        return rows[np.argsort(~drawn, kind="stable")[:count]]

    def _without(self, places: np.ndarray, count: int, purpose: int) -> list[Example]:
        """Returns up to `count` windows around these places in which the latent is off, one of a
        sequence where there are enough."""
        if not count or not len(places):
            return []
        order = self._chosen(places, min(len(places), 64 * count + 1024), purpose)
        order = [row for row in order.tolist() if not self.on[slice(*self._window(row))].any()]
        seen, first, again = set(), [], []
        for row in order:
            (again if row // self.length in seen else first).append(row)
            seen.add(row // self.length)
        return [self._example(row) for row in [*first, *again][:count]]

    def _example(self, row: int) -> Example:
        sequence, peak = divmod(int(row), self.length)
        begin, end = self._window(row)
        activations = np.zeros(end - begin, np.float32)
        inside = slice(*np.searchsorted(self.rows, [begin, end]))
        activations[self.rows[inside] - begin] = self.values[inside]
        start = begin - sequence * self.length
        return Example(
            int(self.activity.numbers[sequence]),
            self.activity.tokens[sequence],
            start,
            start + end - begin,
            peak,
            activations,
        )


def draw_latents(activity: Activity, count: int, seed: int = 0, least: int = 20) -> list[int]:
    """Returns `count` of the latents that are active on at least `least` tokens, rising.

    They are a uniform sample by hashes: of more latents, fewer are the same ones.
    """
    latents = np.flatnonzero(activity.counts >= least)
    order = np.argsort(priorities(seed, latents, np.zeros_like(latents)), kind="stable")
    return np.sort(latents[order[::-1][:count]]).tolist()
