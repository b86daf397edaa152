"""Says of every token of a text which simple rules hold there: scripts, characters, patterns.

Rules are about text, not about tokens: a sequence is turned into whole characters, and a rule holds
at every token that has a part in what it is about. A token that is a part of a character, as in
byte-level vocabularies, has the character's script.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

import numpy as np
from fontTools import unicodedata

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.interpret.text import token_bytes
from sae_jax.progress_bar import progress

_CODE = r"def|return|import|class|self|lambda|elif|None|True|False|var|const|function|public|void"
PATTERNS = {
    "URLs": r"(?:https?://|www\.)[^\s\"'<>)\]]+",
    "e-mail addresses": r"[\w.+-]+@[\w-]+\.[\w.-]+",
    "numbers": r"(?<![\w.])[0-9]+(?:[.,][0-9]+)*(?!\w)",
    "years": r"(?<![0-9])(?:1[0-9]|20)[0-9]{2}(?![0-9])",
    "HTML tags": r"</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?>",
    "text in quotes": r"\"[^\"\n]{1,200}\"|\u201c[^\u201d\n]{1,200}\u201d"
    r"|\u00ab[^\u00bb\n]{1,200}\u00bb",
    "text in parentheses": r"\([^()\n]{1,200}\)",
    "DNA": r"(?<![A-Za-z])[ACGT]{8,}(?![A-Za-z])|(?<![A-Za-z])[acgt]{12,}(?![A-Za-z])",
    "hexadecimal": r"(?<![0-9A-Za-z])(?=[0-9a-fA-F]*[0-9])[0-9a-fA-F]{8,}(?![0-9A-Za-z])",
    "base64": r"(?<![\w+/])(?=[a-zA-Z0-9+/]*[0-9])(?=[a-z0-9+/]*[A-Z])[0-9A-Za-z+/]{24,}={0,2}",
    "CamelCase": r"(?<!\w)[A-Z]?[a-z0-9]+(?:[A-Z][a-z0-9]+)+(?!\w)",
    "snake_case": r"(?<!\w)_*[A-Za-z0-9]+(?:_[A-Za-z0-9]+)+_*(?!\w)",
    "CAPS_WITH_UNDERSCORES": r"(?<!\w)[A-Z0-9]+(?:_[A-Z0-9]+)+(?!\w)",
    "keywords of code": rf"(?<!\w)(?:{_CODE})(?!\w)",
    "indentation": r"(?m)^[ \t]+",
    "empty lines": r"\n[ \t]*\n",
}
"""Regular expressions by what they are called; they hold at every token of a match."""

_COMMON = ("Zyyy", "Zinh", "Zzzz")  # characters of no script of their own
_NO_TEXT = dict.fromkeys(range(0xDC80, 0xDD00), 0xFFFD)  # what Python decodes stray bytes to
_CHARACTERS = {
    "letters": lambda text: text.isalpha(),
    "digits": lambda text: text.isdigit(),
    "punctuation": lambda text: not any(c.isalnum() or c.isspace() for c in text),
    "capitals": lambda text: text.isupper() and len(text) > 1,
    "capitalised words": lambda text: text.istitle() and text.isalpha() and len(text) > 1,
    "letters beyond ASCII": lambda text: any(c.isalpha() and not c.isascii() for c in text),
}
"""Tests of a piece of text without the space around it."""


@dataclasses.dataclass(frozen=True)
class Indicators:
    """The rules of a text, and at which tokens each holds.

    Attributes:
      names: what the rules are called, P of them.
      kinds: what sort each is: script, characters, regex or position.
      array: where each holds, (P, n, T) bool.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    array: np.ndarray

    def of(self, name: str) -> np.ndarray:
        """Returns where the rule of this name holds, (n, T). Raises UserError if there is none."""
        if name not in self.names:
            raise UserError(f"no rule {name!r}; there are {', '.join(self.names)}")
        return self.array[self.names.index(name)]


@dataclasses.dataclass(frozen=True)
class Spelled:
    """A sequence as text.

    Attributes:
      text: the text, with its control characters.
      starts: where the part of each token begins in it, (T,), rising. Tokens that are parts of one
        character have all of it.
      stops: where it ends, (T,).
    """

    text: str
    starts: np.ndarray
    stops: np.ndarray

    def tokens_at(self, first: int, stop: int) -> slice:
        """Returns the tokens that have a part of the characters first..stop."""
        return slice(
            int(np.searchsorted(self.stops, first, "right")),
            int(np.searchsorted(self.starts, stop, "left")),
        )


