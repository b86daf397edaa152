"""Where runs, sweeps and stores are: a local path, or s3://BUCKET/KEY or gs://BUCKET/KEY.

`path` turns a user's text into a `pathlib.Path`, or into an `ObjectPath`, which has the methods of
one that we use. Object stores have no rename, no append and no directories. So files are written
whole by `write` and `create` here, which are atomic in both kinds of place.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import posixpath
import re
import socket

import tensorstore as ts

from sae_jax.buckets import DRIVERS, key_range, make_spec, open_bucket
from sae_jax.errors import UserError, choose
from sae_jax.place_errors import explained


def is_remote(text) -> bool:
    """Whether `text` names something in an object store."""
    return "://" in str(text)


def path(text) -> "AnyPath":
    """Returns the path that a user's text names; `~` is the user's home.

    Raises UserError for a scheme other than s3:// and gs://, for a slip such as s3:/BUCKET, and
    where the bucket is missing.
    """
    if isinstance(text, ObjectPath):
        return text
    if slip := re.match("(s3|gs)(:/?|//)(?!/)", str(text)):
        raise UserError(f"{text}: write {slip[1]}://{str(text)[slip.end() :]}")
    if isinstance(text, pathlib.Path) or not is_remote(text):
        return _expanded(text)
    scheme, _, rest = text.partition("://")
    choose(scheme, DRIVERS, f"the scheme of {text}")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise UserError(f"{text} names no bucket; write {scheme}://BUCKET/PATH")
    return ObjectPath(scheme, bucket, posixpath.normpath(f"/{key}").lstrip("/"))


def local(text) -> pathlib.Path:
    """Returns the path of something that must be on this machine.

    Raises UserError for another place.
    """
    if is_remote(text):
        raise UserError(f"{text} is not a path of this machine, and here it must be one")
    return _expanded(text)


def inside(folder: "AnyPath", name: str) -> "AnyPath":
    """Returns the path of `name` in `folder`, where `name` was read from a file.

    `name` may have parts, as in "a/b". It stands for a path below the folder and nothing else.

    Raises UserError if it is no text, is empty or absolute, has the part "." or "..", or has a
    character that no file's name has.
    """
    parts = name.split("/") if isinstance(name, str) else []
    bad = not parts or any(part in ("", ".", "..") for part in parts) or "\0" in name
    if bad or not isinstance(folder, ObjectPath) and "\\" in name:
        raise UserError(f"{name!r} is not the name of something in {folder}")
    for part in parts:
        folder = folder / part
    return folder


def _expanded(text) -> pathlib.Path:
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:  # ~NOBODY
        raise UserError(f"{text} begins with the home of a user that is not here") from None


@dataclasses.dataclass(frozen=True)
class ObjectPath:
    """A file or folder of an object store, with the methods of pathlib.Path.

    A file exists whole or not at all, and whoever asks after a write sees it. A folder exists as
    long as a file is in it. The methods raise UserError, in one line, where the bucket is missing,
    refuses, or cannot be reached.

    Attributes:
      scheme: "s3" or "gs".
      bucket: the bucket's name.
      key: the key, without a slash at either end; "" for the bucket itself.
    """

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        """Returns SCHEME://BUCKET/KEY."""
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> "ObjectPath":
        """Returns the path of `name` in this folder."""
        return dataclasses.replace(self, key=f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        """The last part of the key."""
        return posixpath.basename(self.key)

    @property
    def stem(self) -> str:
        """The last part of the key without its suffix."""
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        """The suffix of the last part of the key, with its dot."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> "ObjectPath":
        """The folder that this is in."""
        return dataclasses.replace(self, key=posixpath.dirname(self.key))

    def with_name(self, name: str) -> "ObjectPath":
        """Returns the path of `name` in the same folder."""
        return self.parent / name

    def absolute(self) -> "ObjectPath":
        """Returns this path, which is absolute."""
        return self

    def exists(self) -> bool:
        """Whether it is a file or a folder."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self.key in self._list(self.key, self.key + "\0")

    def is_dir(self) -> bool:
        """Whether it is a folder with files."""
        return bool(self.files())

    def files(self, after: str = "") -> list[str]:
        """Returns the names, relative to this folder, of all files in it and below.

        With `after`, the name of a folder in it, only those that follow that folder's in order: a
        store lists a thousand names at a request, and a folder may have many more.
        """
        prefix = f"{self.key}/" if self.key else ""
        start = f"{prefix}{after}0" if after else prefix  # "0" follows "/"
        end = f"{self.key}0" if self.key else ""
        return [key.removeprefix(prefix) for key in self._list(start, end)]

    def iterdir(self):
        """Yields the paths of the files and folders in this folder."""
        for name in sorted({file.partition("/")[0] for file in self.files()}):
            yield self / name

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing, because files make their folders."""

    def read_bytes(self) -> bytes:
        """Returns the content of the file."""
        return self.read()[0]

    def read_text(self, encoding: str = "utf-8") -> str:
        """Returns the content of the file as text."""
        return self.read_bytes().decode(encoding)

    def read(self) -> tuple[bytes, bytes]:
        """Returns the content of the file, and its generation, for `write_if`.

        Raises FileNotFoundError.
        """
        with explained(self):
            found = self._bucket().read(self.key).result()
        if found.state != "value":
            raise FileNotFoundError(2, "no such object", str(self))
        return found.value, found.stamp.generation

    def read_part(
        self, part: slice, unless: bytes | None = None
    ) -> tuple[bytes | None, bytes | None]:
        """Returns some bytes of the file, and its generation, in one request.

        Args:
          part: which bytes, `slice(first, None)` or `slice(-count, None)`.
          unless: a generation that need not be read again.

        Returns:
          (None, unless) where the file still has that generation; (None, None) where the file is
          too short for the part, or is not there.
        """
        try:
            found = self._bucket().read(self.key, byte_range=part, if_not_equal=unless).result()
        except ValueError as error:
            if "OUT_OF_RANGE" in str(error):
                return None, None
            with explained(self):
                raise
        if found.state == "unspecified":
            return None, unless
        if found.state == "missing":
            return None, None
        return found.value, found.stamp.generation

    def write_bytes(self, data: bytes) -> None:
        """Writes the file."""
        with explained(self):
            self._bucket().write(self.key, data).result()

    def write_if(self, generation: bytes | None, data: bytes) -> bytes | None:
        """Writes the file if nobody has written it since.

        Args:
          generation: the generation that the file must still have; None where there must be no
            file.
          data: the content.

        Returns:
          The new generation, or None where someone else was faster.
        """
        with explained(self):
            before = _absent() if generation is None else generation
            after = self._bucket().write(self.key, data, if_equal=before).result().generation
        if after:
            return after
        with contextlib.suppress(FileNotFoundError):
            there, after = self.read()  # a request that was sent twice loses to itself
            if there == data:
                return after
        return None

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the file; it is no error if there is none."""
        del missing_ok  # an object store does not say
        with explained(self):
            self._bucket().write(self.key, None).result()

    def rmtree(self) -> None:
        """Removes the folder and all in it."""
        with explained(self):
            self._bucket().delete_range(key_range(f"{self.key}/", f"{self.key}0")).result()

    def _list(self, start: str, end: str) -> list[str]:
        with explained(self):
            return [key.decode() for key in self._bucket().list(key_range(start, end)).result()]

    def _bucket(self):
        return open_bucket(self.scheme, self.bucket)


AnyPath = pathlib.Path | ObjectPath


def kvstore(folder: ObjectPath, name: str = "") -> dict:
    """Returns TensorStore's spec of a folder, or of what is called `name` in it.

    Raises UserError, before anything is tried at length, where the bucket cannot be used.
    """
    open_bucket(folder.scheme, folder.bucket)
    prefix = f"{folder.key}/" if folder.key else ""
    return make_spec(folder.scheme, folder.bucket) | {"path": prefix + name}


def write(file, data: str | bytes, by: str = "") -> None:
    """Writes a file whole or not at all, so that a reader never sees half of it.

    Args:
      file: the path.
      data: the content; text is written as UTF-8.
      by: the writer's own name, where several may write the file at once.

    Raises UserError, which says why, if it cannot be written.
    """
    data = data.encode() if isinstance(data, str) else data
    if isinstance(file, ObjectPath):
        file.write_bytes(data)
        return
    temporary = file.with_name(f"{file.name}{by}.tmp")
    with explained(file):
        temporary.write_bytes(data)
        temporary.replace(file)


def this_process() -> str:
    """Returns a name of this process, for `write` and `create`, that no other process has."""
    return f".{socket.gethostname()}.{os.getpid()}"


def create(file, data: str, by: str) -> bool:
    """Writes a file whole unless it exists, and returns whether this writer wrote it.

    Args:
      file: the path.
      data: the content.
      by: the writer's own name.

    Raises UserError, which says why, if it cannot be written.
    """
    if isinstance(file, ObjectPath):
        return file.write_if(None, data.encode()) is not None
    temporary = file.with_name(f"{file.name}{by}.tmp")
    with explained(file):
        temporary.write_text(data, encoding="utf-8")
        try:
            os.link(temporary, file)  # unlike a rename, refuses to replace what is there
        except FileExistsError:
            return False
        except OSError:  # a disk without hard links
            return _create_without_links(file, data)
        finally:
            temporary.unlink()
    return True


def _create_without_links(file: pathlib.Path, data: str) -> bool:
    """Does what `create` does, but a reader may see the file when it is half written."""
    try:
        with file.open("x") as opened:
            opened.write(data)
    except FileExistsError:
        return False
    return True


def move(folder: AnyPath, to: AnyPath) -> None:
    """Moves a folder. In an object store its files are copied, and then removed.

    Raises UserError, which says why, if it cannot be moved.
    """
    if isinstance(folder, ObjectPath):
        names = folder.files()
        for name in names:
            (to / name).write_bytes((folder / name).read_bytes())
        for name in names:
            if "/" not in name:  # first what tells of the rest: half a folder must not look whole
                (folder / name).unlink()
        folder.rmtree()
        return
    with explained(folder):
        to.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(to)


def save_json(values: dict, file) -> None:
    """Writes values as JSON, whole or not at all."""
    write(file, as_json(values))


def as_json(values, indent: int | None = 1) -> str:
    """Returns values as the text of a JSON file, or with indent=None as one line.

    NaN and infinity, which JSON does not have, become null.
    """
    return json.dumps(_without_nonfinite(values), indent=indent, allow_nan=False) + "\n"


def _without_nonfinite(values):
    if isinstance(values, dict):
        return {name: _without_nonfinite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_without_nonfinite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


@functools.cache
def _absent() -> bytes:
    """Returns TensorStore's generation of a file that does not exist."""
    return ts.KvStore.open("memory://").result().read("none").result().stamp.generation
