"""Scores labels of latents, and latents without labels, by vectors of sentences.

No language model judges here. A window of text on which a latent is active is to be more like the
latent's label than one on which it is not, by the cosine of an encoder's vectors. The score is the
area under the ROC curve (AUC): how often that is so of a pair of windows, 0.5 by chance.

All windows that are scored are of the held-out half of the text. Those without a latent are drawn
from a pool that the latents share, so that each adds no more than its own windows to the work.
"""

import collections
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sae_jax import lm
from sae_jax.errors import UserError, choose
from sae_jax.interpret.activity import Activity
from sae_jax.interpret.collection import Example
from sae_jax.interpret.explain.examples import Wanted, draw
from sae_jax.interpret.explain.others import others
from sae_jax.interpret.explain.records import LATENTS, Explanation, Score
from sae_jax.interpret.hashes import priorities
from sae_jax.interpret.roc import auc
from sae_jax.interpret.text import token_bytes
from sae_jax.lm.sentences import SentenceEncoder, open_sentence_encoder
from sae_jax.progress_bar import progress

METHOD = "examples-1"
"""The method, with its version, of scores that no label is needed for."""

NOTHING = "some text"
"""The label that says nothing, for the control "none"."""

CONTROLS = ("shuffled", "none")

LEAST = 5
"""How many windows of either sort a score needs."""

CHARACTERS = 110
"""How much text of a window is read, with the peak in its middle."""

_REACH = 16  # tokens on either side of a peak by which windows with the same text are told
_PARTS = 10  # of 0 to a latent's maximum, from which its windows come in turn
_POOL = 8  # how many times more windows there are in the pool than a latent needs
_BLOCK = 64  # latents whose windows are encoded together


def by_embedding(
    activity: Activity,
    tokenizer: lm.Tokenizer,
    encoder: SentenceEncoder | str | os.PathLike,
    explanations: Iterable[Explanation] = (),
    latents: Sequence[int] = (),
    *,
    units: str = LATENTS,
    windows: int = 20,
    controls: Sequence[str] = CONTROLS,
    seed: int = 0,
) -> list[Score]:
    """Returns the scores of `separability` and of `score_labels`, and encodes each window once.

    Args:
      activity: where the latents are active.
      tokenizer: what turns tokens into text.
      encoder: an encoder of sentences, or the directory or name on the hub of one.
      explanations: the labels to score; those of other units than `units` are left out.
      latents: the latents to score without labels.
      units: what they are, for the records.
      windows: as for `score_labels`.
      controls: as for `score_labels`.
      seed: the seed of what is drawn.
    """
    if not isinstance(encoder, SentenceEncoder):
        encoder = open_sentence_encoder(encoder)
    ours = [explanation for explanation in explanations if explanation.units == units]
    labels = _Labels(encoder, ours, controls, seed)
    return _scores(activity, tokenizer, encoder, latents, units, labels, windows, seed)


def separability(
    activity: Activity,
    tokenizer: lm.Tokenizer,
    encoder: SentenceEncoder,
    latents: Sequence[int],
    *,
    units: str = LATENTS,
    windows: int = 20,
    seed: int = 0,
) -> list[Score]:
    """Returns how well windows with and without each latent can be told apart without a label.

    The mean of the vectors of windows on which the latent is active, less the mean of others, is
    taken on the half of the text that is not held out. The score "embedding_examples" is the AUC of
    the product of this direction with the windows of the held-out half. The control "shuffled" has
    the direction of another latent.

    Args:
      activity: where the latents are active.
      tokenizer: what turns tokens into text.
      encoder: an encoder of sentences.
      latents: which latents.
      units: what they are, for the records.
      windows: of each half, how many windows of each sort are wanted.
      seed: the seed of what is drawn.
    """
    labels = _Labels(encoder, [], (), seed)
    return _scores(activity, tokenizer, encoder, latents, units, labels, windows, seed)


