"""What a store's meta.json says, and what must hold of it.

`StoreMeta` is the definition of the file. The arrays of a store follow from it.
"""

import dataclasses
import math
import pathlib
from typing import Annotated, Any, Literal

import ml_dtypes
import msgspec
import numpy as np

from sae_jax import paths
from sae_jax.activations.files import Array, Folder
from sae_jax.errors import UserError
from sae_jax.json_files import checked, parse_json

FORMAT_VERSION = 1
DTYPES = ("bfloat16", "float16", "float32")

SPECIAL_TOKEN, HIGH_NORM, NONFINITE = 1, 2, 4  # bits of `excluded`
PADDING = 255  # `excluded` beyond the last row

_SUMMARY_CHUNK = 65_536

_Count = Annotated[int, msgspec.Meta(ge=1)]
_Number = Annotated[int, msgspec.Meta(ge=0)]


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

    width: _Count
    dtype: Literal["bfloat16", "float16", "float32"]
    mean: list[float] = dataclasses.field(default_factory=list)
    mean_squared_norm: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    rows_used: _Number = 0
    nonfinite_rows: _Number = 0

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
    batch_size: _Count
    mesh_model: _Count = 1
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
    context_length: _Count
    num_sequences: _Count
    chunk_sequences: _Count
    shard_sequences: _Count
    sites: dict[str, SiteMeta]
    model: str | None = None
    tokenizer: str | None = None
    tokens_sha256: str | None = None
    excluded_tokens: list[int] = dataclasses.field(default_factory=list)
    excluded_positions: list[_Number] = dataclasses.field(default_factory=list)
    excluded_why: str = ""
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
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
        return paths.as_json(dataclasses.asdict(self)).encode()


def read_meta(folder: Folder) -> StoreMeta | None:
    """Returns the content of meta.json, or None where there is none.

    Raises UserError, which names the field, if it is not what a store of this version has.
    """
    file = f"{folder.path}/meta.json"
    data = folder.read("meta.json")
    if data is None:
        return None
    try:
        values = parse_json(data, file)
        version = values.get("format_version") if isinstance(values, dict) else None
        if version is None:
            raise UserError(f"{file} is not a store's: it has no format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {version!r}, this sae_jax reads version "
                f"{FORMAT_VERSION}; use the sae_jax that wrote it"
            )
        meta = checked(values, StoreMeta, file)
        _check(meta, file)
    except UserError as error:
        raise UserError(f"{error}; correct it, or make the store again") from None
    return meta


def _check(meta: StoreMeta, file: str) -> None:
    """Raises UserError where the fields of meta.json, each right by itself, do not fit together."""
    check_sites({name: site.width for name, site in meta.sites.items()})
    if meta.shard_sequences % meta.chunk_sequences:
        raise UserError(
            f"{file}: shard_sequences is {meta.shard_sequences}, not a multiple of "
            f"chunk_sequences {meta.chunk_sequences}"
        )
    if any(position >= meta.context_length for position in meta.excluded_positions):
        raise UserError(
            f"{file}: excluded_positions has {max(meta.excluded_positions)}, but sequences have "
            f"{meta.context_length} tokens"
        )
    for name, site in meta.sites.items() if meta.complete else ():
        if len(site.mean) != site.width:
            raise UserError(
                f"{file}: the mean of site {name} has {len(site.mean)} numbers, not {site.width}"
            )
        if not all(map(math.isfinite, [*site.mean, site.mean_squared_norm])):
            raise UserError(f"{file}: the statistics of site {name} hold NaN or infinity")
        if max(site.rows_used, site.nonfinite_rows) > meta.num_rows:
            raise UserError(
                f"{file}: the statistics of site {name} are of more than its {meta.num_rows} rows"
            )


def check_sites(sites: dict[str, int]) -> None:
    """Raises UserError for names and widths that sites cannot have."""
    if not sites:
        raise UserError("a store needs at least one site")
    for name, width in sites.items():
        if not name or "/" in name or "," in name or name.startswith("."):
            raise UserError(
                f"{name!r} cannot name a site: it names a directory of the store, and commas "
                "separate sites"
            )
        paths.inside(pathlib.Path("sites"), name)
        if width < 1:
            raise UserError(f"site {name} has width {width}")


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
