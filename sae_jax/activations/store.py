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
    """What meta.json says of a site.

    Statistics are over the rows that are not excluded, in the units of the data.

    Attributes:
      width: how many columns it has.
      dtype: the type of its values, one of `DTYPES`.
      mean: the mean row, (width,).
      mean_squared_norm: the mean of the rows' squared norms.
      rows_used: how many rows the statistics are of.
      nonfinite_rows: how many rows hold NaN or infinity.
    """

    width: int
    dtype: str
    mean: list = dataclasses.field(default_factory=list)
    mean_squared_norm: float = 0.0
    rows_used: int = 0
    nonfinite_rows: int = 0

    @property
    def numpy_dtype(self) -> np.dtype:
        """The type of the site's values as NumPy has it."""
        return np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))


@dataclasses.dataclass(frozen=True)
class LiveMeta:
    """What meta.json says of a live store, whose rows a language model computes.

    Attributes:
      model: the absolute path of the language model.
      model_fingerprint: the fingerprint of its weights.
      model_dtype: the type that it computes in.
      batch_size: how many contexts the model always runs on at once.
      mesh_model: how many devices share the model.
      statistics_tokens: at least how many tokens the statistics are of; None for all.
    """

    model: str
    model_fingerprint: str
    model_dtype: str
    batch_size: int
    mesh_model: int = 1
    statistics_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class StoreMeta:
    """The content of meta.json.

    Attributes:
      format_version: `FORMAT_VERSION` of the package that wrote it.
      complete: whether the store is finished.
      context_length: the rows of a sequence.
      num_sequences: how many sequences there are.
      chunk_sequences: the sequences of a chunk, the unit of reading.
      shard_sequences: the sequences of a shard, the unit of writing.
      sites: a `SiteMeta` by the name of each site.
      model: the language model that the activations are of, if known.
      tokenizer: its tokenizer, if known.
      tokens_sha256: the hash of the tokens; None where the store has no tokens.
      excluded_tokens: the token ids that are excluded.
      excluded_positions: the positions of a sequence that are excluded.
      excluded_why: what is excluded, in words.
      provenance: where the activations come from.
      live: what computes the rows of a live store; None where the sites are in the store.
    """

    format_version: int
    complete: bool
    context_length: int
    num_sequences: int
    chunk_sequences: int
    shard_sequences: int
    sites: dict
    model: str | None = None
    tokenizer: str | None = None
    tokens_sha256: str | None = None
    excluded_tokens: list = dataclasses.field(default_factory=list)
    excluded_positions: list = dataclasses.field(default_factory=list)
    excluded_why: str = ""
    provenance: dict = dataclasses.field(default_factory=dict)
    live: LiveMeta | None = None

    @property
    def num_rows(self) -> int:
        """The number of rows of each site."""
        return self.num_sequences * self.context_length

    @property
    def chunk_rows(self) -> int:
        """The number of rows of a chunk."""
        return self.chunk_sequences * self.context_length

    @property
    def num_chunks(self) -> int:
        """The number of chunks; the last one may be short."""
        return -(-self.num_sequences // self.chunk_sequences)

    @property
    def num_shards(self) -> int:
        """The number of shards; the last one may be short."""
        return -(-self.num_sequences // self.shard_sequences)

    def arrays(self) -> dict[str, Array]:
        """Returns the arrays of the store by their names, such as "sites/NAME" and "tokens"."""
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
        """Returns the bytes of meta.json."""
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()


def read_meta(folder: Folder) -> StoreMeta | None:
    """Returns the content of meta.json, or None where there is none.

    Raises UserError if it is garbled or of another version.
    """
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
    """Returns meta.json of a finished store. Raises UserError if there is no finished store."""
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

    @property
    def excluded(self) -> ts.TensorStore:
        """A TensorStore handle that says which rows are excluded, (rows,) uint8.

        Values are 0, or a sum of SPECIAL_TOKEN, HIGH_NORM and NONFINITE.
        """
        return self._handle("excluded")

    @functools.cached_property
    def usable_rows(self) -> np.ndarray:
        """The number of rows of each chunk that are not excluded, and that are finite.

        The array is (chunks, 2), int32.
        """
        return self._handle("usable_rows").read().result()

    def read(self, site: str, rows: slice) -> np.ndarray:
        """Returns the rows [rows.start, rows.stop) of a site as they are stored, (rows, width).

        It is slow, and meant for a few rows; training reads through `Stream`. Raises UserError if
        they cannot be read.
        """
        site = self.resolve_site(site)
        start, stop, step = rows.indices(self.num_rows)
        with self._damage_named(f"sites/{site}"):
            return self.site(site)[start : max(start, stop) : step].read().result()

    def read_rows(self, sites: Sequence[str], ids: np.ndarray, outs: Sequence[np.ndarray]) -> None:
        """Reads the rows `ids` (n,), in any order, of each site into its `out` (n, width).

        It is slow, and meant for a few rows. Raises UserError if they cannot be read.
        """
        for site, out in zip(sites, outs, strict=True):
            with self._damage_named(f"sites/{site}"):
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

    def check(self, progress=lambda chunks: chunks) -> None:
        """Reads every byte of every site and compares it with the checksums.

        `progress` may wrap the iterator over the chunks. Raises UserError, naming the site and the
        chunk, if bytes were altered since they were written, or if a row that is not finite is not
        marked as such.
        """
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
        """Turns a failure to read an array into a UserError that names it."""
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
    """Returns the CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(values).view(np.uint8))
