"""Converts activations in the files of other programs to a store.

SAELens' CacheActivationsRunner saves a data set in Hugging Face's arrow format. It has a column by
the name of each hook, with sequences of shape (context length, width), and perhaps one of
`token_ids`. Else a file or folder holds matrices (rows, width), one in each .npy or .safetensors
file, in the order of the files' names.
"""

import dataclasses
import pathlib
from typing import Annotated, Any

import msgspec
import numpy as np
import safetensors
from absl import logging

from sae_jax import paths
from sae_jax.activations import statistics
from sae_jax.activations.meta import DTYPES
from sae_jax.activations.store import Store
from sae_jax.activations.writer import StoreWriter
from sae_jax.errors import UserError
from sae_jax.json_files import checked, read_json
from sae_jax.numpy_files import map_npy
from sae_jax.place_errors import explained

# The files of a data set that Hugging Face's library saved.
_STATE_FILE = "state.json"
_FEATURES_FILE = "dataset_info.json"
_TOKENS_COLUMN = "token_ids"
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def convert(
    source,
    out,
    site: str = "",
    context_length: int | None = None,
    site_of_hook=lambda hook: hook,
    progress=lambda shards: shards,
) -> Store:
    """Writes the activations in a file or folder to a new store.

    One shard (about 256 MiB) is in memory at a time. A conversion that was stopped goes on when it
    is started again. Half precision stays, and all else becomes float32. Rows with NaN or infinity
    are kept, logged by file, and marked, so that no run trains on them.

    Args:
      source: the file or folder.
      out: the store's directory.
      site: what to call the site in the store. Where a column or tensor has that name, it is the
        one that is taken.
      context_length: how many rows of a plain file make one text; None stands for 1. A cache of
        SAELens says it itself.
      site_of_hook: a function from the name of SAELens' hook to the name of the site.
      progress: a function that wraps the list of shards, such as `tqdm.tqdm`.

    Returns:
      The store.

    Raises UserError, which names the file, for what is cut off, of another width or not numbers.
    """
    source = paths.local(source)
    with explained(source):
        if _is_cache(source):
            found = _open_cache(source, site, site_of_hook)
        else:
            found = _open_plain(source, site, context_length or 1)
    writer = StoreWriter.create_or_resume(
        out,
        sites={name: parts[0].width for name, parts in found.sites.items()},
        num_sequences=found.rows // found.context_length,
        context_length=found.context_length,
        dtype=found.dtype,
        tokens=found.tokens,
        provenance={"converted_from": str(source.absolute())},
    )
    for shard in progress(writer.missing_shards()):
        first, stop = (
            n * found.context_length for n in (shard.sequences.start, shard.sequences.stop)
        )
        values = {name: _read_rows(parts, first, stop) for name, parts in found.sites.items()}
        writer.write_shard(shard.index, values)
    writer.finish()
    return Store.open(out)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A matrix (rows, width) in one file."""

    file: pathlib.Path
    rows: int
    width: int
    dtype: str

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the rows from `start` to before `stop`."""
        raise NotImplementedError


class _Npy(_Part):
    def read(self, start, stop):
        return map_npy(self.file)[start:stop]


@dataclasses.dataclass(frozen=True)
class _Safetensors(_Part):
    name: str

    def read(self, start, stop):
        with safetensors.safe_open(self.file, "np") as tensors:
            return tensors.get_slice(self.name)[start:stop]


@dataclasses.dataclass(frozen=True)
class _Arrow(_Part):
    """A column of sequences in an arrow file, which is mapped, so that its numbers are not
    copied.
    """

    name: str
    context_length: int

    def read(self, start, stop):
        first, last = start // self.context_length, -(-stop // self.context_length)
        column = _arrow_table(self.file)[self.name].slice(first, last - first)
        rows = _to_array(column, (-1, self.width), self.file, self.name)
        if len(rows) != (last - first) * self.context_length:
            raise UserError(
                f"{self.file}: sequences of {self.name} are not all of {self.context_length} tokens"
            )
        offset = first * self.context_length
        return rows[start - offset : stop - offset]


