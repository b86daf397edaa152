"""Reads the files of NumPy, .npy and .npz, which anyone may have written.

Nothing in a file is run, and no more memory is taken than a small multiple of the file's own size,
whatever it says of itself.
"""

import contextlib
import io
import math
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from sae_jax.errors import UserError, on_one_line
from sae_jax.paths import AnyPath

Arrays = dict[str, np.ndarray]

_EXPANSION, _SLACK = 16, 2**20  # times the file's size, and bytes: weights hardly compress
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def map_npy(file: pathlib.Path) -> np.ndarray:
    """Returns the array in an .npy file, which is mapped and not read.

    Raises UserError if the file is missing, damaged or cut off, or holds anything but numbers.
    """
    with _explained(file):
        mapped = np.lib.format.open_memmap(file, mode="r")
        _check(mapped.shape, mapped.dtype)
        return mapped


def read_npz(
    file: AnyPath,
    wanted: Callable[[list[str]], Iterable[str]] = list,
    expansion: int = _EXPANSION,
    slack: int = _SLACK,
) -> Arrays:
    """Returns arrays of a file that np.savez wrote, by name.

    Args:
      file: the file.
      wanted: chooses the arrays to read from the names of all; by default all.
      expansion: to how many times its own size the file may unfold.
      slack: how many bytes more it may unfold to.

    Raises UserError if the file is missing, damaged or cut off, holds anything else than arrays of
    numbers, or would unfold to far more than its own size.
    """
    with open_archive(file, expansion, slack) as (archive, _):
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        return {name: _npy(archive.read(entries[name])) for name in wanted(list(entries))}


@contextlib.contextmanager
def open_archive(
    file: AnyPath, expansion: int = _EXPANSION, slack: int = _SLACK
) -> Iterator[tuple[zipfile.ZipFile, int]]:
    """Gives the zip archive in a file, and to how many bytes its content may unfold.

    Raises UserError if the file is missing or no archive, or would unfold to more than `expansion`
    times its own size and `slack` bytes. Whatever goes wrong in the block is raised as a UserError
    that says that the file is damaged.
    """
    with _explained(file):
        local = isinstance(file, pathlib.Path)
        with zipfile.ZipFile(file if local else io.BytesIO(file.read_bytes())) as archive:
            stored = sum(entry.compress_size for entry in archive.infolist())
            stored = file.stat().st_size if local else stored
            limit = expansion * stored + slack
            size = sum(entry.file_size for entry in archive.infolist())
            if size > limit:
                raise UserError(
                    f"{file} would unfold to {size:,} bytes, which are more than {expansion} "
                    "times its own; it is damaged, or made to fill the memory"
                )
            yield archive, limit


@contextlib.contextmanager
def _explained(file: AnyPath):
    """Raises whatever goes wrong with a file as a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"no {file.name} in {file.parent}") from None
    except Exception as error:  # a header or a name that says nonsense can raise any
        reason = f"{type(error).__name__}: {on_one_line(error)}"
        raise UserError(f"{file} cannot be read, it is damaged or cut off: {reason}") from None


def _npy(data: bytes) -> np.ndarray:
    """Returns the array in the bytes of an .npy file."""
    opened = io.BytesIO(data)
    version = np.lib.format.read_magic(opened)
    if version not in _HEADERS:
        raise ValueError(f"an array of the format's version {version}")
    shape, fortran, dtype = _HEADERS[version](opened)
    _check(shape, dtype)
    if math.prod(shape) * dtype.itemsize != len(data) - opened.tell():
        raise ValueError(f"an array of shape {shape} that {len(data)} bytes are to hold")
    flat = np.frombuffer(data, dtype, offset=opened.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def _check(shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.hasobject or dtype.fields or min(shape, default=0) < 0:
        raise ValueError(f"an array of type {dtype} and shape {shape}")
