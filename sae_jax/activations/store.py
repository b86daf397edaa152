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

import contextlib
import dataclasses
import functools
import json
import textwrap
import zlib
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import tensorstore as ts

from sae_jax.activations.files import Array, Folder
from sae_jax.errors import UserError, choose

FORMAT_VERSION = 1
DTYPES = ("bfloat16", "float16", "float32")

SPECIAL_TOKEN, HIGH_NORM, NONFINITE = 1, 2, 4  # bits of `excluded`
PADDING = 255  # `excluded` beyond the last row

_SUMMARY_CHUNK = 65_536

# Mapped files are copied once, from the page cache to where the rows go: half the CPU time of
# TensorStore's other modes. The cache keeps the shards' indices, which remote stores need.
_READING = {
    "file_io_mode": {"mode": "memmap"},
    "cache_pool": {"total_bytes_limit": 64 << 20},
}


@dataclasses.dataclass(frozen=True)
class SiteMeta:
    """One site. Statistics are over the rows that are not excluded, in the units of the data."""

    width: int
    dtype: str
    mean: list = dataclasses.field(default_factory=list)  # (width,)
    mean_squared_norm: float = 0.0
    rows_used: int = 0
    nonfinite_rows: int = 0

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))


@dataclasses.dataclass(frozen=True)
class LiveMeta:
    """What computes the rows of a live store.

    model: of which language model, by an absolute path. model_fingerprint: of its weights.
    batch_size: contexts that the model always runs on. mesh_model: devices that share the model.
    statistics_tokens: the statistics are of at least so many tokens; None: of all."""

    model: str
    model_fingerprint: str
    model_dtype: str
    batch_size: int
    mesh_model: int = 1
    statistics_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class StoreMeta:
    format_version: int
    complete: bool
    context_length: int
    num_sequences: int
    chunk_sequences: int
    shard_sequences: int
    sites: dict
    model: str | None = None
    tokenizer: str | None = None
    tokens_sha256: str | None = None  # None: the store has no tokens
    excluded_tokens: list = dataclasses.field(default_factory=list)
    excluded_positions: list = dataclasses.field(default_factory=list)
    excluded_why: str = ""
    provenance: dict = dataclasses.field(default_factory=dict)
    live: LiveMeta | None = None  # None: the sites are in the store

    @property
    def num_rows(self) -> int:
        return self.num_sequences * self.context_length

    @property
    def chunk_rows(self) -> int:
        return self.chunk_sequences * self.context_length

    @property
    def num_chunks(self) -> int:
        return -(-self.num_sequences // self.chunk_sequences)

    @property
    def num_shards(self) -> int:
        return -(-self.num_sequences // self.shard_sequences)

    def arrays(self) -> dict[str, Array]:
        """Every array of the store by name ("sites/NAME", "tokens", ...)."""
        shard_chunks = self.shard_sequences // self.chunk_sequences
        rows, chunk_rows = self.num_rows, self.chunk_rows
        arrays = [] if self.live else [
            Array(f"sites/{name}", (rows, s.width), s.dtype, chunk_rows, shard_chunks, "NaN")
            for name, s in sorted(self.sites.items())
        ]  # fmt: skip
        arrays.append(Array("excluded", (rows,), "uint8", chunk_rows, shard_chunks, PADDING))
        if self.tokens_sha256 is not None:
            shape = (self.num_sequences, self.context_length)
            arrays.append(Array("tokens", shape, "int32", self.chunk_sequences, shard_chunks, -1))
        summary = min(self.num_chunks, _SUMMARY_CHUNK)
        arrays.append(Array("usable_rows", (self.num_chunks, 2), "int32", summary, 1, -1))
        if not self.live:
            shape = (self.num_chunks, len(self.sites))
            # A checksum may be any number, 0 too: a missing file is caught by its size.
            arrays.append(Array("checksums", shape, "uint32", summary, 1, 0))
        return {array.name: array for array in arrays}

    def to_json(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()


def read_meta(folder: Folder) -> StoreMeta | None:
    """meta.json; None where there is none. UserError if it is garbled or of another version."""
    file = f"{folder.path}/meta.json"
    data = folder.read("meta.json")
    if data is None:
        return None
    try:
        values = json.loads(data)
        version = values["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{file} is garbled: it is not the JSON of a store; make the store again"
        ) from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {version!r}, this sae_jax reads version {FORMAT_VERSION}; "
            "use the sae_jax that wrote it or make the store again"
        )
    try:
        sites = {name: SiteMeta(**site) for name, site in values.pop("sites").items()}
        live = values.pop("live", None)
        meta = StoreMeta(sites=sites, live=live and LiveMeta(**live), **values)
        meta.arrays()
    except (TypeError, KeyError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{file} lacks fields or has wrong ones ({error}); make the store again"
        ) from None
    return meta


def read_complete_meta(folder: Folder) -> StoreMeta:
    """meta.json of a finished store. UserError where there is none, or an unfinished one."""
    meta = read_meta(folder)
    if meta is None:
        raise UserError(f"no activation store at {folder.path}: {folder.path}/meta.json is missing")
    if not meta.complete:
        raise UserError(
            f"{folder.path}/meta.json says the store is incomplete; start the same harvest "
            "again to go on from the first missing shard, or remove the directory"
        )
    return meta


class Store:
    """A complete store whose sites are there, opened for reading: `Store.open(path)`.

    `lm.open_store(path)` opens live stores too, whose rows a language model computes."""

    def __init__(self, folder: Folder, meta: StoreMeta):
        self.folder = folder
        self.path = folder.path
        self.meta = meta
        self._arrays = meta.arrays()
        self._context = ts.Context(_READING)
        self._handles = {}

    @classmethod
    def open(cls, path) -> "Store":
        """The store at `path`. Raises UserError, naming the file, if the store is missing,
        incomplete, of another version, or if any of its files is missing or has another size or
        shape than meta.json says; and if it is live. Altered bytes of the right size are found by
        `check` only."""
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
        return self.meta.num_rows

    def resolve_site(self, name: str = "") -> str:
        """`name` if the store has that site; for "" the only one. UserError lists the sites."""
        sites = list(self.meta.sites)
        if name:
            return choose(name, sites, f"the site of {self.path}")
        if len(sites) > 1:
            raise UserError(f"{self.path} has several sites, choose one: {', '.join(sites)}")
        return sites[0]

    def site(self, name: str = "") -> ts.TensorStore:
        """Handle (rows, width)."""
        return self._handle(f"sites/{self.resolve_site(name)}")

    def tokens(self) -> ts.TensorStore | None:
        """Handle (num_sequences, context_length) int32; None where the store has no tokens."""
        return self._handle("tokens") if self.meta.tokens_sha256 is not None else None

    @property
    def excluded(self) -> ts.TensorStore:
        """Handle (rows,) uint8: 0, or a sum of SPECIAL_TOKEN, HIGH_NORM and NONFINITE."""
        return self._handle("excluded")

    @functools.cached_property
    def usable_rows(self) -> np.ndarray:
        """(chunks, 2) int32: rows of each chunk that are not excluded; that are finite."""
        return self._handle("usable_rows").read().result()

    def read(self, site: str, rows: slice) -> np.ndarray:
        """Rows [rows.start, rows.stop) of a site as stored: (rows, width). A slow path for a few
        rows; training reads through `Stream`."""
        site = self.resolve_site(site)
        start, stop, step = rows.indices(self.num_rows)
        with self._damage_named(f"sites/{site}"):
            return self.site(site)[start : max(start, stop) : step].read().result()

    def read_rows(self, sites: Sequence[str], ids: np.ndarray, outs: Sequence[np.ndarray]) -> None:
        """Rows `ids` (n,), in any order, of each site into its `out` (n, width). A slow path for
        a few rows."""
        for site, out in zip(sites, outs, strict=True):
            with self._damage_named(f"sites/{site}"):
                out[...] = self.site(site)[ids].read().result()

    def read_excluded(self, chunks) -> np.ndarray:
        """(len(chunks), chunk_rows) uint8; rows beyond the store's end are PADDING."""
        chunk_rows = self.meta.chunk_rows
        out = np.full((len(chunks), chunk_rows), PADDING, np.uint8)
        self._read_chunks("excluded", chunks, out)
        return out

    def is_nonfinite(self, row: int) -> bool:
        """Whether a row is marked as not finite in some site."""
        return bool(self.excluded[row].read().result() & NONFINITE)

    def read_chunks(self, sites: Sequence[str], chunks, outs: Sequence[np.ndarray]) -> None:
        """Reads whole chunks of each site, all in flight at once, into its `out` (len(chunks),
        chunk_rows, width). Rows of it beyond the store's end are left as they are."""
        for site, out in zip(sites, outs, strict=True):
            self._read_chunks(f"sites/{site}", chunks, out)

    def check(self, progress=lambda chunks: chunks) -> None:
        """Reads every byte of every site. UserError names the site and chunk that do not have
        the checksum of when they were written, or hold non-finite rows not marked as such."""
        recorded = self._handle("checksums").read().result()
        for chunk in progress(range(self.meta.num_chunks)):
            excluded = self.read_excluded([chunk])[0]
            for column, name in enumerate(sorted(self.meta.sites)):
                first = chunk * self.meta.chunk_rows
                values = self.read(name, slice(first, first + self.meta.chunk_rows))
                last = first + len(values) - 1
                where = f"{self.path}/sites/{name}: chunk {chunk} (rows {first} to {last})"
                if checksum(values) != recorded[chunk, column]:
                    raise UserError(f"{where} was altered since it was written; make it again")
                finite = np.isfinite(values.astype(np.float32)).all(axis=1)
                if not (finite | (excluded[: len(values)] & NONFINITE > 0)).all():
                    raise UserError(f"{where} holds NaN or infinity; make it again")

    def _read_chunks(self, name: str, chunks, out: np.ndarray) -> None:
        handle, chunk_rows = self._handle(name), self.meta.chunk_rows
        pending = []
        for chunk, target in zip(chunks, out, strict=True):
            first = int(chunk) * chunk_rows
            stop = min(first + chunk_rows, self.num_rows)
            pending.append(ts.array(target[: stop - first]).write(handle[first:stop]))
        with self._damage_named(name):
            for write in pending:
                write.result()

    @contextlib.contextmanager
    def _damage_named(self, name: str):
        try:
            yield
        except ValueError as error:  # TensorStore has no class of its own
            reason = textwrap.shorten(str(error), 300)
            raise UserError(
                f"{self.path}/{name} cannot be read: {reason}; if it is damaged, make the store "
                "again"
            ) from error

    def _handle(self, name: str) -> ts.TensorStore:
        if name not in self._handles:
            try:
                self._handles[name] = self._arrays[name].open(self.folder, context=self._context)
            except ValueError as error:
                reason = str(error).splitlines()[0][:300]
                raise UserError(
                    f"{self.path}/{name}/zarr.json does not fit meta.json ({reason}); "
                    "make the store again"
                ) from None
        return self._handles[name]

    def check_files(self) -> None:
        """Raises UserError, naming the file, if a file of an array is missing or has another size
        or shape than meta.json says."""
        for name, array in self._arrays.items():
            found = self.folder.sizes(name)
            expected = array.file_sizes() | {f"{name}/zarr.json": None}
            for file, size in expected.items():
                if file not in found:
                    raise UserError(f"{self.path}/{file} is missing; make the store again")
                if None not in (size, found[file]) and size != found[file]:
                    raise UserError(
                        f"{self.path}/{file} has {found[file]} bytes, not {size}: it is damaged; "
                        "make the store again"
                    )
            self._handle(name)


def checksum(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).view(np.uint8))