@dataclasses.dataclass(frozen=True)
class _Activations:
    """The activations in some files: the parts of each site, in order."""

    sites: dict[str, list[_Part]]
    context_length: int
    tokens: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(part.rows for part in next(iter(self.sites.values())))

    @property
    def dtype(self) -> str:
        """The dtype of the store."""
        dtypes = {part.dtype for parts in self.sites.values() for part in parts}
        return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(DTYPES) else "float32"


def _read_rows(parts: list[_Part], first: int, stop: int) -> np.ndarray:
    """Returns the rows from `first` to before `stop` of the parts, one part after the other."""
    taken, start = [], 0
    for part in parts:
        low, high = max(first - start, 0), min(stop - start, part.rows)
        if low < high:
            try:
                x = part.read(low, high)
            except (ValueError, OSError, safetensors.SafetensorError) as error:
                raise _damaged_error(part.file, error) from None
            if bad := int((~statistics.finite_rows(x)).sum()):
                logging.warning(
                    "%s: %d of rows %d to %d hold NaN or infinity; they are marked, and no run "
                    "trains on them", part.file, bad, low, high - 1,
                )  # fmt: skip
            taken.append(x)
        start += part.rows
    return np.concatenate(taken)


# ------------------------------------------------------------------------------- plain files


def _open_plain(source: pathlib.Path, site: str, context_length: int) -> _Activations:
    """Finds the activations in a plain file or folder."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    files = [file for file in files if file.suffix in (".npy", ".safetensors") and file.is_file()]
    if not files:
        raise UserError(
            f"no activations at {source}: neither .npy or .safetensors files nor a data set that "
            f"SAELens cached ({_STATE_FILE}, {_FEATURES_FILE})"
        )
    parts = []
    for file in files:
        part = _open_npy(file) if file.suffix == ".npy" else _open_safetensors(file, site)
        if part.rows % context_length:
            raise UserError(
                f"{file} has {part.rows} rows, not whole sequences of {context_length}; leave "
                "--context_length out where rows are not tokens of texts"
            )
        if parts and part.width != parts[0].width:
            raise UserError(
                f"{file} is {part.width} wide, but {parts[0].file.name} is {parts[0].width}; the "
                "files of a folder must be of one site"
            )
        parts.append(part)
    return _Activations({site or "activations": parts}, context_length)


def _open_npy(file: pathlib.Path) -> _Part:
    """Returns the matrix in a .npy file."""
    x = map_npy(file)
    return _Npy(file, *_check_matrix(x.shape, x.dtype.name, file))


def _open_safetensors(file: pathlib.Path, site: str) -> _Part:
    """Returns a matrix in a .safetensors file: that called `site`, or the only one."""
    try:
        with safetensors.safe_open(file, "np") as tensors:
            names = list(tensors.keys())
            name = names[0] if len(names) == 1 else site
            if name not in names:
                raise UserError(
                    f"{file} holds {len(names)} tensors ({', '.join(names[:5])}); say which with "
                    "--site"
                )
            header = tensors.get_slice(name)
            shape, dtype = tuple(header.get_shape()), header.get_dtype()
    except (OSError, safetensors.SafetensorError) as error:
        raise _damaged_error(file, error) from None
    dtype = _SAFETENSORS_DTYPES.get(dtype, dtype)
    return _Safetensors(file, *_check_matrix(shape, dtype, file), name)


def _check_matrix(shape: tuple, dtype: str, file) -> tuple[int, int, str]:
    """Returns the rows, width and dtype of a matrix. Raises UserError for anything else."""
    if dtype not in _SAFETENSORS_DTYPES.values():
        raise UserError(f"{file} holds {dtype}, not activations in floating point")
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{file} has shape {shape}; it must be (rows, width)")
    return *shape, dtype


def _damaged_error(file, error) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return UserError(f"{file} cannot be read, it is damaged or cut off: {reason}")


# -------------------------------------------------------------------- SAELens' cached activations


_Count = Annotated[int, msgspec.Meta(ge=1)]


@dataclasses.dataclass(frozen=True)
class _DataFile:
    """A file that state.json names."""

    filename: str


@dataclasses.dataclass(frozen=True)
class _State:
    """What state.json says of a data set."""

    _data_files: Annotated[list[_DataFile], msgspec.Meta(min_length=1)]


@dataclasses.dataclass(frozen=True)
class _Features:
    """What dataset_info.json says of a data set: its columns."""

    features: dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Array2D:
    """What dataset_info.json says of a column of matrices, of one shape each."""

    shape: tuple[_Count, _Count]
    dtype: str


def _is_cache(source: pathlib.Path) -> bool:
    """Whether a folder is a data set that Hugging Face's library saved."""
    return (source / _STATE_FILE).is_file() and (source / _FEATURES_FILE).is_file()


