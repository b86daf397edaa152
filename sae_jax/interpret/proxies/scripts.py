"""Says of the tokens of a text which script their characters are of, as small numbers.

A character is of the script that Unicode says. One that several scripts share, such as a comma or
a digit, is of the script that its block is named after, as the Arabic comma is, or of none. Spaces
around other characters do not count.
"""

import dataclasses
import functools

import numpy as np
from fontTools import unicodedata

from sae_jax import lm
from sae_jax.interpret.proxies.indicators import spell
from sae_jax.progress_bar import progress

OTHER, COMMON, SPECIAL = -1, -2, -3
"""Codes of tokens that are of no one script: of several or of a character that the context cuts, of
none of their own, and no text."""

_CUT = "\ufffd"  # what `spell` has for bytes of a character that the context cuts
_SHARED = ("Zyyy", "Zinh", "Zzzz")


@dataclasses.dataclass(frozen=True)
class Scripts:
    """The scripts of the tokens of a text.

    Attributes:
      names: Unicode's names, such as Arabic and Han.
      codes: the script of the characters that each token ends, as a place in `names` or one of the
        codes above, (n, T) int16. A token that ends none has the script of the one it begins.
      is_part: the tokens that end no character, or only spaces, and begin one, (n, T) bool.
    """

    names: tuple[str, ...]
    codes: np.ndarray
    is_part: np.ndarray

    def code(self, name: str) -> int:
        """Returns the code of a script, `OTHER` of one that the text has none of."""
        return self.names.index(name) if name in self.names else OTHER

    def inherited(self) -> np.ndarray:
        """Returns the codes where common tokens have the script of their neighbours, (n, T).

        They do where the nearest tokens that are not common, before and after, are of one script,
        or where there is such a token on one side alone.
        """
        before, after = _filled(self.codes), _filled(self.codes[:, ::-1])[:, ::-1]
        inner = np.where(before <= COMMON, after, before)
        same = (before == after) | (before <= COMMON) | (after <= COMMON)
        return np.where((self.codes == COMMON) & same & (inner >= 0), inner, self.codes)


def scripts_of(tokenizer: lm.Tokenizer, tokens: np.ndarray) -> Scripts:
    """Returns the scripts of token ids (n, T)."""
    codes, is_part = np.zeros(tokens.shape, np.int16), np.zeros(tokens.shape, bool)
    special, places, known = set(tokenizer.special_tokens), {}, {}
    for row, ids in enumerate(progress(tokens, "reading scripts", len(tokens), "sequence")):
        spelled = spell(tokenizer, ids)
        starts, stops = spelled.starts.tolist(), spelled.stops.tolist()
        following = [*starts[1:], len(spelled.text)]
        for token, bounds in enumerate(zip(starts, stops, following, strict=True)):
            text, is_part[row, token] = _ended(spelled.text, *bounds)
            if text not in known:
                known[text] = _code(text, places)
            codes[row, token] = known[text]
        codes[row, [i in special for i in ids.tolist()]] = SPECIAL
    return Scripts(tuple(places), codes, is_part)


def _ended(text: str, start: int, stop: int, following: int) -> tuple[str, bool]:
    """Returns the characters that a token ends, or if it ends none the one that it begins, and
    whether it is that.

    Args:
      text: the text of the sequence.
      start: where the token's part of it begins.
      stop: where it ends.
      following: where that of the next token begins, before `stop` if they share a character.
    """
    own = text[start:stop]
    if following < stop:
        return (own[:-1], False) if own[:-1].strip() else (own[-1], True)
    return own, _is_cut(own)


def _is_cut(text: str) -> bool:
    return _CUT in text and not text.strip().strip(_CUT)


def _code(text: str, places: dict[str, int]) -> int:
    """Returns the code of a text; a script that is not in `places` gets the next place."""
    found = {_script(character) for character in text.strip()}
    if _is_cut(text) or len(found) > 1:
        return OTHER
    if found <= {None}:
        return COMMON
    name = found.pop()
    return places.setdefault(name, len(places))


@functools.lru_cache(2**16)
def _script(character: str) -> str | None:
    """Returns the name of a character's script; None for one that is of none of its own."""
    code = unicodedata.script(character)
    if code not in _SHARED:
        return unicodedata.script_name(code)
    block = unicodedata.block(character) + " "  # those of Latin have signs of all of Europe
    return next(
        (name for name in script_names() if name != "Latin" and block.startswith(name + " ")), None
    )


@functools.cache
def script_names() -> tuple[str, ...]:
    """Returns the names of all scripts of Unicode."""
    codes = unicodedata.Scripts.NAMES
    return tuple(unicodedata.script_name(code) for code in codes if code not in _SHARED)


def _filled(codes: np.ndarray) -> np.ndarray:
    """Returns codes in which a common one is the last before it that is not, if there is any."""
    place = np.where(codes == COMMON, 0, np.arange(codes.shape[1]))
    return np.take_along_axis(codes, np.maximum.accumulate(place, axis=1), axis=1)
