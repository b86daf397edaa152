"""Writes a store shard by shard, by any number of writers, going on where one was killed.

A shard is written once all its arrays and then its notes (STORE/written/NUMBER.npz: sums, masks,
checksums) exist. `finish` merges the notes, writes what follows from all of them, and turns
meta.json to complete. Every file appears under its name only when it is whole.
"""

import dataclasses
import errno
import functools
import hashlib
import io
import json
import time

import numpy as np

from sae_jax.activations import statistics
from sae_jax.activations.files import Folder
from sae_jax.activations.meta import (
    DTYPES,
    FORMAT_VERSION,
    HIGH_NORM,
    NONFINITE,
    SPECIAL_TOKEN,
    LiveMeta,
    SiteMeta,
    StoreMeta,
    check_sites,
    read_meta,
)
from sae_jax.activations.store import checksum
from sae_jax.config import difference
from sae_jax.errors import UserError, choose
from sae_jax.place_errors import explained

CHUNK_BYTES = 3 << 19  # 1.5 MiB: reads fast, and rows of many sequences meet in a window
SHARD_BYTES = 256 << 20
MIN_CHUNKS = 256  # chunks of a small store, for fine-grained held-out sequences and shuffling
MIN_SHARDS = 8  # shards of a small store, so that an interrupted harvest keeps most of its work
_CHUNK_ROWS = (256, 4096)
_JSON_BYTES = 1024  # of the zarr.json of an array, and more


@dataclasses.dataclass(frozen=True)
class ShardSpec:
    """One shard of a store.

    Attributes:
      index: its number.
      sequences: the slice of the store's sequences that are in it.
    """

    index: int
    sequences: slice