def score_labels(
    activity: Activity,
    tokenizer: lm.Tokenizer,
    encoder: SentenceEncoder,
    explanations: Iterable[Explanation],
    *,
    windows: int = 20,
    controls: Sequence[str] = CONTROLS,
    hard: bool = False,
    seed: int = 0,
) -> list[Score]:
    """Returns how well labels tell the windows with their latents from those without.

    The score "embedding" is the AUC of the cosines of the label and the held-out windows. The
    windows with a latent are one of a sequence, in turn from each tenth of the range of its peaks,
    the highest first; the others are random. A score is None where there are fewer than `LEAST` of
    either, or where the explanation is "". Its standard error (DeLong et al. 1988) is in its
    details.

    Args:
      activity: where the latents are active.
      tokenizer: what turns tokens into text.
      encoder: an encoder of sentences.
      explanations: the labels, all of them of units of `activity`.
      windows: how many windows of each sort are wanted.
      controls: which controls are scored besides: "shuffled" for the label of another unit that was
        found by the same method and has another text, "none" for a label that says nothing.
      hard: whether the windows without the latent are those around tokens on which it is often
        active, as far as there are any. The score is then "embedding_hard".
      seed: the seed of what is drawn.

    Raises UserError for an unknown control or fewer than `LEAST` windows.
    """
    labels = _Labels(encoder, explanations, controls, seed)
    return _scores(activity, tokenizer, encoder, [], LATENTS, labels, windows, seed, hard)


def window(tokenizer: lm.Tokenizer, ids: np.ndarray, peak: int) -> tuple[int, int, str]:
    """Returns the window of about `CHARACTERS` around a token: its start, its end and its text.

    It is of whole tokens, and has the token in its middle unless the sequence ends before. In the
    text, tokens that stand for no text are line ends, and parts of a character are left out.

    Args:
      tokenizer: what turns tokens into text.
      ids: the tokens of the sequence, (T,).
      peak: the position of the token.
    """
    reach, marks = 3 * CHARACTERS, _marks(tokenizer)  # few characters are more than three tokens
    low = max(0, peak - reach)
    parts = [
        b"\n" if token in marks else token_bytes(tokenizer, token)
        for token in ids[low : peak + reach + 1].tolist()
    ]
    # A character begins at each byte of UTF-8 that does not continue one.
    widths = [sum(byte & 0xC0 != 0x80 for byte in part) for part in parts]
    ends, peak = np.cumsum([0, *widths]), peak - low
    first = ends[peak] + (widths[peak] - CHARACTERS) // 2
    first = max(0, min(first, ends[-1] - CHARACTERS))
    start = min(int(np.searchsorted(ends, first)), peak)
    stop = max(int(np.searchsorted(ends, first + CHARACTERS, "right")) - 1, peak + 1)
    text = b"".join(parts[start:stop]).decode(errors="ignore")
    return low + start, low + stop, text.strip()


@functools.lru_cache(8)
def _marks(tokenizer: lm.Tokenizer) -> frozenset[int]:
    return frozenset(tokenizer.marks)


@dataclasses.dataclass(frozen=True)
class _Vectors:
    """The vectors of a unit's windows: those on which it is active, and others."""

    active: np.ndarray
    inactive: np.ndarray

    def enough(self) -> bool:
        return min(len(self.active), len(self.inactive)) >= LEAST

    def direction(self) -> np.ndarray:
        return self.active.mean(axis=0) - self.inactive.mean(axis=0)

    def result(self, direction: np.ndarray | None, **details) -> dict:
        """Returns the fields of a score by the products with a direction; None has no value."""
        counts = {"active": len(self.active), "inactive": len(self.inactive)}
        examples = sum(counts.values())
        if direction is None or not self.enough():
            return {"value": None, "examples": examples, "details": details | counts}
        value, error = auc(self.active @ direction, self.inactive @ direction)
        details |= counts | {"standard_error": round(error, 6)}
        return {"value": round(value, 6), "examples": examples, "details": details}