def spell(tokenizer: lm.Tokenizer, ids: np.ndarray) -> Spelled:
    """Returns token ids (T,) as text, with the characters that each token has a part of.

    A special token stands for a line end, and a byte that is of no whole character for U+FFFD.
    """
    special = tokenizer.special_tokens
    parts = [b"\n" if i in special else token_bytes(tokenizer, i) for i in ids.tolist()]
    text = b"".join(parts).decode(errors="surrogateescape")  # a character for each stray byte
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    stray = (codes >= 0xDC80) & (codes <= 0xDCFF)
    lengths = 1 + np.sum([codes >= first for first in (0x80, 0x800, 0x10000)], axis=0)
    ends = np.cumsum(np.where(stray, 1, lengths))  # of the characters, in bytes
    stop = np.cumsum([len(part) for part in parts])
    start = stop - [len(part) for part in parts]
    first, last = np.searchsorted(ends, start, "right"), np.searchsorted(ends, stop, "left") + 1
    text = text.translate(_NO_TEXT) if stray.any() else text
    return Spelled(text, first, np.where(stop > start, last, first))


def indicators(
    tokenizer: lm.Tokenizer, tokens: np.ndarray, patterns: Mapping[str, str] | None = None
) -> Indicators:
    """Returns which rules hold at each token: all that do at any, and not at all.

    Scripts are those of Unicode; characters are what a token is made of; patterns are regular
    expressions, which hold at the tokens of their matches; positions count from the first token.

    Args:
      tokenizer: what turns tokens into text.
      tokens: token ids, (n, T).
      patterns: further regular expressions by name, beside `PATTERNS`.

    Raises UserError if a pattern is no regular expression.
    """
    expressions = _compiled(PATTERNS | dict(patterns or {}))
    found = _Found(tokens.shape)
    for row, ids in enumerate(progress(tokens, "reading the text", len(tokens), "sequence")):
        spelled = spell(tokenizer, ids)
        for token, (start, stop) in enumerate(zip(spelled.starts, spelled.stops, strict=True)):
            for rule in _rules_of(spelled.text[start:stop]):
                found.at(rule)[row, token] = True
        for name, matched in _matched(expressions, spelled):
            found.at((name, "regex"))[row, matched] = True
    for name, stop in (("first token", 1), ("first 4 tokens", 4), ("first 16 tokens", 16)):
        if stop < tokens.shape[1]:
            found.at((f"{name} of a context", "position"))[:, :stop] = True
    return found.indicators()


def matches(
    tokenizer: lm.Tokenizer, tokens: np.ndarray, patterns: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Returns the tokens of the matches of regular expressions, for each (n, T) bool.

    Args:
      tokenizer: what turns tokens into text.
      tokens: token ids, (n, T).
      patterns: the expressions by name.

    Raises UserError if one is no regular expression.
    """
    expressions = _compiled(patterns)
    found = {name: np.zeros(tokens.shape, bool) for name in expressions}
    for row, ids in enumerate(progress(tokens, "matching patterns", len(tokens), "sequence")):
        for name, matched in _matched(expressions, spell(tokenizer, ids)):
            found[name][row, matched] = True
    return found


def _matched(expressions: dict[str, re.Pattern], spelled: Spelled) -> Iterator[tuple[str, slice]]:
    """Yields the name of an expression and the tokens of a match, for each match."""
    for name, expression in expressions.items():
        for match in expression.finditer(spelled.text):
            if match.end() > match.start():
                yield name, spelled.tokens_at(*match.span())


class _Found:
    """Where rules hold, by (name, kind), with memory for those alone that hold anywhere."""

    def __init__(self, shape: tuple[int, int]):
        self._shape, self._arrays = shape, {}

    def at(self, rule: tuple[str, str]) -> np.ndarray:
        if rule not in self._arrays:
            self._arrays[rule] = np.zeros(self._shape, bool)
        return self._arrays[rule]

    def indicators(self) -> Indicators:
        order = sorted(
            (rule for rule, where in self._arrays.items() if where.any() and not where.all()),
            key=lambda rule: (rule[1], rule[0]),
        )
        array = np.zeros((len(order), *self._shape), bool)
        for place, rule in enumerate(order):
            array[place] = self._arrays.pop(rule)
        return Indicators(tuple(n for n, _ in order), tuple(kind for _, kind in order), array)


@functools.lru_cache(2**18)
def _rules_of(text: str) -> tuple[tuple[str, str], ...]:
    """Returns the rules about a token's own text that hold, as (name, kind)."""
    found = [(f"{script} script", "script") for script in scripts(text)]
    bare = text.strip()
    if bare:
        found += [(name, "characters") for name, test in _CHARACTERS.items() if test(bare)]
        if text[0] == " ":
            found.append(("words that begin with a space", "characters"))
    else:
        found.append(("line ends" if "\n" in text else "spaces", "characters"))
    return tuple(found)


def scripts(text: str) -> tuple[str, ...]:
    """Returns the names of the scripts that the characters of a text are of, common ones left out.

    Names are Unicode's, such as Arabic, Latin and Han.
    """
    codes = {unicodedata.script(character) for character in text}
    return tuple(sorted(unicodedata.script_name(c) for c in codes if c not in _COMMON))


def _compiled(patterns: Mapping[str, str]) -> dict[str, re.Pattern]:
    found = {}
    for name, expression in patterns.items():
        try:
            found[name] = re.compile(expression)
        except re.error as error:
            raise UserError(f"{name}={expression} is no regular expression: {error}") from None
    return found
