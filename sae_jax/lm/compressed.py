"""Opens files that may be compressed, which their suffix says: .gz, .bz2, .xz or .zst."""

import bz2
import gzip
import io
import lzma
import pathlib
import zlib
from typing import BinaryIO

from sae_jax.errors import UserError

try:
    import zstandard
except ImportError:
    zstandard = None

DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""The errors that reading a damaged or truncated file raises."""
_BLOCK_BYTES = 1 << 20


def suffix(path: pathlib.Path) -> str:
    """Returns the suffix of the text in a file in small letters, such as .jsonl for x.JSONL.gz."""
    inner = path.suffix.lower() in _OPENERS
    return (pathlib.Path(path.stem) if inner else path).suffix.lower()


def open_bytes(path: pathlib.Path) -> BinaryIO:
    """Opens a file for reading what it holds when it is not compressed.

    Raises UserError for a .zst file if the package zstandard is not installed.
    """
    return _OPENERS.get(path.suffix.lower(), open)(path, "rb")


def _open_zstandard(path: pathlib.Path, mode: str) -> BinaryIO:
    del mode  # as the others have it
    if zstandard is None:
        raise UserError(f"{path} needs the zstandard package: pip install 'sae-jax[lm]'")
    return io.BufferedReader(_ZstandardReader(path), _BLOCK_BYTES)


class _ZstandardReader(io.RawIOBase):
    """Reads all frames of a file, and raises EOFError where it is truncated.

    The package's own reader takes a truncated file for a whole one.
    """

    def __init__(self, path: pathlib.Path):
        self._file = path.open("rb")
        self._frame, self._compressed, self._text = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._text:
            self._compressed = self._compressed or self._file.read(_BLOCK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a zstandard frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self._text = self._frame.decompress(self._compressed)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstandard}
