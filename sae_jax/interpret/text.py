"""Turns tokens into text for people: whole characters, spaces kept, control characters visible."""

import dataclasses
import functools
import itertools
import re

import numpy as np

from sae_jax import lm
from sae_jax.json_files import parse_json

_MARGIN = 64  # tokens looked at around a window, so that a character that it cuts is whole
_MAX_TOKENS = 4  # of one character: UTF-8 has at most so many bytes
_CONTROL_PICTURES = {i: 0x2400 + i for i in range(32)} | {127: 0x2421}
_VISIBLE = _CONTROL_PICTURES | {ord("\n"): "↵", ord("\t"): "⇥"}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of text that one token stands for, or several that are parts of one character.

    Attributes:
      start: the position of its first token.
      stop: the position after its last token.
      text: the text. A token with no whole character, as where a context begins inside one, has the
        tokenizer's name for it.
    """

    start: int
    stop: int
    text: str


def pieces(
    tokenizer: lm.Tokenizer, ids: np.ndarray, start: int = 0, stop: int | None = None
) -> list[Piece]:
    """Returns the pieces of ids[start:stop], cut between characters and as finely as tokens are.

    The tokens around the window are looked at too, for characters that its ends cut.
    """
    stop = len(ids) if stop is None else stop
    low = max(0, start - _MARGIN)
    parts = [_part(tokenizer, i) for i in np.asarray(ids[low : stop + _MAX_TOKENS]).tolist()]
    found, first = [], 0
    while first < len(parts):
        last = first
        while last < len(parts) and parts[last].text is None:
            last += 1  # no part of a character combines with whole ones
        if last == first:
            found.append(Piece(low + first, low + first + 1, parts[first].text))
            first += 1
        else:
            found += _joined(parts[first:last], low + first)
            first = last
    inside = (p for p in found if p.stop > start and p.start < stop)
    return [Piece(max(p.start, start), min(p.stop, stop), p.text) for p in inside]


def token_text(tokenizer: lm.Tokenizer, token: int) -> str:
    """Returns the text of a token, or the tokenizer's name for it if it is part of a character."""
    part = _part(tokenizer, int(token))
    return part.name if part.text is None else part.text


def token_name(tokenizer: lm.Tokenizer, token: int) -> str:
    """Returns the tokenizer's own name for a token."""
    return _part(tokenizer, int(token)).name


def token_bytes(tokenizer: lm.Tokenizer, token: int) -> bytes:
    """Returns the bytes of text that a token stands for."""
    return _part(tokenizer, int(token)).data


