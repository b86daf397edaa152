"""The activation store: what is in it, whether it is whole, and reading it.

    STORE/meta.json      `StoreMeta`: layout, sites and their statistics, exclusions, provenance
    STORE/sites/SITE     (rows, width) activations; rows = num_sequences * context_length
    STORE/tokens         (num_sequences, context_length) int32, where the store has tokens
    STORE/excluded       (rows,) uint8, 0 for a row to train on, else a sum of the bits below
    STORE/usable_rows    (chunks, 2) int32: rows of the chunk that are not excluded; finite rows
    STORE/checksums      (chunks, sites) uint32: CRC-32 of each chunk's bytes, sites by name

All are uncompressed zarr3 with shards (`files.Array`). Row r of every site is token
r % context_length of sequence r // context_length. A chunk holds whole sequences and is the unit
of reading; all arrays but usable_rows and checksums are cut at the same sequences.

A live store has neither sites nor checksums: a language model computes its rows when they are
read. `Store` reads stores whose sites are there; what can run a model opens live ones too.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import tensorstore as ts
from absl import logging

from sae_jax import buckets
from sae_jax.activations import checking, statistics
from sae_jax.activations.files import Folder
from sae_jax.activations.meta import (
    NONFINITE,
    PADDING,
    SPECIAL_TOKEN,
    StoreMeta,
    read_complete_meta,
)
from sae_jax.errors import UserError, choose
from sae_jax.place_errors import explanation

# Mapped files are copied once, from the page cache to where the rows go: half the CPU time of
# TensorStore's other modes. The cache keeps the shards' indices, which remote stores need.
_READING = {
    "file_io_mode": {"mode": "memmap"},
    "cache_pool": {"total_bytes_limit": 64 << 20},
    **buckets.REQUESTS,
}
_CHECKED_AT_ONCE = 128 << 20  # bytes that `check` asks for at the same time
_LOG_EVERY = 10  # seconds, while chunks do not come


class Store:
    """A complete store, opened for reading by `Store.open(path)`.

    `lm.open_store(path)` opens live stores too, whose rows a language model computes.

    Attributes:
      path: where the store is.
      folder: its files.
      meta: the content of its meta.json.
    """

    def __init__(self, folder: Folder, meta: StoreMeta):
        """Prefer `Store.open`, which checks the files."""
        self.folder = folder
        self.path = folder.path
        self.meta = meta
        self._arrays = meta.arrays()
        self._context = ts.Context(_READING)
        self._handles = {}

    @classmethod
    def open(cls, path) -> "Store":
        """Opens the store at `path`.

        Raises UserError if the store is missing, incomplete, live or of another version. Raises it
        too, naming the file, if a file is missing or has another size or shape than meta.json says.
        Altered bytes of the right size are found by `check` only.
        """
        folder = Folder(path)
        meta = read_complete_meta(folder)
        if meta.live:
            raise UserError(
                f"{folder.path} is live: a language model computes its rows when they are read; "
                "open it with sae_jax.lm.open_store"
            )
        store = cls(folder, meta)
        store.check_files()
        return store

    def __repr__(self) -> str:
        sites = ", ".join(f"{name} ({s.width}, {s.dtype})" for name, s in self.meta.sites.items())
        return f"{type(self).__name__}({self.path!r}: {self.num_rows:,} rows of {sites})"

    @property
    def num_rows(self) -> int:
        """The number of rows of each site."""
        return self.meta.num_rows

    def resolve_site(self, name: str = "") -> str:
        """Returns `name` if the store has that site, and for "" the name of its only site.

        Raises UserError, listing the sites, if there is no such site or "" could be several.
        """
        sites = list(self.meta.sites)
        if name:
            return choose(name, sites, f"the site of {self.path}")
        if len(sites) > 1:
            raise UserError(f"{self.path} has several sites, choose one: {', '.join(sites)}")
        return sites[0]

    def site(self, name: str = "") -> ts.TensorStore:
        """Returns a TensorStore handle (rows, width) of a site, by default of the only one."""
        return self._handle(f"sites/{self.resolve_site(name)}")

    def tokens(self) -> ts.TensorStore | None:
        """Returns a TensorStore handle of the token ids, or None where the store has no tokens.

        They are (num_sequences, context_length), int32.
        """
        return self._handle("tokens") if self.meta.tokens_sha256 is not None else None

    def read_tokens(self, sequences: slice | np.ndarray) -> np.ndarray | None:
        """Returns the tokens (n, context_length) of some sequences, or None where there are none.

        `sequences` are a slice of the store's, or their numbers. Raises UserError if the tokens
        cannot be read.
        """
        if self.meta.tokens_sha256 is None:
            return None
        if isinstance(sequences, slice):
            sequences = slice(*sequences.indices(self.meta.num_sequences))
        with self.folder.damage_named("tokens"):
            found = np.ascontiguousarray(self.tokens()[sequences].read().result())
        if found.size and found.min() < 0:  # what TensorStore reads where a file is gone
            raise UserError(
                f"{self.path}/tokens has tokens below 0: the store is damaged; make it again"
            )
        return found

    @property
    def excluded(self) -> ts.TensorStore:
        """A TensorStore handle that says which rows are excluded, (rows,) uint8.

        Values are 0, or a sum of SPECIAL_TOKEN, HIGH_NORM and NONFINITE.
        """
        return self._handle("excluded")

    @functools.cached_property
    def usable_rows(self) -> np.ndarray:
        """The number of rows of each chunk that are not excluded, and that are finite.

        The array is (chunks, 2), int32. Raises UserError if it cannot be read, or is damaged.
        """
        with self.folder.damage_named("usable_rows"):
            counts = self._handle("usable_rows").read().result()
        if not ((counts >= 0) & (counts <= self.meta.chunk_rows)).all():
            raise UserError(
                f"{self.path}/usable_rows has counts that no chunk of {self.meta.chunk_rows} rows "
                "has: it is damaged; make the store again"
            )
        return counts

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the rows and of what is trained on of them.

        A copy of the store has the same, wherever it is. Raises UserError if it cannot be read.
        """
        meta = self.meta
        live = None if meta.live is None else dataclasses.asdict(meta.live)
        for how in ("model", "statistics_tokens") if live else ():
            del live[how]  # where the model is, and how what follows was found
        about = [
            {name: dataclasses.asdict(site) for name, site in sorted(meta.sites.items())},
            [meta.context_length, meta.num_sequences, meta.chunk_sequences, meta.tokens_sha256],
            [meta.excluded_tokens, meta.excluded_positions, live],
        ]
        digest = hashlib.sha256(json.dumps(about).encode())
        if not live:
            digest.update(self.checksums.tobytes())
        return digest.hexdigest()[:16]

    @functools.cached_property
    def checksums(self) -> np.ndarray:
        """The CRC-32 of each chunk of each site, (chunks, sites) uint32; sites by name.

        Raises UserError if they cannot be read. A live store has none.
        """
        with self.folder.damage_named("checksums"):
            return self._handle("checksums").read().result()

    def read(self, site: str, rows: slice) -> np.ndarray:
        """Returns the rows [rows.start, rows.stop) of a site as they are stored, (rows, width).

        It is slow, and meant for a few rows; training reads through `Stream`. Raises UserError if
        they cannot be read.
        """
        site = self.resolve_site(site)
        start, stop, step = rows.indices(self.num_rows)
        with self.folder.damage_named(f"sites/{site}"):
            return self.site(site)[start : max(start, stop) : step].read().result()

    def read_rows(self, sites: Sequence[str], ids: np.ndarray, outs: Sequence[np.ndarray]) -> None:
        """Reads the rows `ids` (n,), in any order, of each site into its `out` (n, width).

        It is slow, and meant for a few rows. Raises UserError if they cannot be read.
        """
        for site, out in zip(sites, outs, strict=True):
            with self.folder.damage_named(f"sites/{site}"):
                out[...] = self.site(site)[ids].read().result()

    def read_excluded(self, chunks) -> np.ndarray:
        """Returns which rows of the chunks are excluded, (len(chunks), chunk_rows) uint8.

        Values are as in `excluded`, and PADDING for rows beyond the store's end. Raises UserError
        if they cannot be read.
        """
        chunk_rows = self.meta.chunk_rows
        out = np.full((len(chunks), chunk_rows), PADDING, np.uint8)
        self._read_chunks("excluded", chunks, out)
        return out

    def is_nonfinite(self, row: int) -> bool:
        """Whether a row is marked as not finite in some site."""
        return bool(self.excluded[row].read().result() & NONFINITE)

    def read_chunks(self, sites: Sequence[str], chunks, outs: Sequence[np.ndarray]) -> None:
        """Reads whole chunks of each site, all at once, into its `out`.

        `out` is (len(chunks), chunk_rows, width). Its rows beyond the store's end are left as they
        are. Raises UserError if the chunks cannot be read.
        """
        for site, out in zip(sites, outs, strict=True):
            self._read_chunks(f"sites/{site}", chunks, out)

    def check(self, progress: Callable[[range], Iterable[int]] = lambda chunks: chunks) -> str:
        """Reads every byte of the store, and compares it with what it must be.

        Of a live store, what its model computes is not checked: the activations, their statistics,
        and which rows are not finite. `progress` may wrap the iterator over the chunks.

        Returns what was checked, in words. Raises UserError, naming the file and the chunk, where
        bytes were altered since they were written, or where a row that is not finite is not marked
        as such.
        """
        self.check_files()
        self._check_tokens()
        meta, sums, count = self.meta, {}, np.zeros(self.meta.context_length, np.int64)
        everything = self._read_everything()
        for chunk in progress(range(meta.num_chunks)):
            excluded, tokens, values = next(everything)
            length = min(meta.num_sequences - chunk * meta.chunk_sequences, meta.chunk_sequences)
            expected = checking.excluded_by_rule(meta, length, tokens)
            if meta.live:  # its model alone can tell
                expected |= excluded[: len(expected)] & NONFINITE
            finite = {}
            for name, x in values.items():
                self._check_values(name, chunk, x, excluded)
                finite[name] = statistics.finite_rows(x)
                expected[~finite[name]] |= NONFINITE
            checking.check_excluded(self.path, chunk, excluded, self.usable_rows[chunk], expected)
            used = (expected & (SPECIAL_TOKEN | NONFINITE) == 0).reshape(length, -1)
            count += used.sum(axis=0)
            for name, x in values.items():
                part = statistics.site_sums(x, used, int((~finite[name]).sum()))
                sums[name] = sums[name] + part if name in sums else part
        for name, site_sums in sums.items():
            checking.check_statistics(self.path, meta, name, site_sums, count)
        tokens = "" if meta.tokens_sha256 is None else "tokens, "
        if meta.live:
            return (
                f"{tokens}excluded rows and their counts are all as written; what the model "
                "computes was not checked: activations, statistics, and which rows are NaN"
            )
        return f"activations, {tokens}excluded rows, counts and statistics are all as written"

    def check_chunks(self, chunks) -> None:
        """Compares the bytes of some chunks, of every site, with their checksums.

        Raises UserError, naming the site and the chunk, if they were altered since they were
        written, or if a row that is not finite is not marked as such. Raises it too, naming the
        file, if a file of the store is gone.
        """
        self.check_files()
        for chunk in chunks:
            excluded = self.read_excluded([chunk])[0]
            first = int(chunk) * self.meta.chunk_rows
            for name in sorted(self.meta.sites):
                values = self.read(name, slice(first, first + self.meta.chunk_rows))
                self._check_values(name, chunk, values, excluded)

    def _check_values(self, site: str, chunk: int, values: np.ndarray, excluded: np.ndarray):
        """Raises UserError as `check_chunks` does for the `values` (n, width) of a chunk."""
        first = int(chunk) * self.meta.chunk_rows
        rows = f"rows {first} to {first + len(values) - 1}"
        where = f"{self.path}/sites/{site}: chunk {chunk} ({rows})"
        column = sorted(self.meta.sites).index(site)
        if checksum(values) != self.checksums[chunk, column]:
            raise UserError(
                f"{where} was altered since it was written, or its checksum was: the store is "
                "damaged; make it again"
            )
        unmarked = ~statistics.finite_rows(values) & (excluded[: len(values)] & NONFINITE == 0)
        if unmarked.any():
            raise UserError(
                f"{where} holds NaN or infinity in row {first + int(np.argmax(unmarked))}, which "
                "is not marked: the store is damaged; make it again"
            )

    def _read_everything(self) -> Iterator[tuple[np.ndarray, np.ndarray | None, dict]]:
        """Yields (excluded, tokens, {site: values}) of every chunk, in order.

        Many chunks are read at the same time, because an object store may be slow to answer, and
        lose requests.
        """
        meta = self.meta
        sites = {} if meta.live else dict(sorted(meta.sites.items()))
        row_bytes = sum(site.width * site.numpy_dtype.itemsize for site in sites.values()) or 1
        at_once = min(max(1, _CHECKED_AT_ONCE // (row_bytes * meta.chunk_rows)), 1024)
        for first in range(0, meta.num_chunks, at_once):
            chunks = np.arange(first, min(first + at_once, meta.num_chunks))
            outs = [
                np.empty((len(chunks), meta.chunk_rows, site.width), site.numpy_dtype)
                for site in sites.values()
            ]
            if sites:
                self.read_chunks(list(sites), chunks, outs)
            start, excluded = first * meta.chunk_sequences, self.read_excluded(chunks)
            tokens = self.read_tokens(slice(start, start + len(chunks) * meta.chunk_sequences))
            for i, chunk in enumerate(chunks):
                rows = min(self.num_rows - chunk * meta.chunk_rows, meta.chunk_rows)
                values = {name: out[i, :rows] for name, out in zip(sites, outs, strict=True)}
                part = slice(i * meta.chunk_sequences, (i + 1) * meta.chunk_sequences)
                yield excluded[i], None if tokens is None else tokens[part], values

    def _check_tokens(self) -> None:
        """Raises UserError unless the tokens have the hash that meta.json says."""
        meta, digest = self.meta, hashlib.sha256()
        if meta.tokens_sha256 is None:
            return
        for first in range(0, meta.num_sequences, meta.shard_sequences):
            digest.update(self.read_tokens(slice(first, first + meta.shard_sequences)))
        if digest.hexdigest() != meta.tokens_sha256:
            raise UserError(
                f"{self.path}/tokens was altered since it was written, or its hash in "
                f"{self.path}/meta.json: the store is damaged; make it again"
            )

    def _read_chunks(self, name: str, chunks, out: np.ndarray) -> None:
        handle, chunk_rows = self._handle(name), self.meta.chunk_rows
        pending = []
        for chunk, target in zip(chunks, out, strict=True):
            first = int(chunk) * chunk_rows
            stop = min(first + chunk_rows, self.num_rows)
            pending.append(ts.array(target[: stop - first]).write(handle[first:stop]))
        with self.folder.damage_named(name):
            for number, write in enumerate(pending):
                while not self._has_come(write):
                    logging.info(
                        "waiting for %s/%s: %d of %d chunks have come",
                        self.path, name, number, len(pending),
                    )  # fmt: skip

    @staticmethod
    def _has_come(write: ts.Future) -> bool:
        try:
            write.result(timeout=_LOG_EVERY)
        except TimeoutError:
            return False
        return True

    def _handle(self, name: str) -> ts.TensorStore:
        if name not in self._handles:
            try:
                self._handles[name] = self._arrays[name].open(self.folder, context=self._context)
            except ValueError as error:
                where = f"{self.path}/{name}/zarr.json"
                reason = str(error).splitlines()[0][:300]
                raise UserError(
                    explanation(where, error)
                    or f"{where} does not fit meta.json ({reason}); make the store again"
                ) from None
        return self._handles[name]

    def check_files(self) -> None:
        """Raises UserError, naming the file, if a file of an array is missing or has another size
        or shape than meta.json says."""
        for name, array in self._arrays.items():
            found = self.folder.sizes(name)
            for file, size in itertools.chain(array.file_sizes(), [(f"{name}/zarr.json", None)]):
                if file not in found:
                    raise UserError(
                        f"{self.path}/{file} is missing: the store is damaged; make it again"
                    )
                if None not in (size, found[file]) and size != found[file]:
                    raise UserError(
                        f"{self.path}/{file} has {found[file]} bytes, not {size}: it is damaged; "
                        "make the store again"
                    )
            self._handle(name)


def checksum(values: np.ndarray) -> int:
    """Returns the CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(values).view(np.uint8))