def _open_cache(source: pathlib.Path, site: str, site_of_hook) -> _Activations:
    """Finds the activations in a cache of SAELens."""
    file = source / _FEATURES_FILE
    features = checked(read_json(file), _Features, file).features
    state = checked(read_json(source / _STATE_FILE), _State, source / _STATE_FILE)
    files = [paths.inside(source, entry.filename) for entry in state._data_files]
    hooks = {
        name: checked(feature, _Array2D, f"{file}: {name}")
        for name, feature in features.items()
        if feature.get("_type") == "Array2D"
    }
    if site in hooks:
        hooks = {site: hooks[site]}
    if not hooks:
        raise UserError(f"{source} has no column of activations, but {', '.join(features)}")
    if site and len(hooks) > 1:
        raise UserError(f"{source} has columns {', '.join(hooks)}; --site names one of them")
    lengths = {hook.shape[0] for hook in hooks.values()}
    if len(lengths) > 1:
        raise UserError(f"{source} has columns of different context lengths, {sorted(lengths)}")
    context_length, sites, tokens = lengths.pop(), {}, []
    for file in files:
        table = _arrow_table(file)
        for hook, about in hooks.items():
            width = about.shape[1]
            if _count(table, hook, file) != len(table) * context_length * width:
                raise UserError(f"{file}: {hook} is not rows of {context_length} x {width} numbers")
            rows = len(table) * context_length
            part = _Arrow(file, rows, width, about.dtype, hook, context_length)
            sites.setdefault(site or site_of_hook(hook) or hook, []).append(part)
        if _TOKENS_COLUMN in features:
            if _count(table, _TOKENS_COLUMN, file) != len(table) * context_length:
                raise UserError(f"{file}: {_TOKENS_COLUMN} is not rows of {context_length} numbers")
            ids = _to_array(table[_TOKENS_COLUMN], (-1, context_length), file, _TOKENS_COLUMN)
            tokens.append(ids.astype(np.int32))
    return _Activations(sites, context_length, np.concatenate(tokens) if tokens else None)


def _arrow_table(file: pathlib.Path):
    """Returns the table in an arrow file, which is mapped."""
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError(f'{file} is in the arrow format: pip install "sae-jax[lm]"') from None
    try:
        with pa.memory_map(str(file)) as stream:
            table = pa.ipc.open_stream(stream).read_all()
            table.validate()  # else offsets beyond the file would be read
            return table
    except (OSError, pa.ArrowException) as error:
        raise _damaged_error(file, error) from None


def _count(table, name: str, file) -> int:
    """Returns how many numbers a column of nested lists holds.

    Raises UserError if there is no such column, or if it holds anything else.
    """
    if name not in table.column_names:
        raise UserError(f"{file} has no column {name}")
    arrays = [_flat(chunk) for chunk in table[name].chunks]
    for array in arrays:
        if np.dtype(array.type.to_pandas_dtype()).kind not in "fiu":
            raise UserError(f"{file}: {name} holds {array.type}, not numbers")
    return sum(map(len, arrays))


def _flat(chunk):
    """Returns the numbers in nested lists, which are not copied."""
    values = getattr(chunk, "storage", chunk)  # where the package datasets is loaded as well
    while hasattr(values, "flatten") and hasattr(values.type, "value_type"):
        values = values.flatten()
    return values


def _to_array(column, shape: tuple, file, name: str) -> np.ndarray:
    """Returns a column of nested lists of numbers as an array of `shape`."""
    chunks = []
    for chunk in column.chunks:
        values = _flat(chunk)
        if values.null_count:
            raise UserError(f"{file}: {name} has gaps")
        chunks.append(values.to_numpy())
    try:
        return np.concatenate(chunks).reshape(shape)
    except ValueError:
        raise UserError(f"{file}: {name} is not rows of {shape[1]} numbers") from None
