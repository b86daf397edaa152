"""What an SAE is evaluated on: held-out rows of a store, or a language model's activations on
given tokens.

Both sources have `batches(rows)`, pairs of activations (rows, d) and the mask (rows,) of those
that count; `sequences(limit)`, tokens (n, T) with the mask (n, T) of positions that count, or
None where there are no tokens; and `settings`, which say in plain words what it is.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.activations import Store
from sae_jax.activations.order import split_chunks
from sae_jax.activations.store import NONFINITE
from sae_jax.config import UserError

_LOGITS = 2**25  # elements of one batch's logits, of which four or so exist at once


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    params: dict
    config: lm.DecoderConfig

    @classmethod
    def load(cls, directory) -> "LanguageModel":
        return cls(lm.load_params(directory), lm.load_config(directory))

    def sequences_at_once(self, sequences: int, context_length: int) -> int:
        return min(sequences, max(1, _LOGITS // (context_length * self.config.vocab_size)))


class HeldOutRows:
    """The sequences that a run on `store` never trains on, about `tokens` of them, spread evenly.

    Excluded rows (BOS, high-norm positions) do not count unless `include_excluded`; rows that
    are not finite never do.
    """

    def __init__(
        self,
        store: Store,
        site: str,
        *,
        tokens: int,
        holdout_fraction: float,
        include_excluded: bool = False,
    ):
        self.store, self.site = store, store.resolve_site(site)
        meta = store.meta
        chunks = split_chunks(meta.num_chunks, holdout_fraction, "heldout")
        if not len(chunks):
            raise UserError(
                f"{store.path} has no held-out sequences at holdout_fraction {holdout_fraction}; "
                "evaluate on other tokens with --tokens_file or --text"
            )
        self._chunks = _spread(chunks, -(-tokens // meta.chunk_rows))
        self._excluding = np.uint8(NONFINITE if include_excluded else 0xFF)
        self.num_rows = len(self._chunks) * meta.chunk_rows
        self.settings = {
            "rows": "held-out sequences of the store",
            "store": store.path,
            "holdout_fraction": holdout_fraction,
            "tokens": tokens,
            "positions": "all" if include_excluded else f"all but {meta.excluded_why}",
        }

    def batches(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        meta = self.store.meta
        dtype = self.store.site(self.site).dtype.numpy_dtype
        shape = (1, meta.chunk_rows, meta.sites[self.site].width)
        rows = min(rows, meta.chunk_rows)
        for number in self._chunks:
            chunk = np.zeros(shape, dtype)  # a new one: JAX may read the last one still
            self.store.read_chunks(self.site, [number], chunk)
            used = self._used([number])[0]
            for start in range(0, meta.chunk_rows, rows):
                part = slice(start, start + rows)
                yield pad_rows(chunk[0, part], rows), pad_rows(used[part], rows)

    def sequences(self, limit: int) -> tuple[np.ndarray, np.ndarray] | None:
        meta, tokens = self.store.meta, self.store.tokens()
        if tokens is None:
            return None
        numbers = self._chunks[:, None] * meta.chunk_sequences + np.arange(meta.chunk_sequences)
        numbers = numbers.reshape(-1)
        numbers = _spread(numbers[numbers < meta.num_sequences], -(-limit // meta.context_length))
        chunks, place = np.unique(numbers // meta.chunk_sequences, return_inverse=True)
        used = self._used(chunks).reshape(len(chunks), meta.chunk_sequences, meta.context_length)
        return tokens[numbers].read().result(), used[place, numbers % meta.chunk_sequences]

    def _used(self, chunks) -> np.ndarray:
        return self.store.read_excluded(chunks) & self._excluding == 0


class ModelRows:
    """A language model's activations at `site` on `tokens` (sequences, T). Tokens that are in
    `excluded_tokens` and positions in `excluded_positions` do not count. The metrics of rows
    take `sequences`, those of the spliced model `spliced_sequences`."""

    def __init__(
        self,
        model: LanguageModel,
        site: str,
        tokens: np.ndarray,
        *,
        what: str,
        excluded_tokens=(),
        excluded_positions=(),
        sequences: slice = slice(None),
        spliced_sequences: slice | None = None,
    ):
        lm.site_width(model.config, site)
        if tokens.max() >= model.config.vocab_size or tokens.min() < 0:
            raise UserError(
                f"{what} has token {tokens.max()}, but the model's vocabulary has "
                f"{model.config.vocab_size}; they do not belong together"
            )
        self.model, self.site = model, site
        used = ~np.isin(tokens, excluded_tokens)
        used[:, [p for p in excluded_positions if p < tokens.shape[1]]] = False
        self._rows = (tokens[sequences], used[sequences])
        spliced_sequences = sequences if spliced_sequences is None else spliced_sequences
        self._spliced = (tokens[spliced_sequences], used[spliced_sequences])
        for part in (self._rows, self._spliced):
            if not len(part[0]):
                raise UserError(f"{what} has {len(tokens)} sequences, none of those asked for")
        self.num_rows = self._rows[0].size
        self.settings = {
            "rows": f"activations on {what}",
            "sequences": _describe(sequences, len(tokens)),
            "spliced_sequences": _describe(spliced_sequences, len(tokens)),
            "positions": "all" if used.all() else (
                f"all but tokens {list(map(int, excluded_tokens))} "
                f"and positions {list(map(int, excluded_positions))}"
            ),
        }  # fmt: skip

    def batches(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        tokens, used = self._rows
        size = max(1, min(rows // tokens.shape[1], len(tokens)))
        for start in range(0, len(tokens), size):
            batch = jnp.asarray(pad_rows(tokens[start : start + size], size))
            x_BxTxD = _tap(self.model.params, batch, config=self.model.config, site=self.site)
            mask = pad_rows(used[start : start + size], size).reshape(-1)
            yield np.asarray(x_BxTxD).reshape(len(mask), -1), mask

    def sequences(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, used = self._spliced
        count = -(-limit // tokens.shape[1])
        return tokens[:count], used[:count]


def read_tokens(path) -> np.ndarray:
    """Token ids (sequences, T) int32 of an .npy file, or of the array `tokens` (or the only one)
    of an .npz; leading axes are joined. UserError where there are none."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no tokens file at {path}; give an .npy or .npz of token ids")
    try:
        loaded = np.load(path)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is not an .npy or .npz file of numbers: {error}") from None
    if not isinstance(loaded, np.ndarray):
        names = loaded.files
        name = names[0] if len(names) == 1 else "tokens"
        if name not in names:
            raise UserError(f"{path} has no array named tokens; it has {', '.join(names)}")
        loaded = loaded[name]
    if loaded.ndim < 2 or loaded.dtype.kind not in "iu" or not loaded.size or loaded.shape[-1] < 2:
        raise UserError(
            f"{path} holds {loaded.dtype} of shape {loaded.shape}; token ids are whole numbers of "
            "shape (sequences, tokens in each)"
        )
    return loaded.reshape(-1, loaded.shape[-1]).astype(np.int32)


def pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """`x` with zero rows added up to `rows`, so that a last short batch compiles nothing new."""
    return np.pad(x, [(0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)]) if len(x) < rows else x


@functools.partial(jax.jit, static_argnames=("config", "site"))
def _tap(params, tokens_BxT, *, config, site):
    return lm.forward(params, tokens_BxT, config, taps=(site,), logits=False)[1][site]


def _spread(items: np.ndarray, count: int) -> np.ndarray:
    """`count` of the items, evenly spaced; all where there are no more."""
    if count >= len(items):
        return items
    return items[np.arange(count) * len(items) // count]


def _describe(part: slice, length: int) -> list[int]:
    start, stop, _ = part.indices(length)
    return [start, stop]
