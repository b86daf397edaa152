"""Tokens as text for people: whole characters, spaces kept, control characters visible."""

import dataclasses

import numpy as np

from sae_jax import lm

_ANCHOR = 64  # tokens decoded before a window, so that a character that it cuts is whole
_MAX_TOKENS = 4  # of one character: UTF-8 has at most so many bytes
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTROL_PICTURES = {i: 0x2400 + i for i in range(32)} | {127: 0x2421}
_VISIBLE = _CONTROL_PICTURES | {ord("\n"): "↵", ord("\t"): "⇥"}


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens start to stop (exclusive) of a window: one, or several of which only the last ends a
    character. A character belongs to the token that ends it."""

    start: int
    stop: int
    text: str


def pieces(tokenizer: lm.Tokenizer, tokens: np.ndarray, before: np.ndarray = ()) -> list[Piece]:
    """The text of `tokens`, cut between characters and as finely as tokens are. `before`: tokens
    that precede them, of which the last help with a character that the start cuts."""
    ids = [*map(int, before[-_ANCHOR:]), *map(int, tokens)]
    offset = len(ids) - len(tokens)
    out, start = [], 0
    anchor = shown = 0  # ids[anchor:start] hold so many whole characters and the start of another
    for stop in range(1, len(ids) + 1):
        text = _text(tokenizer, ids, anchor, stop)
        whole = text.rstrip(_BROKEN)
        is_inside = whole != text and len(whole) <= shown
        if is_inside and stop - start < _MAX_TOKENS and stop < len(ids):
            continue
        piece = whole[shown:].replace(_BROKEN, "")
        piece = piece.translate(_VISIBLE) or _names(tokenizer, ids[start:stop])
        if stop > offset:
            out.append(Piece(max(start - offset, 0), stop - offset, piece))
        start = stop
        anchor, shown = (stop, 0) if whole == text or is_inside else (anchor, len(whole))
    return out


def token_text(tokenizer: lm.Tokenizer, token: int) -> str:
    """One token by itself; the tokenizer's own name for it where it is part of a character."""
    text = _text(tokenizer, [tokenizer.bos, int(token)], 1, 2)
    return _names(tokenizer, [int(token)]) if _BROKEN in text else text.translate(_VISIBLE)


def _names(tokenizer: lm.Tokenizer, ids: list[int]) -> str:
    """Bytes that are no character, as the tokenizer calls them."""
    return "".join(tokenizer.backend.id_to_token(i) or "" for i in ids)


def _text(tokenizer: lm.Tokenizer, ids: list[int], start: int, stop: int) -> str:
    """The text of ids[start:stop] as it is after ids[:start]: many decoders drop the space that
    a first token begins with, so that a token is decoded with the one before it."""
    if start == 0:
        return tokenizer.decode(ids[:stop])
    context = tokenizer.decode(ids[start - 1 : start])
    both = tokenizer.decode(ids[start - 1 : stop])
    return both[len(context) :] if both.startswith(context) else tokenizer.decode(ids[start:stop])
