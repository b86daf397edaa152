"""Finds latents by the texts of their examples, and by what they are called and said to be."""

import functools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from sae_jax.interpret.collection import Collection
from sae_jax.interpret.dashboard.labels import Labels
from sae_jax.interpret.text import token_bytes
from sae_jax.lm import Tokenizer

_MOST_PLACES = 200_000  # in the texts, where a query is found


class TextSearch:
    """Searches the windows of all examples, the labels, and the explanations of each latent."""

    def __init__(
        self,
        collection: Collection,
        tokenizer: Tokenizer,
        labels: Labels,
        explanations: Mapping[int, Sequence[str]] = MappingProxyType({}),
    ):
        """Takes what is searched. The texts are read at the first search."""
        self._collection, self._tokenizer, self._labels = collection, tokenizer, labels
        self._explanations = explanations

    def find(self, query: str, limit: int) -> list[int]:
        """Returns up to `limit` latents, those with the query in their label or explanations first.

        The others are those with the query in an example, sorted by the share of their
        examples that have it. Of the letters a to z, upper and lower case count as the same.
        """
        folded = query.casefold()
        if not folded.strip():
            return []
        names, texts = self._labels.names, self._explanations
        named = [
            latent
            for latent in sorted(names.keys() | texts.keys())
            if any(folded in t.casefold() for t in (names.get(latent, ""), *texts.get(latent, ())))
        ]
        data = query.encode(errors="surrogatepass")  # half a character is in no text
        found = dict.fromkeys([*named, *self._in_examples(data.lower())])
        return list(found)[:limit]

    def _in_examples(self, query: bytes) -> list[int]:
        text, ends = self._text
        places = [match.start() for match, _ in zip(
            re.finditer(re.escape(query), text), range(_MOST_PLACES), strict=False)]  # fmt: skip
        first = np.searchsorted(ends, places, side="right")
        last = np.searchsorted(ends, np.asarray(places) + len(query) - 1, side="right")
        sequences, length = self._collection.array("tokens").shape
        whole = first // length == last // length  # and not across two sequences
        rows, where = np.unique(first[whole] // length, return_inverse=True)
        if not len(rows):
            return []
        begins = np.zeros((len(rows), length + 1), np.int32)  # how many begin before a token
        np.add.at(begins, (where, first[whole] % length + 1), 1)
        begins = begins.cumsum(axis=1)
        at = np.full(sequences, -1)
        at[rows] = np.arange(len(rows))
        about, array = self._collection.about, self._collection.array
        filled = array("value") > 0
        slots = np.argwhere(filled & (at[array("sequence")] >= 0))
        picked = tuple(slots.T)
        row, peak = at[array("sequence")[picked]], array("position")[picked]
        low, high = np.maximum(peak - about.before, 0), np.minimum(peak + about.after + 1, length)
        hit = begins[row, high] > begins[row, low]
        counts = np.bincount(slots[hit, 0], minlength=about.d_sae)
        share = counts / np.maximum(filled.sum(axis=1), 1)
        latents = np.flatnonzero(counts)
        return latents[np.argsort(-share[latents], kind="stable")].tolist()

    @functools.cached_property
    def _text(self) -> tuple[bytes, np.ndarray]:
        """The bytes of all sequences, in lower case, and where each token's end."""
        ids = self._collection.array("tokens").reshape(-1)
        used, place = np.unique(ids, return_inverse=True)
        parts = [token_bytes(self._tokenizer, int(i)).lower() for i in used]
        ends = np.cumsum(np.array([len(part) for part in parts], np.int64)[place])
        return b"".join(parts[i] for i in place), ends
