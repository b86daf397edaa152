"""Finds the padding in token ids, and moves it behind the text.

Padding fills sequences of different lengths up to one length. It is a run of PAD tokens, or of
-100, at the start or the end of a sequence. It is no text: it is not counted, nothing that predicts
it is, and no token attends to it. A decoder only looks back, so a sequence with its padding moved
to its end runs as if it were alone, at positions that count from its first token. transformers
computes the same from an attention mask with positions to match, and TransformerLens from
`padding_side`.
"""

import dataclasses

import numpy as np

from sae_jax.errors import UserError
from sae_jax.lm import LanguageModel, Tokenizer

IGNORED = -100
"""The id that stands for padding whatever the tokenizer, as in the labels of transformers."""


@dataclasses.dataclass(frozen=True)
class TextFirst:
    """Sequences whose text comes first.

    Attributes:
      tokens: token ids (n, T), with 0 for padding at a sequence's end.
      is_text: which of them are text, (n, T) bool.
      order: the place that each token had in its sequence, (n, T).
    """

    tokens: np.ndarray
    is_text: np.ndarray
    order: np.ndarray

    def moved(self, values: np.ndarray) -> np.ndarray:
        """Returns `values` (n, T), which are as the sequences were, as they are here."""
        return np.take_along_axis(values, self.order, axis=1)


def text_first(tokens: np.ndarray, tokenizer: Tokenizer | None, what: str) -> TextFirst:
    """Returns sequences with the padding before their text moved behind it.

    PAD is the tokenizer's, or else EOS. Where it is BOS or EOS too, one of them at an end of a
    sequence may be meant: it counts as padding if some sequence has two or more at that end, and
    the last BOS before a text always belongs to it. Where PAD means nothing else, it is no text in
    the middle of a sequence either.

    Args:
      tokens: token ids (n, T).
      tokenizer: the tokenizer; None if it is not known, so that only -100 is padding.
      what: what an error calls the tokens.

    Raises UserError if -100 stands between tokens.
    """
    pad = bos = None
    shared = False  # whether PAD has another meaning
    if tokenizer is not None:
        pad, bos = tokenizer.pad if tokenizer.pad is not None else tokenizer.eos, tokenizer.bos
        shared = pad in (bos, tokenizer.eos)
    ignored = tokens == IGNORED
    padding = ignored if pad is None else ignored | (tokens == pad)
    before = np.logical_and.accumulate(padding, axis=1)
    after = np.logical_and.accumulate(padding[:, ::-1], axis=1)[:, ::-1]
    if shared:
        some_text = ~padding.all(axis=1)
        for run in (before, after):
            if ((run & ~ignored).sum(axis=1)[some_text] < 2).all():
                run[some_text] &= ignored[some_text]
        if pad == bos:
            rows = np.flatnonzero(some_text & before[:, 0])
            last = before[rows].sum(axis=1) - 1
            before[rows, last] = ignored[rows, last]
    ends = before | after
    if (inside := ignored & ~ends).any():
        row = int(inside.any(axis=1).argmax())
        raise UserError(
            f"{what}: sequence {row} has {IGNORED} between its tokens; it stands for padding, "
            "which is before or after a text"
        )
    means_padding_only = pad is not None and not shared and pad != _unknown(tokenizer)
    is_text = ~(padding if means_padding_only else ends)
    length = tokens.shape[1]
    order = (np.arange(length) + before.sum(axis=1, keepdims=True)) % length
    found = TextFirst(np.where(ends, 0, tokens), is_text, order)
    return TextFirst(found.moved(found.tokens), found.moved(is_text), order)


def tokenizer_of(model: LanguageModel) -> Tokenizer | None:
    """Returns a model's tokenizer, or None if its directory has none."""
    return model.tokenizer if (model.directory / "tokenizer.json").is_file() else None


def _unknown(tokenizer: Tokenizer) -> int | None:
    """Returns the token of text that the vocabulary lacks, which some take for PAD too."""
    name = getattr(tokenizer.backend.model, "unk_token", None)
    return None if name is None else tokenizer.backend.token_to_id(name)