class StoreWriter:
    """Writes one store. It is made by `StoreWriter.create_or_resume`.

    Attributes:
      folder: the store's directory.
      path: its path.
      meta: what meta.json says.
    """

    def __init__(self, folder: Folder, meta: StoreMeta, tokens: np.ndarray | None):
        """Makes a writer for a store whose meta.json is written; use `create_or_resume`."""
        self.folder = folder
        self.path = folder.path
        self.meta = meta
        self._tokens = tokens

    @classmethod
    def create_or_resume(
        cls,
        path,
        *,
        sites: dict[str, int],
        num_sequences: int,
        context_length: int,
        dtype: str = "bfloat16",
        tokens: np.ndarray | None = None,
        model: str | None = None,
        tokenizer: str | None = None,
        special_tokens=(),
        provenance: dict | None = None,
        live: LiveMeta | None = None,
    ) -> "StoreWriter":
        """Returns a writer for a new store, or for an unfinished one of the very same content.

        Several processes may call this at once with the same arguments. A finished store with the
        same content gives a writer with nothing missing.

        Args:
          path: the store's directory.
          sites: the widths of the sites by name.
          num_sequences: the number of texts.
          context_length: the tokens of a text.
          dtype: how activations are stored: "float32", "bfloat16" or "float16".
          tokens: the ids (num_sequences, context_length) of the tokens.
          model: the name of the language model.
          tokenizer: the name of its tokenizer.
          special_tokens: ids whose rows are stored but never trained on.
          provenance: JSON values that say where the activations come from.
          live: how activations are computed, for a store that keeps all but the activations and
            only takes their statistics.

        Raises UserError, which says what differs, where `path` holds any other store.
        """
        check_sites(sites)
        choose(dtype, DTYPES, "the dtype of a store")
        if num_sequences < 1 or context_length < 1:
            raise UserError(
                f"a store needs rows; got {num_sequences} sequences of {context_length} tokens"
            )
        if tokens is not None:
            tokens = np.ascontiguousarray(tokens, np.int32)
            if tokens.shape != (num_sequences, context_length):
                raise UserError(
                    f"tokens have shape {tokens.shape}, not ({num_sequences}, {context_length})"
                )
        elif special_tokens:
            raise UserError("special_tokens were given without tokens to find them in")
        sites = {name: SiteMeta(int(width), dtype) for name, width in sites.items()}
        widest = max(sites.values(), key=lambda site: site.width)
        chunk, shard = layout(widest, num_sequences, context_length)
        meta = StoreMeta(
            format_version=FORMAT_VERSION,
            complete=False,
            context_length=context_length,
            num_sequences=num_sequences,
            chunk_sequences=chunk,
            shard_sequences=shard,
            sites=sites,
            model=model,
            tokenizer=tokenizer,
            tokens_sha256=None if tokens is None else hashlib.sha256(tokens).hexdigest(),
            excluded_tokens=[int(token) for token in special_tokens],
            provenance=provenance or {},
            live=live,
        )
        folder = Folder(path)
        existing = read_meta(folder)
        if existing is not None:
            _check_same(existing, meta, folder)
            meta = existing
        else:
            folder.write("meta.json", meta.to_json())
        if not meta.complete:
            with explained(folder.path):
                for name in _arrays_of_shards(meta):
                    meta.arrays()[name].open(folder, create=True)
        return cls(folder, meta, tokens)

    def missing_shards(self) -> list[ShardSpec]:
        """Returns the shards still to be written, in order.

        Writers may share them out in any way.
        """
        if self._finished_by_another():
            return []
        written = self.folder.sizes("written")
        size = self.meta.shard_sequences
        return [
            ShardSpec(i, slice(i * size, min((i + 1) * size, self.meta.num_sequences)))
            for i in range(self.meta.num_shards)
            if _notes_name(i) not in written
        ]

    def write_shard(
        self,
        index: int,
        values: dict[str, np.ndarray] | None,
        sampled: np.ndarray | None = None,
    ) -> None:
        """Writes one shard.

        Rows that are not finite in the store's dtype are marked as such.

        Args:
          index: the number of the shard.
          values: by site, activations (sequences of the shard * context_length, width) of any float
            type. None is for a live store: the shard has no part in the statistics.
          sampled: for a live store, the numbers within the shard of the sequences that `values`
            are of, the only ones with a part in the statistics. None: all.

        Raises UserError for an array of another shape.
        """
        meta, arrays = self.meta, self._arrays
        first = index * meta.shard_sequences
        stop = min(first + meta.shard_sequences, meta.num_sequences)
        rows = slice(first * meta.context_length, stop * meta.context_length)
        sequences = slice(None) if sampled is None else sampled
        count = (rows.stop - rows.start) if sampled is None else len(sampled) * meta.context_length
        names = sorted(meta.sites) if values is not None else []
        values = {name: self._as_stored(name, values[name], rows.start, count) for name in names}
        with explained(self.path):
            pending = [
                arrays[f"sites/{name}"].open(self.folder)[rows].write(x)
                for name, x in values.items()
                if not meta.live
            ]
        excluded = np.zeros((stop - first, meta.context_length), np.uint8)
        if self._tokens is not None:
            tokens = self._tokens[first:stop]
            with explained(self.path):
                pending.append(arrays["tokens"].open(self.folder)[first:stop].write(tokens))
            excluded[np.isin(tokens, meta.excluded_tokens)] |= SPECIAL_TOKEN
        finite = {name: statistics.finite_rows(x) for name, x in values.items()}
        for rows_finite in finite.values():
            rows_finite = rows_finite.reshape(-1, meta.context_length)
            excluded[sequences] |= np.where(rows_finite, 0, NONFINITE).astype(np.uint8)
        notes = {"excluded": excluded, "time": np.float64(time.time())}
        used = excluded[sequences] == 0
        if values:
            notes["count"] = used.sum(axis=0)
        for name, x in values.items():
            sums = statistics.site_sums(x, used, int((~finite[name]).sum()))
            notes |= {f"{name}/{key}": value for key, value in vars(sums).items()}
        if not meta.live:
            starts = range(0, excluded.size, meta.chunk_rows)
            notes["checksums"] = np.array(
                [[checksum(x[s : s + meta.chunk_rows]) for x in values.values()] for s in starts],
                np.uint32,
            )
        with explained(self.path):
            for write in pending:
                write.result()
        buffer = io.BytesIO()
        np.savez(buffer, **notes)
        self.folder.write(_notes_name(index), buffer.getvalue())

    def finish(self) -> None:
        """Merges what the shards' writers noted and marks the store complete.

        One process calls this after all shards are written. A finished store stays as it is.
        Raises UserError if some shards are not written.
        """
        if self._finished_by_another():
            return
        if missing := self.missing_shards():
            raise UserError(
                f"{self.path} lacks {len(missing)} of {self.meta.num_shards} shards "
                f"(first: {missing[0].index}); write them before finishing"
            )
        try:
            count, sums = self._merge()
            # Of both what follows is the same, whoever of two that finish at once comes first.
            self._finish(count, sums)
        except FileNotFoundError as error:
            if not self._finished_by_another():
                raise UserError(
                    f"{error.filename} was removed while {self.path} was being finished; start "
                    "the same again"
                ) from None

    def _finished_by_another(self) -> bool:
        """Whether the store is finished; the meta is then that of whoever finished it."""
        if not self.meta.complete:
            there = read_meta(self.folder)
            if there is None or not there.complete:
                return False
            self.meta = there
            self.__dict__.pop("_arrays", None)
        self.folder.delete_folder("written")  # the notes of a shard that was still being written
        return True

    def _finish(self, count: np.ndarray, sums: dict[str, statistics.SiteSums]) -> None:
        by_site = [statistics.high_norm_positions(site, count) for site in sums.values()]
        positions = sorted(set(np.concatenate(by_site).tolist()))
        sites = {}
        for name, site in self.meta.sites.items():
            mean, squared, used = statistics.mean_and_squared_norm(sums[name], count, positions)
            sites[name] = dataclasses.replace(
                site,
                mean=mean.tolist(),
                mean_squared_norm=squared,
                rows_used=used,
                nonfinite_rows=int(sums[name].nonfinite_rows),
            )
        excluded_rows = self._write_summaries(positions)
        meta = dataclasses.replace(
            self.meta,
            complete=True,
            sites=sites,
            excluded_positions=positions,
            excluded_why=_describe_excluded(self.meta, positions, excluded_rows),
        )
        self.folder.write("meta.json", meta.to_json())
        self.folder.delete_folder("written")
        self.meta = meta

    def set_num_sequences(self, num_sequences: int) -> None:
        """Shortens a store whose length was not known beforehand (`write_store`)."""
        for name in _arrays_of_shards(self.meta):
            array = self._arrays[name]
            shape = [num_sequences * array.shape[0] // self.meta.num_sequences, *array.shape[1:]]
            handle = array.open(self.folder)
            handle.resize(exclusive_max=shape, resize_metadata_only=True).result()
        self.meta = dataclasses.replace(self.meta, num_sequences=num_sequences)
        self.__dict__.pop("_arrays", None)

    @functools.cached_property
    def _arrays(self):
        return self.meta.arrays()

    def _as_stored(self, name: str, x: np.ndarray, first: int, count: int) -> np.ndarray:
        """Returns the values of a site in the store's dtype. Raises UserError for another shape."""
        site, x = self.meta.sites[name], np.asarray(x)
        if x.shape != (count, site.width):
            raise UserError(
                f"site {name} got an array of shape {x.shape} for {count} rows from row {first} of "
                f"{self.path}, which take ({count}, {site.width})"
            )
        with np.errstate(over="ignore"):  # becomes infinity, which is then counted
            return np.ascontiguousarray(x, dtype=site.numpy_dtype)

    def _notes(self):
        """Yields the number and the notes of each shard."""
        for index in range(self.meta.num_shards):
            name = _notes_name(index)
            if (notes := self.folder.read(name)) is None:
                raise FileNotFoundError(errno.ENOENT, "no notes", f"{self.path}/{name}")
            try:
                with np.load(io.BytesIO(notes)) as arrays:
                    found = dict(arrays)
            except Exception as error:  # of a damaged archive it raises all kinds
                raise UserError(
                    f"{self.path}/{name} is damaged ({error}); remove that file and start the same "
                    "again, to write its shard once more"
                ) from None
            yield index, found

    def _merge(self):
        """Returns count (T,) and {site: SiteSums} over the shards with values, added in their
        order.
        """
        count, sums = 0, {}
        fields = [field.name for field in dataclasses.fields(statistics.SiteSums)]
        for _, notes in self._notes():
            if "count" not in notes:
                continue
            count = count + notes["count"]
            for name in self.meta.sites:
                shard = statistics.SiteSums(*(notes[f"{name}/{field}"] for field in fields))
                sums[name] = sums[name] + shard if name in sums else shard
        return count, sums

    def _write_summaries(self, positions: list[int]) -> dict[int, int]:
        """Writes excluded, usable_rows and checksums.

        Returns the number of rows excluded for each reason.
        """
        meta = self.meta
        with explained(self.path):
            mask = self._arrays["excluded"].open(self.folder, create=True)
        usable, checksums = [], []
        rows_by_reason = dict.fromkeys((SPECIAL_TOKEN, HIGH_NORM, NONFINITE), 0)
        for index, notes in self._notes():
            excluded = notes["excluded"]
            excluded[:, positions] |= HIGH_NORM
            for reason in rows_by_reason:
                rows_by_reason[reason] += int((excluded & reason > 0).sum())
            first = index * meta.shard_sequences * meta.context_length
            with explained(self.path):
                mask[first : first + excluded.size].write(excluded.reshape(-1)).result()
            for start in range(0, len(excluded), meta.chunk_sequences):
                chunk = excluded[start : start + meta.chunk_sequences]
                usable.append([(chunk == 0).sum(), (chunk & NONFINITE == 0).sum()])
            if not meta.live:
                checksums.append(notes["checksums"])
        summaries = {"usable_rows": np.array(usable, np.int32)}
        if not meta.live:
            summaries["checksums"] = np.concatenate(checksums)
        with explained(self.path):
            for name, summary in summaries.items():
                self._arrays[name].open(self.folder, create=True).write(summary).result()
        return rows_by_reason


def _arrays_of_shards(meta):
    """Returns the names of the arrays that are written shard by shard."""
    return [n for n in meta.arrays() if n == "tokens" or n.startswith("sites/")]


def _notes_name(index: int) -> str:
    """Returns the file of a shard's notes."""
    return f"written/{index:06d}.npz"


def layout(site: SiteMeta, num_sequences: int, context_length: int) -> tuple[int, int]:
    """Returns the sequences of a chunk and those of a shard, by the widest site."""
    row_bytes = site.width * site.numpy_dtype.itemsize
    rows = min(max(CHUNK_BYTES // row_bytes, _CHUNK_ROWS[0]), _CHUNK_ROWS[1])
    chunk = max(1, min(rows // context_length, num_sequences // MIN_CHUNKS))
    chunks = -(-num_sequences // chunk)
    chunk_bytes = chunk * context_length * row_bytes
    return chunk, chunk * max(1, min(SHARD_BYTES // chunk_bytes, -(-chunks // MIN_SHARDS)))


def most_sequences(
    max_bytes: int, sites: dict[str, int], dtype: str, context_length: int, live: LiveMeta | None
) -> int:
    """Returns how many sequences a store can have whose files are `max_bytes` or less together.

    It is 0 where not even one fits. The other arguments are those of
    `StoreWriter.create_or_resume`.
    """
    metas = {name: SiteMeta(width, dtype) for name, width in sites.items()}
    widest = max(metas.values(), key=lambda site: site.width)

    def size(num_sequences):
        chunk, shard = layout(widest, num_sequences, context_length)
        meta = StoreMeta(
            FORMAT_VERSION, True, context_length, num_sequences, chunk, shard, metas,
            tokens_sha256="", live=live,
        )  # fmt: skip
        arrays = meta.arrays().values()
        return sum(array.num_bytes for array in arrays) + _JSON_BYTES * (
            len(arrays) + 4 + sum(sites.values()) // 32  # means, at about 20 bytes a number
        )

    fits, too_many = 0, max_bytes // context_length + 1  # a mask has a byte for each row
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if size(middle) <= max_bytes else (fits, middle)
    return fits


def _check_same(existing: StoreMeta, wanted: StoreMeta, folder: Folder) -> None:
    """Raises UserError where a store exists whose content differs from what is wanted."""

    def content(meta):
        values = dataclasses.asdict(meta)
        values["sites"] = {n: {"width": s.width, "dtype": s.dtype} for n, s in meta.sites.items()}
        for learned in ("complete", "excluded_positions", "excluded_why", "provenance"):
            del values[learned]
        return json.loads(json.dumps(values))

    if changes := difference(content(existing), content(wanted)):
        raise UserError(
            f"{folder.path} already holds another store ({'; '.join(changes[:3])}); "
            "choose another directory"
        )


def _describe_excluded(meta: StoreMeta, positions: list[int], rows: dict[int, int]) -> str:
    """Says in words which rows are excluded."""
    parts = []
    if rows[SPECIAL_TOKEN]:
        parts.append(f"{rows[SPECIAL_TOKEN]} rows of special tokens {meta.excluded_tokens}")
    if positions:
        parts.append(
            f"{rows[HIGH_NORM]} rows at positions {positions}, where the mean norm is more than "
            f"{statistics.HIGH_NORM_RATIO:g} times the median over positions"
        )
    if rows[NONFINITE]:
        parts.append(f"{rows[NONFINITE]} rows with NaN or infinity in some site")
    return "; ".join(parts) or "nothing is excluded"
