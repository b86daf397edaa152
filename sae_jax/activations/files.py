"""Where a store's bytes live: one directory, local or in an object store, and its arrays.

Everything else in this room names files relative to the store and leaves paths to this module.
"""

import contextlib
import pathlib
import shutil

import tensorstore as ts

from sae_jax import paths

_CRC_BYTES = 4
_INDEX_BYTES_PER_CHUNK = 16  # offset and length, uint64 each


class Folder:
    """A directory as bytes by name. Writes are atomic: a temporary name, then a rename; an object
    store's are so by themselves."""

    def __init__(self, path):
        self._where = paths.path(path).absolute()
        self.path = str(self._where)
        self.remote = paths.is_remote(self.path)
        self._store = ts.KvStore.open(self.kvstore("")).result()

    def kvstore(self, name: str) -> dict:
        """TensorStore's spec of the file or folder `name` inside this one."""
        if self.remote:
            return paths.kvstore(self._where, name)
        return {"driver": "file", "path": f"{self.path}/{name}"}

    def read(self, name: str) -> bytes | None:
        """The bytes of `name`; None where there is no such file."""
        with self._explained(name):
            found = self._store.read(name).result()
        return found.value if found.state == "value" else None

    def write(self, name: str, data: bytes) -> None:
        with self._explained(name):
            self._store.write(name, data).result()

    def delete_folder(self, name: str) -> None:
        if self.remote:
            (self._where / name).rmtree()
        else:
            shutil.rmtree(f"{self.path}/{name}")  # with the locks that a killed writer left

    def sizes(self, folder: str) -> dict[str, int | None]:
        """Size in bytes of every file under `folder`. Remote sizes are None: an object there is
        whole or absent, and asking costs a request each."""
        if self.remote:
            return {f"{folder}/{name}": None for name in (self._where / folder).files()}
        root = pathlib.Path(self.path)
        files = (file for file in (root / folder).rglob("*") if file.is_file())
        return {file.relative_to(root).as_posix(): file.stat().st_size for file in files}

    def _explained(self, name: str):
        where = f"{self.path}/{name}"
        return paths.explained(where) if self.remote else contextlib.nullcontext()


class Array:
    """One uncompressed zarr3 array with shards: its place, layout and what its files weigh.

    Rows are axis 0. A chunk is the unit of reading, a shard is one file of whole chunks.
    `fill` must be a value that the data never holds (NaN for activations), so that a chunk
    which was never written cannot pass for data: TensorStore reads it as `fill`, silently.
    """

    def __init__(self, name, shape, dtype, chunk_rows, shard_chunks, fill):
        self.name = name
        self.shape = tuple(shape)
        self.dtype = dtype
        self.chunk_rows = chunk_rows
        self.shard_chunks = shard_chunks
        self.fill = fill

    def open(self, folder: Folder, create: bool = False, context=None) -> ts.TensorStore:
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
        return ts.open(spec, open=True, create=create, context=context).result()

    def file_sizes(self) -> dict[str, int]:
        """Name (inside the store) and size in bytes of every shard file of the whole array."""
        chunk_bytes = self.chunk_rows * ts.dtype(self.dtype).numpy_dtype.itemsize
        for extent in self.shape[1:]:
            chunk_bytes *= extent
        chunks = -(-self.shape[0] // self.chunk_rows)
        index_bytes = _INDEX_BYTES_PER_CHUNK * self.shard_chunks + _CRC_BYTES
        sizes = {}
        for shard, first in enumerate(range(0, chunks, self.shard_chunks)):
            present = min(self.shard_chunks, chunks - first)
            key = "/".join(["c", str(shard), *["0"] * (len(self.shape) - 1)])
            sizes[f"{self.name}/{key}"] = present * chunk_bytes + index_bytes
        return sizes
