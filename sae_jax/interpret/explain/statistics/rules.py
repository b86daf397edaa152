"""Rules that tell of a token, by itself and those around it, whether a latent is active there.

A rule knows at which tokens of a text it holds in two ways: at given tokens, and as the list of all
of them, which is found by an index of the text and not by going through it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from sae_jax import lm
from sae_jax.interpret.activity import Activity
from sae_jax.interpret.proxies import Indicators
from sae_jax.interpret.slots import firsts
from sae_jax.interpret.text import token_text

_NAMED = 6  # tokens that a label names


class IndexedText:
    """A text in which tokens are found fast.

    Attributes:
      tokens: token ids, (R,), R counted over all sequences.
      used: which tokens count, (R,) bool.
      held_out: which tokens rules are tested on, (R,) bool.
      all_rows: those that count, rising.
      length: the tokens of a sequence.
      indicators: what holds at each token besides.
    """

    def __init__(self, activity: Activity, indicators: Indicators):
        """Indexes the text of an activity."""
        self.length = activity.tokens.shape[1]
        self.tokens, self.used = activity.tokens.reshape(-1), activity.used.reshape(-1)
        self.held_out = np.repeat(activity.held_out, self.length)
        self.indicators = indicators
        # A token's flags lie together, since they are looked up at a latent's few tokens.
        self._flags = np.ascontiguousarray(indicators.array.reshape(len(indicators.names), -1).T)
        self._order = np.argsort(self.tokens, kind="stable").astype(np.int32)
        self._ends = np.cumsum(np.bincount(self.tokens))
        self.all_rows = np.flatnonzero(self.used).astype(np.int32)
        self._flagged = functools.lru_cache(None)(self._all_flagged)
        found = self.used & ~self.held_out
        self.found_on = int(found.sum())
        """The number of tokens that rules are found on."""
        self.flag_counts = self._flags[found].sum(axis=0)
        """The number of these at which each indicator holds, (P,)."""
        self._counts = [self._count(offset, found) for offset in (-1, 0, 1)]
        self._rates = np.bincount(self.tokens, self.used) / max(int(self.used.sum()), 1)

    def around(self, rows: np.ndarray, offset: int) -> np.ndarray:
        """Returns the tokens `offset` places after these, -1 beyond the sequence."""
        inside = (rows % self.length + offset >= 0) & (rows % self.length + offset < self.length)
        return np.where(inside, self.tokens[np.where(inside, rows + offset, 0)], -1)

    def counts(self, tokens: np.ndarray, offset: int) -> np.ndarray:
        """Returns for how many of the tokens that rules are found on each of `tokens` is `offset`
        places after them."""
        return self._counts[offset + 1][tokens]

    def rate(self, tokens: np.ndarray) -> np.ndarray:
        """Returns what part of the whole text each of `tokens` is."""
        return self._rates[tokens]

    def rows(self, tokens: np.ndarray, offset: int = 0) -> np.ndarray:
        """Returns all rows that have one of the tokens `offset` places after them, rising."""
        starts = np.where(tokens > 0, self._ends[tokens - 1], 0)
        parts = [self._order[a:b] for a, b in zip(starts, self._ends[tokens], strict=True)]
        rows = np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.int32)
        place = rows % self.length - offset
        rows = (rows - offset)[(place >= 0) & (place < self.length)]
        return rows[self.used[rows]]

    def flags(self, rows: np.ndarray) -> np.ndarray:
        """Returns which indicators hold at these rows, (P, m) bool."""
        return self._flags[rows].T

    def flagged(self, indicator: int) -> np.ndarray:
        """Returns all rows at which an indicator holds, rising."""
        return self._flagged(indicator)

    def _all_flagged(self, indicator: int) -> np.ndarray:
        return np.flatnonzero(self._flags[:, indicator] & self.used).astype(np.int32)

    def _count(self, offset: int, found: np.ndarray) -> np.ndarray:
        tokens = self.around(np.flatnonzero(found), offset)
        return np.bincount(tokens[tokens >= 0], minlength=len(self._ends))


class Rule(Protocol):
    """What a rule can be asked.

    Attributes:
      kind: what sort of rule it is, in a word or two.
      cost: of how many choices it is made.
    """

    kind: str
    cost: int

    def holds(self, text: IndexedText, rows: np.ndarray) -> np.ndarray:
        """Returns at which of these rows it holds, (m,) bool."""

    def rows(self, text: IndexedText) -> np.ndarray:
        """Returns all rows at which it holds and that count, rising."""

    def label(self, tokenizer: lm.Tokenizer, names: Sequence[str]) -> str:
        """Returns it in words; `names` are those of the indicators."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Holds where one of some tokens is at a place beside the row's own.

    Attributes:
      tokens: the tokens, the most telling first.
      offset: 0 the token itself, -1 the one before it, 1 the one after it.
    """

    tokens: tuple[int, ...]
    offset: int = 0

    @property
    def kind(self) -> str:
        """The sort of rule."""
        if self.offset:
            return "token in context" if self.offset < 0 else "next token"
        return "token" if len(self.tokens) == 1 else "tokens"

    @property
    def cost(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    def holds(self, text: IndexedText, rows: np.ndarray) -> np.ndarray:
        """Returns at which of these rows it holds, (m,) bool."""
        return np.isin(text.around(rows, self.offset), self.tokens)

    def rows(self, text: IndexedText) -> np.ndarray:
        """Returns all rows at which it holds and that count, rising."""
        return text.rows(np.asarray(self.tokens), self.offset)

    def label(self, tokenizer: lm.Tokenizer, names: Sequence[str]) -> str:
        """Returns it in words."""
        named = _one_of(self.tokens, tokenizer)
        return {0: named, -1: f"what follows {named}", 1: f"what comes before {named}"}[self.offset]


@dataclasses.dataclass(frozen=True)
class InContext:
    """Holds at one of some tokens, where it follows one of others.

    Attributes:
      tokens: the tokens, the most telling first.
      before: those before them.
    """

    tokens: tuple[int, ...]
    before: tuple[int, ...]
    kind = "token in context"

    @property
    def cost(self) -> int:
        """The number of tokens."""
        return len(self.tokens) + len(self.before)

    def holds(self, text: IndexedText, rows: np.ndarray) -> np.ndarray:
        """Returns at which of these rows it holds, (m,) bool."""
        return np.isin(text.tokens[rows], self.tokens) & np.isin(text.around(rows, -1), self.before)

    def rows(self, text: IndexedText) -> np.ndarray:
        """Returns all rows at which it holds and that count, rising."""
        rows = text.rows(np.asarray(self.tokens))
        return rows[np.isin(text.around(rows, -1), self.before)]

    def label(self, tokenizer: lm.Tokenizer, names: Sequence[str]) -> str:
        """Returns it in words."""
        return f"{_one_of(self.tokens, tokenizer)} after {_one_of(self.before, tokenizer)}"


@dataclasses.dataclass(frozen=True)
class Indicated:
    """Holds where one of some indicators of the text does.

    Attributes:
      indicators: their numbers.
      kind: their kind.
    """

    indicators: tuple[int, ...]
    kind: str

    @property
    def cost(self) -> int:
        """The number of indicators."""
        return len(self.indicators)

    def holds(self, text: IndexedText, rows: np.ndarray) -> np.ndarray:
        """Returns at which of these rows it holds, (m,) bool."""
        return text.flags(rows)[list(self.indicators)].any(axis=0)

    def rows(self, text: IndexedText) -> np.ndarray:
        """Returns all rows at which it holds and that count, rising."""
        return functools.reduce(np.union1d, map(text.flagged, self.indicators))

    def label(self, tokenizer: lm.Tokenizer, names: Sequence[str]) -> str:
        """Returns it in words."""
        return " or ".join(names[indicator] for indicator in self.indicators)


@dataclasses.dataclass(frozen=True)
class Tree:
    """Holds in some leaves of a shallow decision tree, each a list of rules that hold or do not.

    A choice that other leaves make needless is left out, so that leaves may overlap.

    Attributes:
      leaves: for each leaf, (rule, whether it holds) along the way to it.
    """

    leaves: tuple[tuple[tuple[Rule, bool], ...], ...]
    kind = "tree"

    @property
    def cost(self) -> int:
        """The number of choices."""
        return sum(rule.cost for leaf in self.leaves for rule, _ in leaf)

    def holds(self, text: IndexedText, rows: np.ndarray) -> np.ndarray:
        """Returns at which of these rows it holds, (m,) bool."""
        found = np.zeros(len(rows), bool)
        for leaf in self.leaves:
            inside = np.ones(len(rows), bool)
            for rule, wanted in leaf:
                inside[inside] = rule.holds(text, rows[inside]) == wanted
            found |= inside
        return found

    def rows(self, text: IndexedText) -> np.ndarray:
        """Returns all rows at which it holds and that count, rising."""
        found = []
        for leaf in self.leaves:
            known = [rule.rows(text) for rule, wanted in leaf if wanted]
            inside = min(known, key=len) if known else text.all_rows
            for rule, wanted in leaf:
                inside = inside[rule.holds(text, inside) == wanted]
            found.append(inside)
        rows = np.sort(np.concatenate(found))
        return rows[firsts(rows)]

    def label(self, tokenizer: lm.Tokenizer, names: Sequence[str]) -> str:
        """Returns it in words."""
        leaves = (
            " and ".join(
                ("" if wanted else "not ") + rule.label(tokenizer, names) for rule, wanted in leaf
            )
            for leaf in self.leaves
        )
        return "; or ".join(leaves)


def _one_of(tokens: Sequence[int], tokenizer: lm.Tokenizer) -> str:
    names = [f'"{token_text(tokenizer, token)}"' for token in tokens[:_NAMED]]
    more = f" and {len(tokens) - _NAMED} more" if len(tokens) > _NAMED else ""
    return (names[0] if len(tokens) == 1 else "one of " + ", ".join(names)) + more