class _Windows:
    """Windows of the text around some rows.

    Attributes:
      starts: the first row of each.
      stops: the row after its last.
      texts: its text.
    """

    def __init__(self, activity: Activity, tokenizer: lm.Tokenizer, rows: Iterable[int]):
        length, found = activity.tokens.shape[1], []
        for sequence, peak in (divmod(int(row), length) for row in rows):
            start, stop, text = window(tokenizer, activity.tokens[sequence], peak)
            found.append((sequence * length + start, sequence * length + stop, text))
        self.starts, self.stops = (np.array([one[side] for one in found], int) for side in (0, 1))
        self.texts = [text for _, _, text in found]

    def off(self, rows: np.ndarray) -> np.ndarray:
        """Returns the numbers of the windows that have none of these rising rows."""
        at_start, at_stop = np.searchsorted(rows, self.starts), np.searchsorted(rows, self.stops)
        return np.flatnonzero(at_start == at_stop)


class _Half:
    """One half of the text: the vectors of windows with units and without."""

    def __init__(
        self,
        activity: Activity,
        tokenizer: lm.Tokenizer,
        encoder: SentenceEncoder,
        *,
        held_out: bool,
        windows: int,
        seed: int,
        hard: bool,
    ):
        self._activity, self._tokenizer, self._encoder = activity, tokenizer, encoder
        self._held_out, self._windows, self._seed, self._hard = held_out, windows, seed, hard
        self._row_of = {int(number): row for row, number in enumerate(activity.numbers)}
        used = activity.used & (activity.held_out == held_out)[:, None]
        places = np.flatnonzero(used)
        drawn = priorities(seed, np.full(len(places), activity.d_sae), places)
        self._rows = places[np.argsort(~drawn, kind="stable")[: _POOL * windows]]
        self._pool = _Windows(activity, tokenizer, self._rows)
        self._vectors = encoder.encode(self._pool.texts)

    def vectors(self, units: Sequence[int]) -> list[_Vectors]:
        """Returns the vectors of the windows of some units."""
        pairs = [self._drawn(unit) for unit in units]
        active = self._encoded([texts for texts, _ in pairs])
        if self._hard:
            inactive = self._encoded([texts for _, texts in pairs])
        else:
            inactive = [self._vectors[self._without(unit)] for unit in units]
        return [_Vectors(*pair) for pair in zip(active, inactive, strict=True)]

    def _drawn(self, unit: int) -> tuple[list[str], list[str]]:
        """Returns the texts of a unit's windows, and of hard ones without it where wanted."""
        hard = 4 * self._windows if self._hard else 0  # some of which have it farther away
        wanted = Wanted(0, _PARTS, self._windows, 0, hard, _REACH, _REACH)
        drawn = draw(self._activity, unit, wanted, held_out=self._held_out, seed=self._seed)
        turns = itertools.chain.from_iterable(itertools.zip_longest(*drawn.intervals))
        active = self._around([one for one in turns if one is not None][: self._windows])
        around = self._around(drawn.out_of_context)
        off = around.off(self._activity.of(unit)[0])[: self._windows]
        return active.texts, [around.texts[i] for i in off]

    def _around(self, examples: list[Example]) -> _Windows:
        length = self._activity.tokens.shape[1]
        rows = [self._row_of[one.sequence] * length + one.peak for one in examples]
        return _Windows(self._activity, self._tokenizer, rows)

    def _without(self, unit: int) -> np.ndarray:
        """Returns the windows of the pool on which a unit is off, as many as are wanted."""
        off = self._pool.off(self._activity.of(unit)[0])
        drawn = priorities(self._seed, np.full(len(off), unit), self._rows[off])
        return off[np.argsort(~drawn, kind="stable")[: self._windows]]

    def _encoded(self, lists: list[list[str]]) -> list[np.ndarray]:
        vectors = self._encoder.encode(list(itertools.chain.from_iterable(lists)))
        return np.split(vectors, np.cumsum([len(one) for one in lists])[:-1])


