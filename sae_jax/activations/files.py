"""Where the bytes of a store lie: one directory, local or in an object store, and its arrays.

The other modules of this package name files relative to the store and leave paths to this one.
"""

import contextlib
import math
import pathlib
import shutil
import textwrap
from collections.abc import Iterator

import tensorstore as ts

from sae_jax import buckets, paths
from sae_jax.errors import UserError
from sae_jax.place_errors import explained, explanation

_CRC_BYTES = 4
_INDEX_BYTES_PER_CHUNK = 16  # offset and length, uint64 each


class Folder:
    """A directory, as bytes by name.

    Writes are atomic: they go to a temporary name, which is then renamed. In an object store writes
    are so by themselves.

    Attributes:
      path: the directory's absolute path or URL.
      remote: whether it is in an object store.
    """

    def __init__(self, path):
        """Opens a directory, which need not exist yet."""
        self._where = paths.path(path).absolute()
        self.remote = paths.is_remote(self._where)
        if not self.remote and ".." in self._where.parts:  # which TensorStore refuses
            self._where = self._where.resolve()
        self.path = str(self._where)
        context = ts.Context(buckets.REQUESTS)
        self._store = ts.KvStore.open(self.kvstore(""), context=context).result()

    def kvstore(self, name: str) -> dict:
        """Returns TensorStore's spec of the file or folder `name` in this one."""
        if self.remote:
            return paths.kvstore(self._where, name)
        folder = self.path.strip("/")  # TensorStore refuses two slashes at the beginning
        return {"driver": "file", "path": f"/{folder}/{name}" if folder else f"/{name}"}

    def read(self, name: str) -> bytes | None:
        """Returns the bytes of `name`; None where there is no such file."""
        with explained(f"{self.path}/{name}"):
            found = self._store.read(name).result()
        return found.value if found.state == "value" else None

    def write(self, name: str, data: bytes) -> None:
        """Writes the file `name`, whole or not at all."""
        with explained(f"{self.path}/{name}"):
            self._store.write(name, data).result()

    def delete_folder(self, name: str) -> None:
        """Removes the folder `name` and all in it, if it is there."""
        if self.remote:
            (self._where / name).rmtree()
            return
        with explained(f"{self.path}/{name}"), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(f"{self.path}/{name}")  # with the locks that a killed writer left

    def sizes(self, folder: str) -> dict[str, int | None]:
        """Returns the size in bytes of every file under `folder`, by name.

        In an object store sizes are None: an object there is whole or absent, and asking costs a
        request each.
        """
        if self.remote:
            return {f"{folder}/{name}": None for name in (self._where / folder).files()}
        root = pathlib.Path(self.path)
        with explained(root / folder):
            files = (file for file in (root / folder).rglob("*") if file.is_file())
            return {file.relative_to(root).as_posix(): file.stat().st_size for file in files}

    @contextlib.contextmanager
    def damage_named(self, name: str):
        """Raises what TensorStore raises within as a UserError that names the file `name`."""
        try:
            yield
        except ValueError as error:  # TensorStore has no class of its own
            where = f"{self.path}/{name}"
            reason = textwrap.shorten(str(error), 300)
            damaged = f"{where} cannot be read: {reason}; if it is damaged, make the store again"
            raise UserError(explanation(where, error) or damaged) from error


class Array:
    """An uncompressed zarr3 array with shards: its place, layout and file sizes.

    Rows are axis 0. A chunk is the unit of reading, and a shard is one file of whole chunks.

    Attributes:
      name: the name of its folder in the store.
      shape: its shape.
      dtype: the name of its dtype.
      chunk_rows: rows of a chunk.
      shard_chunks: chunks of a shard.
      fill: a value that the data never holds (NaN for activations). TensorStore silently reads a
        chunk that was never written as `fill`, which so cannot pass for data.
    """

    def __init__(self, name, shape, dtype, chunk_rows, shard_chunks, fill):
        """Describes an array; no file is touched."""
        self.name = name
        self.shape = tuple(shape)
        self.dtype = dtype
        self.chunk_rows = chunk_rows
        self.shard_chunks = shard_chunks
        self.fill = fill

    def open(self, folder: Folder, create: bool = False, context=None) -> ts.TensorStore:
        """Opens the array in a store's folder.

        With `create`, it is created if it does not exist.
        """
        rest = list(self.shape[1:])
        endian = {} if self.dtype == "uint8" else {"configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": [self.chunk_rows, *rest],
            "codecs": [{"name": "bytes", **endian}],
            "index_codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
        }
        shard_shape = [self.chunk_rows * self.shard_chunks, *rest]
        spec = {
            "driver": "zarr3",
            "kvstore": folder.kvstore(f"{self.name}/"),
            "recheck_cached_data": "open",
            "store_data_equal_to_fill_value": True,  # so that a file's size is known
            "metadata": {
                "shape": list(self.shape),
                "data_type": self.dtype,
                "fill_value": self.fill,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            },
        }
        context = context or ts.Context(buckets.REQUESTS)
        return ts.open(spec, open=True, create=create, context=context).result()

    def file_sizes(self) -> Iterator[tuple[str, int]]:
        """Yields the name in the store, and the size in bytes, of every file of the whole array.

        They are those of its shards. One at a time: a damaged shape may promise any number of them.
        """
        for shard, first in enumerate(range(0, self._chunks, self.shard_chunks)):
            present = min(self.shard_chunks, self._chunks - first)
            key = "/".join(["c", str(shard), *["0"] * (len(self.shape) - 1)])
            yield f"{self.name}/{key}", present * self._chunk_bytes + self._index_bytes

    @property
    def num_bytes(self) -> int:
        """The size in bytes of all files of the array but its zarr.json."""
        shards = -(-self._chunks // self.shard_chunks)
        return self._chunks * self._chunk_bytes + shards * self._index_bytes

    @property
    def _chunks(self) -> int:
        return -(-self.shape[0] // self.chunk_rows)

    @property
    def _chunk_bytes(self) -> int:
        itemsize = ts.dtype(self.dtype).numpy_dtype.itemsize
        return math.prod((self.chunk_rows, *self.shape[1:])) * itemsize

    @property
    def _index_bytes(self) -> int:
        return _INDEX_BYTES_PER_CHUNK * self.shard_chunks + _CRC_BYTES
