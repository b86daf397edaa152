"""Tokens as text for people: whole characters, spaces kept, control characters visible."""

import dataclasses

import numpy as np

from sae_jax import lm

_ANCHOR = 8  # tokens decoded before a window, so that a character that it cuts is whole
_MAX_BYTES = 4  # of a UTF-8 character: tokens that may have to be decoded together
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTROL_PICTURES = {i: 0x2400 + i for i in range(32)} | {127: 0x2421}
_VISIBLE = _CONTROL_PICTURES | {ord("\n"): "↵", ord("\t"): "⇥"}


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens start to stop (exclusive) of a window: one, or several that share a character."""

    start: int
    stop: int
    text: str


def pieces(tokenizer: lm.Tokenizer, tokens: np.ndarray, before: np.ndarray = ()) -> list[Piece]:
    """The text of `tokens` in pieces that begin and end between characters. `before`: tokens
    that precede them, of which the last few help with a character that the start cuts."""
    ids = [*map(int, before[-_ANCHOR:]), *map(int, tokens)]
    offset = len(ids) - len(tokens)
    out, start = [], 0
    while start < len(ids):
        stop = start + 1
        text = _text(tokenizer, ids, start, stop)
        while _BROKEN in text and stop < min(start + _MAX_BYTES, len(ids)):
            stop += 1
            text = _text(tokenizer, ids, start, stop)
        if _BROKEN in text:  # not the bytes of a character: one token at a time
            stop = start + 1
            text = tokenizer.backend.id_to_token(ids[start]) or _BROKEN
        if stop > offset:
            out.append(Piece(max(start - offset, 0), stop - offset, text.translate(_VISIBLE)))
        start = stop
    return out


def token_text(tokenizer: lm.Tokenizer, token: int) -> str:
    """One token by itself; the tokenizer's own name for it where it is part of a character."""
    text = _text(tokenizer, [tokenizer.bos, int(token)], 1, 2)
    if _BROKEN in text or not text:
        text = tokenizer.backend.id_to_token(int(token)) or str(token)
    return text.translate(_VISIBLE)


def _text(tokenizer: lm.Tokenizer, ids: list[int], start: int, stop: int) -> str:
    """The text of ids[start:stop] as it is after ids[:start]: many decoders drop the space that
    a first token begins with, so that a token is decoded with the one before it."""
    if start == 0:
        return tokenizer.decode(ids[:stop])
    context = tokenizer.decode(ids[start - 1 : start])
    both = tokenizer.decode(ids[start - 1 : stop])
    return both[len(context) :] if both.startswith(context) else tokenizer.decode(ids[start:stop])
