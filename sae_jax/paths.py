"""Where runs, sweeps and stores are: a local path, or s3://BUCKET/KEY or gs://BUCKET/KEY.

`path` makes of a user's text a `pathlib.Path`, or an `ObjectPath`, which has what we use of one.
Object stores have no rename, no append and no directories, so files are written whole by `write`
and `create` here, which are atomic in both worlds.

All of it goes through TensorStore, which reads the arrays too: one client, one set of credentials,
no package besides. (etils.epath reaches S3 through s3fs, which caches listings, so that a worker
does not see another's files; and an epath.Path cannot be created exclusively.) Credentials are the
usual: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws, or the instance's role;
AWS_REGION; AWS_ENDPOINT_URL for another server that speaks S3; GOOGLE_APPLICATION_CREDENTIALS,
or gcloud's, or the instance's.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import posixpath
import textwrap

import tensorstore as ts

from sae_jax.errors import UserError, choose

_DRIVERS = {"s3": "s3", "gs": "gcs"}
_FIRST_LOOK = {"max_retries": 3, "initial_delay": "200ms", "max_delay": "1s"}


def is_remote(text) -> bool:
    """Whether `text` names something in an object store."""
    return "://" in str(text)


def path(text) -> "AnyPath":
    """UserError for another scheme than s3:// and gs://, or without a bucket."""
    if isinstance(text, ObjectPath | pathlib.Path):
        return text
    if not is_remote(text):
        return pathlib.Path(text)
    scheme, _, rest = text.partition("://")
    choose(scheme, _DRIVERS, f"the scheme of {text}")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise UserError(f"{text} names no bucket; write {scheme}://BUCKET/PATH")
    return ObjectPath(scheme, bucket, posixpath.normpath(f"/{key}").lstrip("/"))


def local(text) -> pathlib.Path:
    """Of what is made on this machine only. UserError for another place."""
    if is_remote(text):
        raise UserError(f"{text} is not a path of this machine, and here it must be one")
    return pathlib.Path(text)


