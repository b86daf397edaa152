"""Checkpoints in an object store.

Orbax 0.12 writes gs:// but not s3:// (google/orbax, pull request 2739). So both are written here,
with JAX's own writer of sharded arrays.

    CHECKPOINTS/STEP/NAME/...        a zarr3 array for each leaf of the state: parameters/w_enc
    CHECKPOINTS/STEP/complete.json   the arrays, how many files they have, and what is saved with
                                     them; written last

Object stores cannot rename. So a folder is a checkpoint if it has its complete.json and all its
files. What a killed process left has none, and is removed by the next process.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental.array_serialization import serialization

from sae_jax import buckets, paths
from sae_jax.errors import UserError
from sae_jax.json_files import checked, parse_json
from sae_jax.paths import ObjectPath

_CHUNK_BYTES = 1 << 30  # of one object: S3 takes 5 GB in a request
_PATIENCE = 1800  # seconds that processes wait for the slowest of them to upload


@dataclasses.dataclass(frozen=True)
class _Complete:
    """The content of complete.json.

    Attributes:
      arrays: the shape and type of each array by its path.
      files: how many files they have.
      about: what was saved with them.
    """

    arrays: dict[str, tuple[list[int], str]]
    files: int
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


class ObjectCheckpointer:
    """Writes and reads the checkpoints in a folder of an object store.

    Trees are dicts of arrays, nested to any depth. Where there are several processes, each writes
    and reads its own shards, and process 0 writes complete.json. Failures of TensorStore are raised
    as ValueError.

    Attributes:
      steps: the steps that there are checkpoints of, in ascending order.
    """

    def __init__(self, directory: ObjectPath, keep: int | None, always: int | None = None):
        """Opens `directory`.

        Of its checkpoints the `keep` latest stay, and besides them that of the step `always`. With
        keep=None it only reads, and removes nothing.
        """
        self._directory = directory
        self._keep, self._always = keep, always
        self._manager = serialization.GlobalAsyncCheckpointManager(timeout_secs=_PATIENCE)
        self._saving: int | None = None
        self._about: dict = {}  # of the checkpoint that is being saved
        files = directory.files()
        self.steps = whole_steps(directory, files)
        if keep and jax.process_index() == 0:
            folders = {file.partition("/")[0] for file in files}
            for name in folders.difference(map(str, self.steps)):
                (directory / name).rmtree()

    def save(self, step: int, tree: dict, about: dict | None = None) -> None:
        """Copies the tree and returns; it is written while the next steps run.

        `about` is what to save with it, as values that JSON can hold. Raises whatever kept the
        previous checkpoint from being written.
        """
        self.wait()
        arrays = _named(tree)
        metadata = {name: _metadata(array) for name, array in arrays.items()}
        specs = [
            self._spec(step, name) | {"store_data_equal_to_fill_value": True, "metadata": layout}
            for name, layout in metadata.items()
        ]
        self._about = about or {}
        self._manager.serialize(
            list(arrays.values()), specs, on_commit_callback=lambda: self._commit(step, metadata)
        )
        self._saving = step

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is whole.

        Raises whatever kept it from being written.
        """
        saving, self._saving = self._saving, None
        self._manager.wait_until_finished()
        if saving is not None:
            self.steps = self._kept(saving)

    def load(self, step: int, like: dict) -> dict:
        """Returns the arrays of a checkpoint that the tree `like` names, on its shardings."""
        wanted = _named(like)
        arrays = self._manager.deserialize(
            [leaf.sharding for leaf in wanted.values()],
            [self._spec(step, name) for name in wanted],
        )
        return jax.tree.unflatten(jax.tree.structure(like), arrays)

    load_part = load

    def about(self, step: int) -> dict:
        """Returns what was saved with a checkpoint; of an earlier version, nothing."""
        return _read_complete(self._directory, step).about

    def shapes(self, step: int) -> dict:
        """Returns the tree of a checkpoint, with a jax.ShapeDtypeStruct for each array."""
        tree: dict = {}
        for name, (shape, dtype) in _read_complete(self._directory, step).arrays.items():
            *folders, leaf = name.split("/")
            branch = tree
            for folder in folders:
                branch = branch.setdefault(folder, {})
            branch[leaf] = jax.ShapeDtypeStruct(shape, np.dtype(dtype))
        return tree

    def close(self) -> None:
        """Waits until the checkpoint that is being written is whole."""
        self.wait()

    def _commit(self, step: int, metadata: dict[str, dict]) -> None:
        """Makes what was written a checkpoint; called on process 0 when all have written.

        Raises UserError if another process removed files of it meanwhile.
        """
        folder = self._directory / str(step)
        files = {file for name, about in metadata.items() for file in _files(name, about)}
        if missing := files.difference(folder.files()):
            raise UserError(
                f"{folder}/{min(missing)} was removed while the checkpoint was written; does "
                "another process train this run?"
            )
        arrays = {name: [about["shape"], about["data_type"]] for name, about in metadata.items()}
        complete = {"arrays": arrays, "files": len(files), "about": self._about}
        paths.save_json(complete, folder / "complete.json")
        for old in set(self.steps).difference(self._kept(step)):
            (self._directory / str(old) / "complete.json").unlink()
            (self._directory / str(old)).rmtree()

    def _kept(self, saved: int) -> list[int]:
        """Returns the steps whose checkpoints stay when `saved` has been saved."""
        return latest_besides([*self.steps, saved], self._keep, self._always)

    def _spec(self, step: int, name: str) -> dict:
        return {
            "driver": "zarr3",
            "kvstore": paths.kvstore(self._directory, f"{step}/{name}/"),
            # All is read or written once.
            "context": {"cache_pool": {"total_bytes_limit": 0}} | buckets.REQUESTS,
        }


