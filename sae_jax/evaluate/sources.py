"""Sources: what an SAE is evaluated on.

`HeldOutRows` are rows of a store, and `ModelRows` a language model's activations on given tokens.
`worlds.WorldRows` are rows of a synthetic world. Every source has:

    site_names, site_widths  the sites in the order of a row's columns, and how many each has
    num_rows                 about how many rows there are
    batches(rows)            an iterator over batches of at most about `rows` rows
    num_batches(rows)        how many batches this process gets
    sequences(limit)         the tokens to run a language model on
    origin                   a short name for messages
    settings                 what it is, in words and numbers

A batch is a pair of activations (B, sum of widths) and a mask (B,) of the rows that count. Where
there are several processes, each gets its own share of the batches. `sequences` returns at least
`limit` tokens, as far as there are so many: token ids (n, T) and a mask (n, T) of the positions
that count; None where there are no tokens.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from sae_jax import paths
from sae_jax.activations import Sites, Store
from sae_jax.activations.order import split_chunks
from sae_jax.activations.sites import check_distinct, split_names
from sae_jax.activations.store import NONFINITE
from sae_jax.errors import UserError
from sae_jax.evaluate.batching import evenly_spaced, pad_rows
from sae_jax.evaluate.processes import own_share
from sae_jax.lm import LanguageModel
from sae_jax.sae import SAE
from sae_jax.sae.config import TRANSCODERS


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
            x, used = x.reshape(-1, sites.width), pad_rows(self._used(numbers), chunks).reshape(-1)
            for first in range(0, len(x), size):
                part = slice(first, first + size)
                yield pad_rows(x[part], size), pad_rows(used[part], size)

    def sequences(self, limit: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns (token ids, which positions count) of sequences with about `limit` tokens.

        Both are (n, T). Returns None where the store has no tokens.
        """
        meta, tokens = self.store.meta, self.store.tokens()
        if tokens is None:
            return None
        numbers = self._chunks[:, None] * meta.chunk_sequences + np.arange(meta.chunk_sequences)
        numbers = numbers.reshape(-1)
        numbers = numbers[numbers < meta.num_sequences]
        numbers = evenly_spaced(numbers, -(-limit // meta.context_length))
        chunks, place = np.unique(numbers // meta.chunk_sequences, return_inverse=True)
        used = self._used(chunks).reshape(len(chunks), meta.chunk_sequences, meta.context_length)
        return tokens[numbers].read().result(), used[place, numbers % meta.chunk_sequences]

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
        sequences: slice = slice(None),
        spliced_sequences: slice = slice(None),
    ):
        """Takes the tokens to run the model on.

        Args:
          model: the language model.
          sites: the names of its sites, the target of a transcoder last.
          tokens: token ids (sequences, T).
          what: what messages and the evaluation's settings call the tokens.
          excluded_tokens: the ids that do not count.
          excluded_positions: the positions of a sequence that do not count.
          sequences: which sequences `batches` takes.
          spliced_sequences: which sequences `sequences` takes.

        Raises UserError if the model lacks a site or a token, or if there are no sequences.
        """
        self.model, self.origin = model, "the model"
        self.site_names = tuple(split_names(sites))
        check_distinct(self.site_names, self.origin)
        self.site_widths = tuple(model.site_width(site) for site in self.site_names)
        if tokens.max() >= model.vocab_size or tokens.min() < 0:
            raise UserError(
                f"{what} has token {tokens.max()}, but the model's vocabulary has "
                f"{model.vocab_size}; they do not belong together"
            )
        used = ~np.isin(tokens, excluded_tokens)
        used[:, [p for p in excluded_positions if p < tokens.shape[1]]] = False
        self._rows = (tokens[sequences], used[sequences])
        self._spliced = (tokens[spliced_sequences], used[spliced_sequences])
        for part in (self._rows, self._spliced):
            if not len(part[0]):
                raise UserError(f"{what} has {len(tokens)} sequences, none of those asked for")
        self.num_rows = self._rows[0].size
        left_out = [
            f"{name} {', '.join(map(str, values))}"
            for name, values in (("tokens", excluded_tokens), ("positions", excluded_positions))
            if len(values)
        ]
        self.settings = {
            "rows": f"activations on {what}",
            "sequences": _describe(sequences, len(tokens)),
            "spliced_sequences": _describe(spliced_sequences, len(tokens)),
            "positions": "all" if used.all() else f"all but {' and '.join(left_out)}",
        }

    def num_batches(self, rows: int) -> int:
        """Returns how many batches of at most `rows` rows this process gets."""
        return len(own_share(range(0, len(self._rows[0]), self._sequences_at_once(rows))))

    def batches(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (activations, which rows count) of this process's batches."""
        tokens, used = self._rows
        size = self._sequences_at_once(rows)
        for start in own_share(range(0, len(tokens), size)):
            batch = pad_rows(tokens[start : start + size], size)
            _, tapped = self.model.forward(batch, taps=self.site_names, logits=False)
            x_BxTxW = np.concatenate([tapped[site] for site in self.site_names], axis=-1)
            mask = pad_rows(used[start : start + size], size).reshape(-1)
            yield x_BxTxW.reshape(len(mask), -1), mask

    def sequences(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (token ids, which positions count), (n, T) each, of about `limit` tokens."""
        tokens, used = self._spliced
        count = -(-limit // tokens.shape[1])
        return tokens[:count], used[:count]

    def _sequences_at_once(self, rows: int) -> int:
        tokens = self._rows[0]
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


def input_and_target_sites(sae: SAE, sites: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Returns which of the sites `sae` reads, and which it predicts.

    `sites` are in the order of a row's columns: a transcoder's target is the last.
    """
    return (sites[:-1], sites[-1:]) if sae.config.kind in TRANSCODERS else (sites, sites)


def read_tokens(path) -> np.ndarray:
    """Returns the token ids (sequences, T), int32, of an .npy or .npz file.

    Of an .npz file it takes the array `tokens`, or the only one. Leading axes are joined. Raises
    UserError if there is no such file or it has no token ids.
    """
    path = paths.local(path)
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


def _describe(part: slice, length: int) -> list[int]:
    start, stop, _ = part.indices(length)
    return [start, stop]