@dataclasses.dataclass(frozen=True)
class ObjectPath:
    """A file or folder of an object store. A file is there whole or not at all, and whoever asks
    after a write sees it. A folder is there as long as a file is in it.

    Its methods are those of pathlib.Path. UserError, in one line, where the bucket is missing,
    refuses, or cannot be reached."""

    scheme: str
    bucket: str
    key: str  # no slash at either end; "" for the bucket itself

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> "ObjectPath":
        return dataclasses.replace(self, key=f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        return posixpath.basename(self.key)

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> "ObjectPath":
        return dataclasses.replace(self, key=posixpath.dirname(self.key))

    def with_name(self, name: str) -> "ObjectPath":
        return self.parent / name

    def absolute(self) -> "ObjectPath":
        return self

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return self.key in self._list(self.key, self.key + "\0")

    def is_dir(self) -> bool:
        return bool(self.files())

    def files(self) -> list[str]:
        """Names, relative to this folder, of all files in it and below."""
        prefix = f"{self.key}/" if self.key else ""
        end = f"{self.key}0" if self.key else ""  # "0" follows "/"
        return [key.removeprefix(prefix) for key in self._list(prefix, end)]

    def iterdir(self):
        for name in sorted({file.partition("/")[0] for file in self.files()}):
            yield self / name

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: files make their folders."""

    def read_bytes(self) -> bytes:
        return self.read()[0]

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read(self) -> tuple[bytes, bytes]:
        """The content, and the generation that `write` compares."""
        with explained(self):
            found = self._bucket().read(self.key).result()
        if found.state != "value":
            raise FileNotFoundError(2, "no such object", str(self))
        return found.value, found.stamp.generation

    def write_bytes(self, data: bytes) -> None:
        with explained(self):
            self._bucket().write(self.key, data).result()

    def write_if(self, generation: bytes | None, data: bytes) -> bytes | None:
        """Writes `data` if the file still is of that generation; None: if there is no file.
        Returns the new generation, or None where someone else was faster."""
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
        del missing_ok  # an object store does not say
        with explained(self):
            self._bucket().write(self.key, None).result()

    def rmtree(self) -> None:
        """Removes the folder and all in it."""
        with explained(self):
            self._bucket().delete_range(_range(f"{self.key}/", f"{self.key}0")).result()

    def _list(self, start: str, end: str) -> list[str]:
        with explained(self):
            return [key.decode() for key in self._bucket().list(_range(start, end)).result()]

    def _bucket(self):
        return _open_bucket(self.scheme, self.bucket)


AnyPath = pathlib.Path | ObjectPath


def kvstore(folder: ObjectPath, name: str = "") -> dict:
    """TensorStore's spec of a folder, or of what is called `name` in it. UserError, before
    anything is tried at length, where the bucket cannot be used."""
    _open_bucket(folder.scheme, folder.bucket)
    prefix = f"{folder.key}/" if folder.key else ""
    return _spec(folder.scheme, folder.bucket) | {"path": prefix + name}


def write(file, data: str | bytes, by: str = "") -> None:
    """Writes all of `file` or nothing: a reader never sees half of it. by: the writer's own name,
    where several may write it at once."""
    data = data.encode() if isinstance(data, str) else data
    if isinstance(file, ObjectPath):
        file.write_bytes(data)
        return
    temporary = file.with_name(f"{file.name}{by}.tmp")
    temporary.write_bytes(data)
    temporary.replace(file)


def create(file, data: str, by: str) -> bool:
    """As `write`, but leaves what is there, and says whether it was this writer that wrote."""
    if isinstance(file, ObjectPath):
        return file.write_if(None, data.encode()) is not None
    temporary = file.with_name(f"{file.name}{by}.tmp")
    temporary.write_text(data)
    try:
        os.link(temporary, file)  # unlike a rename, refuses to replace what is there
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def save_json(values: dict, file) -> None:
    write(file, as_json(values))


def as_json(values: dict) -> str:
    return json.dumps(values, indent=1) + "\n"


@contextlib.contextmanager
def explained(where):
    """What TensorStore raises within, as a UserError."""
    try:
        yield
    except ValueError as error:  # TensorStore has no class of its own
        raise UserError(_explanation(where, str(error))) from error


def _explanation(where, error: str) -> str:
    scheme = str(where).partition("://")[0]
    names = {
        "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials",
        "gs": "GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth application-default login",
    }[scheme]
    if "NoSuchBucket" in error or "bucket does not exist" in error:
        return f"{where}: there is no such bucket; make it, or correct its name"
    if "credentials" in error.lower() or "UNAUTHENTICATED" in error or "'401'" in error:
        return f"{where}: no credentials, or wrong ones; set {names}"
    if "PERMISSION_DENIED" in error or "'403'" in error:
        return f"{where}: these credentials may not do this; set others ({names}), or their rights"
    if "CURL error" in error or "UNAVAILABLE" in error:
        server = _endpoint() if scheme == "s3" else None
        what = f"the server {server} (AWS_ENDPOINT_URL)" if server else "the object store"
        return f"{where}: cannot reach {what}; correct it or the network, and start again"
    return f"{where}: {textwrap.shorten(error, 200)}"


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _spec(scheme: str, bucket: str) -> dict:
    spec = {"driver": _DRIVERS[scheme], "bucket": bucket}
    if scheme != "s3":
        return spec
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint := _endpoint():  # TensorStore does not look for it by itself
        spec["endpoint"] = endpoint.rstrip("/")
        region = region or "us-east-1"
    if region:
        spec["aws_region"] = region
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else ~/.aws, a role, the instance
        spec["aws_credentials"] = {"type": "environment"}
    return spec


@functools.cache
def _open_bucket(scheme: str, bucket: str):
    """The bucket, once a first look, with few retries, found it usable."""
    with explained(f"{scheme}://{bucket}"):
        spec = _spec(scheme, bucket)
        context = ts.Context({f"{_DRIVERS[scheme]}_request_retries": _FIRST_LOOK})
        look = ts.KvStore.open(spec, context=context).result()
        look.list(_range("sae-jax-looks", "sae-jax-lookt")).result()
        return ts.KvStore.open(spec).result()


@functools.cache
def _absent() -> bytes:
    """TensorStore's generation of a file that is not there."""
    return ts.KvStore.open("memory://").result().read("none").result().stamp.generation


def _range(start: str, end: str):
    return ts.KvStore.KeyRange(start, end)
