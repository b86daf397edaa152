"""Sources: what an SAE is evaluated on.

`HeldOutRows` are rows of a store, and `ModelRows` a language model's activations on given tokens.
`worlds.WorldRows` are rows of a synthetic world. Every source has:

    site_names, site_widths  the sites in the order of a row's columns, and how many each has
    num_rows                 about how many rows there are
    batches(rows)            an iterator over batches of at most about `rows` rows
    num_batches(rows)        how many batches this process gets
    sequences(limit, tokenizer)  the tokens to run a language model on
    texts()                  the sequences whose rows these are, as `Texts`
    read(places)             the activations of some of these sequences
    origin                   a short name for messages
    settings                 what it is, in words and numbers

A batch is a pair of activations (B, sum of widths) and a mask (B,) of the rows that count. Where
there are several processes, each gets its own share of the batches. `sequences` returns
`Sequences` of at least `limit` tokens, as far as there are so many; None where there are no tokens.
A world has neither `texts` nor `read`.
"""

import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sae_jax import paths
from sae_jax.activations import Sites, Store
from sae_jax.activations.meta import NONFINITE
from sae_jax.activations.order import split_chunks
from sae_jax.activations.sites import check_distinct, split_names
from sae_jax.errors import UserError, some
from sae_jax.evaluate.batching import evenly_spaced, pad_rows
from sae_jax.evaluate.padding import IGNORED, text_first, tokenizer_of
from sae_jax.evaluate.processes import own_share
from sae_jax.lm import PACKING_RULE, LanguageModel, Tokenizer, in_batches
from sae_jax.numpy_files import map_npy, read_npz
from sae_jax.sae import SAE
from sae_jax.sae.config import TRANSCODERS

_READ = 2048  # tokens that a model runs on at once for `read`
_PLAIN_BYTES = 1 << 28  # of token ids that may be compressed to any size
_MOST_COMPRESSED = 100  # how many times its size a larger file may hold; text's ids: about 5


class Sequences(NamedTuple):
    """Tokens for a language model to run on, with padding after the text (see `padding`).

    Attributes:
      tokens: token ids (n, T).
      used: the positions that count, (n, T) bool.
      is_text: the tokens that are no padding, (n, T) bool.
    """

    tokens: np.ndarray
    used: np.ndarray
    is_text: np.ndarray


class Texts(NamedTuple):
    """All sequences of a source.

    Attributes:
      numbers: the number of each in the store or text, (n,) int64, ascending.
      tokens: token ids (n, T).
      used: the positions that count, (n, T) bool.
      at_once: of how many sequences at a time reading is cheap, or a multiple of them.
      fingerprint: a hash of what the activations come from.
    """

    numbers: np.ndarray
    tokens: np.ndarray
    used: np.ndarray
    at_once: int
    fingerprint: str