def whole_steps(directory: ObjectPath, files: Sequence[str]) -> list[int]:
    """Returns the steps of the checkpoints in a folder that have all their files, ascending.

    `files` are the files in it.
    """
    sizes = collections.Counter(file.partition("/")[0] for file in files)
    return sorted(int(name) for name in sizes if _is_whole(directory, name, sizes[name]))


def _is_whole(directory: ObjectPath, name: str, files: int) -> bool:
    """Whether the folder `name`, which has so many files, is a checkpoint."""
    try:
        complete = _read_complete(directory, name)
    except FileNotFoundError:
        return False
    if files - 1 < complete.files:
        logging.warning("%s/%s lacks files and is no checkpoint any more", directory, name)
        return False
    return True


def _read_complete(directory: ObjectPath, step: int | str) -> _Complete:
    file = directory / str(step) / "complete.json"
    try:
        return checked(parse_json(file.read_bytes(), file), _Complete, file)
    except UserError as error:
        raise UserError(f"{error}; remove {file.parent} to go on without it") from None


def latest_besides(steps: Sequence[int], keep: int, always: int | None) -> list[int]:
    """Returns the `keep` latest steps in the order of `steps` and, besides, the step `always`."""
    latest = [step for step in steps if step != always][-keep:]
    return [step for step in steps if step == always or step in latest]


def _named(tree: dict) -> dict[str, jax.Array]:
    """Returns the arrays of a tree by their paths, such as parameters/w_enc."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _files(name: str, metadata: dict) -> list[str]:
    """Returns the names of the files that an array consists of."""
    chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    grid = [size // part for size, part in zip(metadata["shape"], chunk, strict=True)]
    chunks = ["/".join([name, "c", *map(str, place)]) for place in np.ndindex(*grid)]
    return [f"{name}/zarr.json", *chunks]


def _metadata(array: jax.Array) -> dict:
    """Returns the zarr3 metadata of an array.

    No two shards share a chunk, a chunk fits in one request, and each has a checksum.
    """
    chunk = list(array.sharding.shard_shape(array.shape))
    if chunk:
        pieces = -(-math.prod(chunk) * array.dtype.itemsize // _CHUNK_BYTES)
        chunk[0] = next(n for n in range(max(1, chunk[0] // max(1, pieces)), 0, -1)
                        if chunk[0] % n == 0)  # fmt: skip
    return {
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ],
    }
