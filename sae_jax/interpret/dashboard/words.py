"""An index of the words that latents are most active on, in files that a page reads one of."""

import collections
import dataclasses
import re

from sae_jax.interpret.dashboard.latents import Latent

PARTS = 64
BEFORE = 4  # pieces before the peak that count too
_WORD = re.compile(r"\w+")
_LONGEST = 64  # characters of a word


@dataclasses.dataclass(frozen=True)
class Peak:
    """What of an example in a file its words are found by."""

    peak: int
    pieces: list[str]


@dataclasses.dataclass(frozen=True)
class Written:
    """What of a latent in a file its words are found by."""

    index: int
    groups: list[list[Peak]]


def words_of(latent: Latent | Written) -> set[str]:
    """Returns the words, in lower case, at the peaks of a latent's highest examples and a few
    pieces before them."""
    found = set()
    for example in latent.groups[0]:
        text = "".join(example.pieces[max(0, example.peak - BEFORE) : example.peak + 1])
        found.update(word.lower() for word in _WORD.findall(text) if len(word) <= _LONGEST)
    return found


def part_of(word: str) -> int:
    """Returns which of the `PARTS` files has a word: its 32-bit FNV-1a hash, modulo PARTS."""
    value = 0x811C9DC5
    for byte in word.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value % PARTS


class Words:
    """The words of many latents."""

    def __init__(self):
        """Begins with none."""
        self._latents: dict[str, list[int]] = collections.defaultdict(list)

    def add(self, latent: Latent | Written) -> None:
        """Adds the words of a latent."""
        for word in words_of(latent):
            self._latents[word].append(latent.index)

    def parts(self) -> list[dict[str, list[int]]]:
        """Returns the `PARTS` files, each with the latents of its words, in the words' order."""
        parts: list[dict[str, list[int]]] = [{} for _ in range(PARTS)]
        for word in sorted(self._latents):
            parts[part_of(word)][word] = self._latents[word]
        return parts
