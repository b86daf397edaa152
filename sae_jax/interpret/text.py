"""Turns tokens into text for people: whole characters, spaces kept, control characters visible."""

import dataclasses

import numpy as np

from sae_jax import lm

_MARGIN = 64  # tokens decoded around a window, so that a character that it cuts is whole
_MAX_TOKENS = 4  # of one character: UTF-8 has at most so many bytes
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTROL_PICTURES = {i: 0x2400 + i for i in range(32)} | {127: 0x2421}
_VISIBLE = _CONTROL_PICTURES | {ord("\n"): "↵", ord("\t"): "⇥"}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of text that one token stands for, or several that are parts of one character.

    A character belongs to the token that ends it.

    Attributes:
      start: the position of its first token.
      stop: the position after its last token.
      text: the text.
    """

    start: int
    stop: int
    text: str


def pieces(
    tokenizer: lm.Tokenizer, ids: np.ndarray, start: int = 0, stop: int | None = None
) -> list[Piece]:
    """Returns the pieces of ids[start:stop], cut between characters and as finely as tokens are.

    The tokens around the window are decoded too, for characters that its ends cut.
    """
    stop = len(ids) if stop is None else stop
    low = max(0, start - _MARGIN)
    ids = [int(i) for i in ids[low : stop + _MAX_TOKENS]]
    found = []
    first, end = 0, 1
    anchor = shown = 0  # ids[anchor:first] hold `shown` whole characters and the start of another
    while end <= len(ids):
        text = _text(tokenizer, ids[anchor:end])
        whole = text.rstrip(_BROKEN)
        if whole != text and len(whole) <= shown:  # inside a character
            if end - first < _MAX_TOKENS and end < len(ids):
                end += 1
                continue
            end = first + 1  # bytes of no character: the first token by itself
            piece, anchor, shown = _name(tokenizer, ids[first]), end, 0
        else:
            piece = whole[shown:].replace(_BROKEN, "").translate(_VISIBLE)
            piece = piece or "".join(_name(tokenizer, i) for i in ids[first:end])
            anchor, shown = (end, 0) if whole == text else (anchor, len(whole))
        found.append(Piece(low + first, low + end, piece))
        first, end = end, end + 1
    inside = (p for p in found if p.stop > start and p.start < stop)
    return [Piece(max(p.start, start), min(p.stop, stop), p.text) for p in inside]


def token_text(tokenizer: lm.Tokenizer, token: int) -> str:
    """Returns the text of a token, or the tokenizer's name for it if it is part of a character."""
    text = _text(tokenizer, [int(token)])
    return _name(tokenizer, int(token)) if _BROKEN in text else text.translate(_VISIBLE)


def _name(tokenizer: lm.Tokenizer, token: int) -> str:
    return tokenizer.backend.id_to_token(token) or f"token {token}"


def _text(tokenizer: lm.Tokenizer, ids: list[int]) -> str:
    """Returns the text of ids that do not begin a document.

    They are decoded after BOS, because many decoders drop the space that the very first token
    begins with.
    """
    bos = tokenizer.decode([tokenizer.bos])
    return tokenizer.decode([tokenizer.bos, *ids]).removeprefix(bos)
