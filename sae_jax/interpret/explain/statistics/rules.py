"""Rules that tell of a token, by itself and those around it, whether a latent is active there.

A rule knows at which tokens of a text it holds in two ways: at given tokens, and as the list of all
of them, which is found by an index of the text and not by going through it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from sae_jax import lm
from sae_jax.interpret.explain.statistics.indexed_text import IndexedText
from sae_jax.interpret.text import token_bytes, token_text

_LEAVES = 2  # of a tree that its label tells


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

    def label(self, tokenizer: lm.Tokenizer, names: Sequence[str], named: int) -> str:
        """Returns it in words, with at most `named` tokens of a list, by the indicators' names."""


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
        return text.is_one(rows, self.tokens, self.offset)

    def rows(self, text: IndexedText) -> np.ndarray:
        """Returns all rows at which it holds and that count, rising."""
        return text.rows(self.tokens, self.offset)

    def label(self, tokenizer: lm.Tokenizer, names: Sequence[str], named: int = 6) -> str:
        """Returns it in words, with at most `named` tokens."""
        tokens = _one_of(self.tokens, tokenizer, named)
        return {0: "", -1: "what follows ", 1: "what comes before "}[self.offset] + tokens


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
        return text.is_one(rows, self.tokens) & text.is_one(rows, self.before, -1)

    def rows(self, text: IndexedText) -> np.ndarray:
        """Returns all rows at which it holds and that count, rising."""
        rows = text.rows(self.tokens)
        return rows[text.is_one(rows, self.before, -1)]

    def label(self, tokenizer: lm.Tokenizer, names: Sequence[str], named: int = 3) -> str:
        """Returns it in words, with at most `named` tokens of each list."""
        tokens, before = (_one_of(t, tokenizer, named) for t in (self.tokens, self.before))
        return f"{tokens} after {before}"


@dataclasses.dataclass(frozen=True)
class Indicated:
    """Holds where one of some indicators of the text does, there or at a token before.

    Attributes:
      indicators: their numbers.
      kind: their kind.
      offset: 0 the token itself, -1 the one before it, and so on.
    """

    indicators: tuple[int, ...]
    kind: str
    offset: int = 0

    @property
    def cost(self) -> int:
        """The number of indicators."""
        return len(self.indicators)

    def holds(self, text: IndexedText, rows: np.ndarray) -> np.ndarray:
        """Returns at which of these rows it holds, (m,) bool."""
        return text.is_flagged(rows, self.indicators, self.offset)

    def rows(self, text: IndexedText) -> np.ndarray:
        """Returns all rows at which it holds and that count, rising."""
        return text.flagged(self.indicators, self.offset)

    def label(self, tokenizer: lm.Tokenizer, names: Sequence[str], named: int = 6) -> str:
        """Returns it in words, with at most `named` indicators."""
        more = f" and {len(self.indicators) - named} more" if len(self.indicators) > named else ""
        label = " or ".join(names[indicator] for indicator in self.indicators[:named]) + more
        if self.offset < -1:
            return f"{-self.offset} tokens after {label}"
        return f"after {label}" if self.offset else label


@dataclasses.dataclass(frozen=True)
class Tree:
    """Holds in some leaves of a shallow decision tree, each a list of rules that hold or do not.

    Attributes:
      leaves: for each leaf, (rule, whether it holds) along the way to it. Leaves may share rows.
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
            inside = np.flatnonzero(~found)
            for rule, wanted in leaf:
                inside = inside[rule.holds(text, rows[inside]) == wanted]
            found[inside] = True
        return found

    def rows(self, text: IndexedText) -> np.ndarray:
        """Returns all rows at which it holds and that count, rising."""
        found = np.zeros(len(text.used), bool)
        for leaf in self.leaves:
            known = [rule.rows(text) for rule, wanted in leaf if wanted]
            inside = min(known, key=len) if known else text.all_rows
            for rule, wanted in leaf:
                inside = inside[rule.holds(text, inside) == wanted]
            found[inside] = True
        return np.flatnonzero(found)

    def label(self, tokenizer: lm.Tokenizer, names: Sequence[str], named: int = 2) -> str:
        """Returns it in words, with at most `named` tokens of each list, and few of its leaves."""
        leaves = [
            " and ".join(
                ("" if wanted else "not ") + rule.label(tokenizer, names, named)
                for rule, wanted in leaf
            )
            for leaf in self.leaves[:_LEAVES]
        ]
        if (more := len(self.leaves) - _LEAVES) > 0:
            leaves.append(f"in {more} more way{'s' * (more > 1)}")
        return "; or ".join(leaves)


def _one_of(tokens: Sequence[int], tokenizer: lm.Tokenizer, named: int) -> str:
    texts = [_quoted(token, tokenizer) for token in tokens[:named]]
    more = f" and {len(tokens) - named} more" if len(tokens) > named else ""
    return (texts[0] if len(tokens) == 1 else "one of " + ", ".join(texts)) + more


def _quoted(token: int, tokenizer: lm.Tokenizer) -> str:
    """Returns a token's text in quotes; its bytes, if it is a part of a character."""
    data = token_bytes(tokenizer, token)
    try:
        data.decode()
    except UnicodeDecodeError:
        return f"byte{'s' * (len(data) > 1)} {data.hex(' ').upper()}"
    return f'"{token_text(tokenizer, token)}"'
