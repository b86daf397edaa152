"""Writes windows of text for prompts, as JSON, so that nothing in a text can end its place.

Text is shown as it is. What a server might take for the end of a turn is written by JSON's own
escapes, and the marks around active tokens are ones that none of the texts has in it.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from sae_jax import lm
from sae_jax.interpret.collection import Example
from sae_jax.interpret.text import pieces

# How chat templates begin what is no text; some servers read these in a message too.
_TEMPLATES = re.compile(r"<(?=\||/?s>|(?:start|end)_of_|bos>|eos>|pad>|unk>)|\[(?=/?INST)")
_MARKS = (("<<", ">>"), ("[[", "]]"), ("{{", "}}"), ("⟦", "⟧"))


@dataclasses.dataclass(frozen=True)
class Shown:
    """A window as people read it.

    Attributes:
      tokens: the text of its tokens; those that are parts of one character are one text.
      activations: the latent's activation on each, the largest of its tokens, (n,).
    """

    tokens: list[str]
    activations: np.ndarray

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.tokens)


def show(tokenizer: lm.Tokenizer, example: Example) -> Shown:
    """Returns a window as people read it."""
    found = pieces(tokenizer, example.ids, example.start, example.stop)
    values = [example.activations[p.start - example.start : p.stop - example.start] for p in found]
    return Shown([p.text for p in found], np.array([value.max() for value in values], np.float32))


def levels(activations: np.ndarray, maximum: float) -> list[int]:
    """Returns activations in whole numbers: 0 for off, 1 to 9 for equal parts of 0 to the maximum.

    The maximum and whatever is above it are 9.
    """
    parts = np.ceil(9 * activations / max(maximum, np.finfo(np.float32).tiny) - 1e-5)
    return np.where(activations > 0, np.clip(parts, 1, 9), 0).astype(int).tolist()


def quoted(value) -> str:
    """Returns texts, or lists of them, as JSON on one line, without what might end a turn."""
    text = json.dumps(value, ensure_ascii=False)
    return _TEMPLATES.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def numbered(texts: Sequence[str]) -> str:
    """Returns texts as JSON, one a line, numbered from 1."""
    return "\n".join(f"{number}. {quoted(text)}" for number, text in enumerate(texts, 1))


def marks_for(shown: Iterable[Shown]) -> tuple[str, str]:
    """Returns what to put before and after what is marked: << and >>, unless a text has these.

    None of the texts has a character of the marks that are returned.
    """
    characters = set().union(*(window.text for window in shown))
    made = (
        (f"{chr(mark)}", f"{chr(mark + 1)}") for mark in range(0xE000, 0xF8FE, 2)
    )  # Unicode's private ones
    return next(m for m in itertools.chain(_MARKS, made) if not characters & {*m[0], *m[1]})


def marked(shown: Shown, which: Sequence[bool], marks: tuple[str, str]) -> str:
    """Returns a text with marks around each run of the tokens that are to be marked."""
    parts = []
    for is_marked, run in itertools.groupby(
        zip(which, shown.tokens, strict=True), key=lambda pair: bool(pair[0])
    ):
        text = "".join(token for _, token in run)
        parts.append(f"{marks[0]}{text}{marks[1]}" if is_marked else text)
    return "".join(parts)


def mean_marked(shown: Sequence[Shown], is_marked: Callable[[Shown], np.ndarray]) -> int:
    """Returns how many tokens of a window are marked in the mean, rounded up, at least 1."""
    return max(1, math.ceil(np.mean([is_marked(window).sum() for window in shown])))