def interval_names(count: int) -> list[str]:
    """Returns names of the `count` equal parts of the range from 0 to a maximum, highest first."""
    edges = [round(100 * i / max(count, 1)) for i in range(count + 1)]
    return [f"{low}–{high}% of the maximum" for low, high in itertools.pairwise(edges)][::-1]


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a token is: its bytes, its name, and its text, None if it is part of a character."""

    data: bytes
    name: str
    text: str | None


@functools.lru_cache(2**19)
def _part(tokenizer: lm.Tokenizer, token: int) -> _Part:
    data, name = _bytes(tokenizer, token, _is_byte_level(tokenizer)), _name(tokenizer, token)
    try:
        return _Part(data, name, data.decode().translate(_VISIBLE) or name)
    except UnicodeDecodeError:
        return _Part(data, name, None)


def _joined(parts: list[_Part], start: int) -> list[Piece]:
    """Returns the pieces of tokens of which none is whole characters; the first is at `start`."""
    characters = _characters(b"".join(part.data for part in parts))
    ends = np.cumsum([len(part.data) for part in parts]).tolist()  # of the tokens, in bytes
    found, first, begin = [], 0, 0
    for last, end in enumerate(ends):
        if end not in characters:
            continue  # inside a character
        text = "".join(characters[at] for at in range(begin + 1, end + 1) if at in characters)
        text = text.translate(_VISIBLE)
        text = text or "".join(part.name for part in parts[first : last + 1])
        found.append(Piece(start + first, start + last + 1, text))
        first, begin = last + 1, end
    return found


def stray_bytes(tokenizer: lm.Tokenizer) -> set[int]:
    """Returns the tokens that stand for one byte that is no text by itself.

    These are the bytes from 80 on, which are parts of characters, and control characters but tab
    and line ends. A tokenizer that falls back to bytes (Llama's) has besides no use for those of
    ASCII characters that are tokens themselves.
    """
    token_of, names = tokenizer.backend.token_to_id, {b: c for c, b in _byte_levels().items()}
    stray = {*range(0x20), 0x7F, *range(0x80, 0x100)} - set(b"\t\n\r")
    if _is_byte_level(tokenizer):
        found = {token_of(names[byte]) for byte in stray}
    else:
        stray |= {byte for byte in range(0x80) if token_of(chr(byte)) is not None}
        found = {token_of(f"<0x{byte:02X}>") for byte in stray}
    return found - {None}


def _characters(data: bytes) -> dict[int, str]:
    """Returns the characters of UTF-8 by where they end; "" for a byte of none.

    It also has 0, where nothing ends.
    """
    found, at = {0: ""}, 0
    while at < len(data):
        length = next((n for n in range(1, 5) if _is_character(data[at : at + n])), 0)
        character = data[at : at + length].decode()
        at += length or 1
        found[at] = character
    return found


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def _bytes(tokenizer: lm.Tokenizer, token: int, by_level: bool) -> bytes:
    """Returns the bytes of text that a token stands for.

    by_level: whether the tokenizer writes each byte of text as a character (GPT-2's does).
    """
    name = _name(tokenizer, token)
    if by_level:
        levels = _byte_levels()
        return bytes(map(levels.get, name)) if levels.keys() >= set(name) else name.encode()
    text = _text(tokenizer, token)
    byte = re.fullmatch("<0x([0-9A-F]{2})>", name)  # as Llama's names those without a character
    return bytes.fromhex(byte[1]) if byte and text != name else text.encode()


@functools.lru_cache(8)
def _is_byte_level(tokenizer: lm.Tokenizer) -> bool:
    decoder = tokenizer.backend.decoder
    if decoder is None:
        return False
    state = parse_json(decoder.__getstate__(), f"the decoder of {tokenizer.name}")
    return any(step["type"] == "ByteLevel" for step in (state, *state.get("decoders", ())))


@functools.cache
def _byte_levels() -> dict[str, int]:
    """Returns the byte that each character stands for in the tokens of GPT-2.

    Bytes that are printable characters of Latin-1 are these; the others follow from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def _name(tokenizer: lm.Tokenizer, token: int) -> str:
    return tokenizer.backend.id_to_token(token) or f"token {token}"


def _text(tokenizer: lm.Tokenizer, token: int) -> str:
    """Returns the text of a token that does not begin a document.

    It is decoded after BOS, because many decoders drop the space that the very first token begins
    with.
    """
    bos = tokenizer.decode([tokenizer.bos])
    return tokenizer.decode([tokenizer.bos, token]).removeprefix(bos)


def vocabulary(tokenizer: lm.Tokenizer) -> list[str]:
    """Returns the tokens as SAEDashboard writes them for Neuronpedia, by their ids.

    They are the names of the tokenizer's vocabulary, so that spaces of SentencePiece stay "▁" and a
    byte is "<0x0A>", which Neuronpedia replaces. Names of a byte-level vocabulary become the text
    that they stand for, "Ġthe" " the". SAEDashboard replaces some of these and leaves the others,
    "é" as "Ã©"; here all are text but the parts of characters. The character 0, which Neuronpedia's
    database does not take, is "<0x00>".
    """
    return [_vocabulary_text(tokenizer, token) for token in range(tokenizer.vocab_size)]


def _vocabulary_text(tokenizer: lm.Tokenizer, token: int) -> str:
    part = _part(tokenizer, token)
    whole = _is_byte_level(tokenizer) and part.text is not None
    return (part.data.decode() if whole else part.name).replace("\0", "<0x00>")
