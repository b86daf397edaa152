"""Reads tensors from the files of PyTorch (.pt), which anyone may have written.

Nothing in a file is run, and no more memory is taken than a small multiple of the file's own size,
whatever it says of itself. PyTorch is not needed.
"""

import collections
import contextlib
import io
import math
import pathlib
import pickle
from collections.abc import Callable

import ml_dtypes
import numpy as np

from sae_jax.errors import UserError, on_one_line
from sae_jax.numpy_files import open_archive

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before version 1.6
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_DTYPES = ("float64", "float32", "float16", "bfloat16")


def read_torch(file: pathlib.Path) -> dict:
    """Returns the dictionary in a file that torch.save wrote, with its tensors as arrays.

    Raises UserError if the file is missing, damaged or cut off, was written by a PyTorch before
    1.6, holds anything else than dense tensors, numbers and text, or would unfold to far more than
    its own size.
    """
    with contextlib.suppress(OSError), file.open("rb") as opened:
        if opened.read(len(_LEGACY)) == _LEGACY:
            raise UserError(
                f"{file} is of PyTorch before 1.6; torch.load and torch.save of a later one make "
                "it readable"
            )
    with open_archive(file) as (archive, limit):
        names = {entry.filename for entry in archive.infolist()}
        root = next((name[:-9] for name in names if name.endswith("/data.pkl")), None)
        if root is None:
            raise ValueError("it has no data.pkl")
        if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        reader = _TensorReader(
            archive.read(f"{root}/data.pkl"), lambda key: archive.read(f"{root}/data/{key}"), limit
        )
        try:
            content = reader.load()
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{file} is not a file of tensors that is safe to read ({on_one_line(error)}); "
                "nothing in it was run"
            ) from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


class _TensorReader(pickle._Unpickler):
    """Reads the pickle of torch.save, in which tensors are calls that rebuild them from storages.

    It is Python's unpickler that is written in Python: the one in C can be made to allocate any
    amount of memory. No name in the pickle is looked up: those that tensors need have a stand-in
    here, and all others are refused.
    """

    def __init__(self, data: bytes, read_storage: Callable[[str], bytes], limit: int):
        super().__init__(io.BytesIO(data))
        self._read_storage, self._left = read_storage, limit
        self._storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str):
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return name
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): tuple,
            ("torch", "device"): lambda *place: ":".join(map(str, place)),
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no dense tensor")
        return known[module, name]

    def persistent_load(self, pid) -> np.ndarray:
        _, dtype, key, _, _ = pid
        if key not in self._storages:
            self._storages[key] = np.frombuffer(self._read_storage(key), dtype)
        return self._storages[key]

    def _tensor(self, storage: np.ndarray, offset: int, size, stride, *_) -> np.ndarray:
        """Returns a copy of the part of a storage that a tensor is."""
        numbers = [offset, *size, *stride]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
        if not whole or len(size) != len(stride):
            raise ValueError(f"a tensor of size {size} and stride {stride} at {offset}")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) and last >= len(storage):
            raise ValueError(f"a tensor of size {size} in a storage of {len(storage)} numbers")
        if len(size) > 8:
            raise ValueError(f"a tensor of {len(size)} dimensions")
        self._left -= math.prod(size) * storage.itemsize
        if self._left < 0:  # an expanded one, whose numbers are not in the file
            raise pickle.UnpicklingError(f"a tensor of size {tuple(size)} is larger than the file")
        if not math.prod(size):
            return np.zeros(tuple(size), storage.dtype)
        steps = [step * storage.itemsize for step in stride]
        return np.array(np.lib.stride_tricks.as_strided(storage[offset:], tuple(size), steps))