class _Labels:
    """Explanations and their controls, with the vectors of their labels."""

    def __init__(
        self,
        encoder: SentenceEncoder,
        explanations: Iterable[Explanation],
        controls: Sequence[str],
        seed: int,
    ):
        for control in controls:
            choose(control, CONTROLS, "a control of embeddings")
        self._controls, self._of = controls, collections.defaultdict(list)
        methods = collections.defaultdict(list)
        for explanation in explanations:
            self._of[explanation.unit].append(explanation)
            if explanation.text:
                methods[explanation.by, explanation.method].append(explanation)
        self._other = {}
        if "shuffled" in controls:
            for alike in methods.values():
                by_unit = {one.unit: one for one in alike}
                pairs = others({unit: one.text for unit, one in by_unit.items()}, seed)
                self._other |= {_key(by_unit[a]): by_unit[b] for a, b in pairs.items()}
        texts = [NOTHING, *(one.text for alike in methods.values() for one in alike)]
        self._vector = dict(zip(texts, encoder.encode(texts), strict=True))

    @property
    def units(self) -> set[int]:
        return set(self._of)

    def scores(self, unit: int, windows: _Vectors, scorer: str) -> Iterator[Score]:
        """Yields the scores of a unit's labels and of their controls."""
        for one in self._of.get(unit, ()):
            who = (one.units, one.unit, one.by, one.method, scorer)
            yield Score(*who, **windows.result(self._vector.get(one.text)))
            if not one.text:
                continue
            if (other := self._other.get(_key(one))) is not None:
                vector = self._vector[other.text]
                yield Score(*who, control="shuffled", **windows.result(vector, of=other.unit))
            if "none" in self._controls:
                yield Score(*who, control="none", **windows.result(self._vector[NOTHING]))


def _scores(
    activity: Activity,
    tokenizer: lm.Tokenizer,
    encoder: SentenceEncoder,
    latents: Sequence[int],
    units: str,
    labels: _Labels,
    windows: int,
    seed: int,
    hard: bool = False,
) -> list[Score]:
    """Returns the scores of latents without labels, and of labels."""
    if windows < LEAST:
        raise UserError(f"{windows} windows are too few to score by; take {LEAST} or more")
    scorer, without_label = "embedding_hard" if hard else "embedding", {int(i) for i in latents}
    half = functools.partial(
        _Half, activity, tokenizer, encoder, windows=windows, seed=seed, hard=hard
    )
    tested, found = half(held_out=True), half(held_out=False) if without_label else None
    numbers = sorted(without_label | labels.units)
    starts = range(0, len(numbers), _BLOCK)
    scores = []
    for start in progress(starts, "scoring by embeddings", len(starts), "block"):
        block = numbers[start : start + _BLOCK]
        of_unit = dict(zip(block, tested.vectors(block), strict=True))
        for unit in block:
            scores += labels.scores(unit, of_unit[unit], scorer)
        if chosen := [unit for unit in block if unit in without_label]:
            scores += _separated(chosen, found.vectors(chosen), of_unit, units)
    return scores


def _separated(block: list[int], found: list[_Vectors], tested: dict, units: str) -> list[Score]:
    """Returns the scores of latents without labels. The control is the latent before in the block,
    and the last one for the first."""
    directions = [one.direction() if one.enough() else None for one in found]
    scores = []
    for place, unit in enumerate(block):
        who = (units, unit, "embedding", METHOD, "embedding_examples")
        scores.append(Score(*who, **tested[unit].result(directions[place])))
        if len(block) > 1:
            result = tested[unit].result(directions[place - 1], of=block[place - 1])
            scores.append(Score(*who, control="shuffled", **result))
    return scores


def _key(explanation: Explanation) -> tuple[str, str, int]:
    return explanation.by, explanation.method, explanation.unit