class HeldOutRows:
    """Rows of the sequences of a store that a run never trains on, as a source."""

    def __init__(
        self,
        store: Store,
        sites: str | Sequence[str],
        *,
        tokens: int,
        holdout_fraction: float | None,
        include_excluded: bool = False,
    ):
        """Chooses the sequences, spread evenly.

        Args:
          store: the store.
          sites: the names of its sites, the target of a transcoder last; "" for the only one.
          tokens: about how many rows to choose.
          holdout_fraction: the part that was held out in training; None for all sequences.
          include_excluded: whether excluded rows (BOS, positions of high norm) count too. Rows that
            are not finite never do.

        Raises UserError if the store lacks a site, or holds out no sequence.
        """
        self.store, self.origin = store, store.path
        self._sites = Sites(store, sites)
        self.site_names, self.site_widths = self._sites.names, self._sites.widths
        meta = store.meta
        if holdout_fraction is not None and not 0 <= holdout_fraction < 1:
            raise UserError(f"holdout_fraction is {holdout_fraction}; it must be in [0, 1)")
        if holdout_fraction is None:
            chunks = np.arange(meta.num_chunks)
        else:
            chunks = split_chunks(meta.num_chunks, holdout_fraction, "heldout")
        if not len(chunks):
            raise UserError(
                f"{store.path} has no held-out sequences at holdout_fraction {holdout_fraction}; "
                "evaluate on other tokens with --tokens_file or --text"
            )
        self._chunks = evenly_spaced(chunks, -(-tokens // meta.chunk_rows))
        self._excluding = np.uint8(NONFINITE if include_excluded else 0xFF)
        self.num_rows = len(self._chunks) * meta.chunk_rows
        all_count = include_excluded or not meta.excluded_why
        self.settings = {
            "rows": "all rows" if holdout_fraction is None else "held-out sequences of the store",
            "store": store.path,
            "holdout_fraction": holdout_fraction,
            "tokens": tokens,
            "positions": "all" if all_count else f"all but {meta.excluded_why}",
        }

    def num_batches(self, rows: int) -> int:
        """Returns how many batches of at most `rows` rows this process gets."""
        chunks, parts = self._layout(rows)
        return len(own_share(range(0, len(self._chunks), chunks))) * parts

    def batches(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (activations, which rows count) of this process's batches."""
        meta, sites = self.store.meta, self._sites
        chunks, parts = self._layout(rows)
        size = -(-chunks * meta.chunk_rows // parts)
        for start in own_share(range(0, len(self._chunks), chunks)):
            numbers = self._chunks[start : start + chunks]
            # A new buffer each time: JAX may still be reading the last one.
            x = np.zeros((chunks, meta.chunk_rows, sites.width), sites.dtype)
            sites.read_chunks(numbers, x[: len(numbers)])
            used = self._used(numbers)
            sites.check_finite(numbers, x[: len(numbers)], used)
            x, used = x.reshape(-1, sites.width), pad_rows(used, chunks).reshape(-1)
            for first in range(0, len(x), size):
                part = slice(first, first + size)
                yield pad_rows(x[part], size), pad_rows(used[part], size)

    def sequences(self, limit: int, tokenizer: Tokenizer | None = None) -> Sequences | None:
        """Returns sequences with about `limit` tokens, or None where the store has no tokens.

        `tokenizer` says what padding is in stores that `lm.pack`, which needs none, did not pack.
        """
        meta = self.store.meta
        if meta.tokens_sha256 is None:
            return None
        numbers = self._chunks[:, None] * meta.chunk_sequences + np.arange(meta.chunk_sequences)
        numbers = numbers.reshape(-1)
        numbers = numbers[numbers < meta.num_sequences]
        numbers = evenly_spaced(numbers, -(-limit // meta.context_length))
        chunks, place = np.unique(numbers // meta.chunk_sequences, return_inverse=True)
        used = self._used(chunks).reshape(len(chunks), meta.chunk_sequences, meta.context_length)
        ids = self.store.read_tokens(numbers)
        used = used[place, numbers % meta.chunk_sequences]
        if meta.provenance.get("packing") == PACKING_RULE:
            return Sequences(ids, used, np.ones_like(used))
        found = text_first(ids, tokenizer, self.origin)
        return Sequences(found.tokens, found.moved(used) & found.is_text, found.is_text)

    def texts(self) -> Texts:
        """Returns all sequences. Raises UserError where the store has no tokens."""
        meta, store = self.store.meta, self.store
        if meta.tokens_sha256 is None:
            raise UserError(f"{store.path} has no tokens, so there is no text to show")
        numbers = self._chunks[:, None] * meta.chunk_sequences + np.arange(meta.chunk_sequences)
        numbers = numbers.reshape(-1)
        there = numbers < meta.num_sequences
        used = self._used(self._chunks).reshape(len(numbers), meta.context_length)[there]
        numbers = numbers[there].astype(np.int64)
        tokens = store.read_tokens(numbers)
        return Texts(numbers, tokens, used, meta.chunk_sequences, store.fingerprint)

    def read(self, places: np.ndarray) -> np.ndarray:
        """Returns the activations (n, T, sum of widths) of the sequences texts()[places].

        `places` are in order. Raises UserError if the store is damaged there.
        """
        meta, sites = self.store.meta, self._sites
        which, place = np.divmod(places, meta.chunk_sequences)
        which, row = np.unique(which, return_inverse=True)
        chunks = self._chunks[which]
        x = np.zeros((len(chunks), meta.chunk_rows, sites.width), sites.dtype)
        sites.read_chunks(chunks, x)
        sites.check_finite(chunks, x, self._used(chunks))
        x = x.reshape(len(chunks), meta.chunk_sequences, meta.context_length, sites.width)
        return x[row, place]

    def _layout(self, rows: int) -> tuple[int, int]:
        """Returns (chunks to read at once, batches to cut them into) for batches of `rows` rows."""
        chunk_rows = self.store.meta.chunk_rows
        return max(1, rows // chunk_rows), max(1, -(-chunk_rows // rows))

    def _used(self, chunks) -> np.ndarray:
        return self.store.read_excluded(chunks) & self._excluding == 0


class ModelRows:
    """A language model's activations on given tokens, as a source."""

    def __init__(
        self,
        model: LanguageModel,
        sites: str | Sequence[str],
        tokens: np.ndarray,
        *,
        what: str,
        excluded_tokens=(),
        excluded_positions=(),
        used: np.ndarray | None = None,
        sequences: slice = slice(None),
        spliced_sequences: slice = slice(None),
    ):
        """Takes the tokens to run the model on.

        Args:
          model: the language model.
          sites: the names of its sites, the target of a transcoder last.
          tokens: token ids (sequences, T). Padding (see `padding`) does not count.
          what: what messages and the evaluation's settings call the tokens.
          excluded_tokens: the ids that do not count.
          excluded_positions: the positions of a sequence that do not count.
          used: the positions that count, (sequences, T) bool, of tokens that are all text and run
            as they are. None: all but padding and what is excluded.
          sequences: which sequences `batches` takes.
          spliced_sequences: which sequences `sequences` takes.

        Raises UserError if the model lacks a site or a token, or if there are no sequences.
        """
        self.model, self.origin = model, "the model"
        self.site_names = tuple(split_names(sites))
        check_distinct(self.site_names, self.origin)
        self.site_widths = tuple(model.site_width(site) for site in self.site_names)
        tokens, is_text = np.asarray(tokens), np.ones(np.shape(tokens), bool)
        if used is None:
            found = text_first(tokens, tokenizer_of(model), what)
            tokens, is_text = found.tokens, found.is_text
        wrong = tokens[(tokens >= model.vocab_size) | (tokens < 0)]
        if len(wrong):
            raise UserError(
                f"{what} has token {wrong[0]}, but the model's vocabulary has {model.vocab_size}; "
                f"they do not belong together (padding is PAD, or {IGNORED})"
            )
        tokens = tokens.astype(np.int32)
        left_out = [
            f"{name} {', '.join(map(str, values))}"
            for name, values in (("tokens", excluded_tokens), ("positions", excluded_positions))
            if len(values)
        ]
        left_out += [] if is_text.all() else [f"{np.sum(~is_text):,} of padding"]
        if used is None:
            used = is_text & ~np.isin(tokens, excluded_tokens)
            used[:, [p for p in excluded_positions if p < tokens.shape[1]]] = False
        else:
            left_out = [f"{np.sum(~used):,} that were left out"]
        self._rows, self._spliced = (
            Sequences(tokens[part], used[part], is_text[part])
            for part in (sequences, spliced_sequences)
        )
        for part in (self._rows, self._spliced):
            if not len(part.tokens):
                raise UserError(f"{what} has {len(tokens)} sequences, none of those asked for")
        self._first = _describe(sequences, len(tokens))[0]
        self.num_rows = self._rows.tokens.size
        self.settings = {
            "rows": f"activations on {what}",
            "sequences": _describe(sequences, len(tokens)),
            "spliced_sequences": _describe(spliced_sequences, len(tokens)),
            "positions": "all" if used.all() else f"all but {' and '.join(left_out)}",
        }

    def num_batches(self, rows: int) -> int:
        """Returns how many batches of at most `rows` rows this process gets."""
        return len(own_share(range(0, len(self._rows.tokens), self._sequences_at_once(rows))))

    def batches(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (activations, which rows count) of this process's batches."""
        tokens, used, _ = self._rows
        size = self._sequences_at_once(rows)
        for start in own_share(range(0, len(tokens), size)):
            batch = pad_rows(tokens[start : start + size], size)
            _, tapped = self.model.forward(batch, taps=self.site_names, logits=False)
            x_BxTxW = np.concatenate([tapped[site] for site in self.site_names], axis=-1)
            mask = pad_rows(used[start : start + size], size).reshape(-1)
            yield x_BxTxW.reshape(len(mask), -1), mask

    def sequences(self, limit: int, tokenizer: Tokenizer | None = None) -> Sequences:
        """Returns sequences with about `limit` tokens. The tokenizer is the model's own."""
        del tokenizer
        count = -(-limit // self._spliced.tokens.shape[1])
        return Sequences(*(part[:count] for part in self._spliced))

    def texts(self) -> Texts:
        """Returns all sequences."""
        tokens, used, _ = self._rows
        numbers = self._first + np.arange(len(tokens), dtype=np.int64)
        return Texts(numbers, tokens, used, self._sequences_at_once(_READ), self.model.fingerprint)

    def read(self, places: np.ndarray) -> np.ndarray:
        """Returns the activations (n, T, sum of widths) of the sequences texts()[places]."""
        tokens = self._rows.tokens[places]
        size = self._sequences_at_once(_READ)
        parts = [
            np.concatenate([np.asarray(arrays[site]) for site in self.site_names], axis=-1)
            for _, arrays in in_batches(self._run, tokens, size)
        ]
        return np.concatenate(parts)[: len(tokens)]

    @functools.cached_property
    def _run(self):
        return self.model.runner(self.site_names, np.float32)

    def _sequences_at_once(self, rows: int) -> int:
        tokens = self._rows.tokens
        return max(1, min(rows // tokens.shape[1], len(tokens)))


def check_model(store: Store, model: LanguageModel) -> None:
    """Raises UserError if the store says that its activations are another model's."""
    made_by = store.meta.provenance.get("model_fingerprint")
    if made_by is not None and made_by != model.fingerprint:
        raise UserError(
            f"{model.directory} is not the model that {store.path} was harvested from "
            f"({store.meta.model}); give that model's directory"
        )


def check_sites(sae: SAE, source: HeldOutRows | ModelRows) -> None:
    """Raises UserError unless the source's sites have the number and widths that the SAE expects.

    Without the check a transcoder would cut rows of other widths at the wrong column.
    """
    config = sae.config
    made_for, flag = (config.d_in,), "--site"
    if config.kind == "crosscoder":
        made_for, flag = config.site_widths, "--site=a,b,..."
    elif config.kind in TRANSCODERS:
        made_for, flag = (config.d_in, config.d_out), "--site and --target_site"
    if source.site_widths != made_for:
        widths, expected = (" and ".join(map(str, w)) for w in (source.site_widths, made_for))
        raise UserError(
            f"{','.join(source.site_names)} of {source.origin} is {widths} wide, but the "
            f"{config.kind} was trained on {expected}; name its own with {flag}"
        )


def input_and_target_sites(kind: str, sites: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Returns which of the sites an SAE of this kind reads, and which it predicts.

    `sites` are in the order of a row's columns: a transcoder's target is the last.
    """
    return (sites[:-1], sites[-1:]) if kind in TRANSCODERS else (sites, sites)


def read_tokens(path) -> np.ndarray:
    """Returns the token ids (sequences, T) of an .npy or .npz file.

    Of an .npz file it takes the array `tokens`, or the only one. Leading axes are joined. Raises
    UserError if there is no such file, it has no token ids, or it says that it has more of them
    than it can hold.
    """
    path = paths.local(path)
    try:
        with path.open("rb") as file:
            first = file.read(2)
    except OSError as error:
        raise UserError(
            f"no tokens file at {path} ({error.strerror}); give an .npy or .npz of token ids"
        ) from None
    if first == b"PK":
        (loaded,) = read_npz(
            path, lambda names: [_choose(names, path)], _MOST_COMPRESSED, _PLAIN_BYTES
        ).values()
    elif first == b"\x93N":
        loaded = map_npy(path)
    else:
        raise UserError(f"{path} is not an .npy or .npz file of numbers")
    if loaded.ndim < 2 or loaded.dtype.kind not in "iu" or not loaded.size or loaded.shape[-1] < 2:
        raise UserError(
            f"{path} holds {loaded.dtype} of shape {loaded.shape}; token ids are whole numbers of "
            "shape (sequences, tokens in each)"
        )
    return np.array(loaded).reshape(-1, loaded.shape[-1])


def _choose(names: list[str], path: pathlib.Path) -> str:
    """Returns `tokens`, or the only name of an .npz file's arrays."""
    name = names[0] if len(names) == 1 else "tokens"
    if name not in names:
        raise UserError(f"{path} has no array named tokens; it has {some(names)}")
    return name


def _describe(part: slice, length: int) -> list[int]:
    start, stop, _ = part.indices(length)
    return [start, stop]
