"""Chooses the control "shuffled": the explanation of another unit, in the place of a unit's own."""

import collections
import zlib
from collections.abc import Mapping


def others(texts: Mapping[int, str], seed: int) -> dict[int, int]:
    """Returns for each unit another one, of which another thing is said.

    Each is the other of one. Where more than half have one text, some have no other.

    Args:
      texts: what is said of each unit.
      seed: the seed of the order that decides.
    """
    order = sorted(
        texts, key=lambda unit: (_hash(f"{seed} {texts[unit]}"), texts[unit], unit)
    )  # those with the same text lie together
    largest = max(collections.Counter(texts.values()).values(), default=0)
    pairs = zip(order, [*order[largest:], *order[:largest]], strict=True)
    return {unit: other for unit, other in pairs if texts[unit] != texts[other]}


def _hash(text: str) -> int:
    return zlib.crc32(text.encode(errors="surrogatepass"))
