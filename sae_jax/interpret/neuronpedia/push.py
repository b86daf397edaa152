"""Sends files of the layout `upload` to neuronpedia.org, or to a server of the same kind.

Each file is the body of a request POST /api/feature/upload-batch. The key is in the environment,
and goes into the header x-api-key and nowhere else: not into messages, not to another server.
"""

import dataclasses
import http.client
import os
import pathlib
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request

import msgspec
from absl import logging

from sae_jax import paths
from sae_jax.errors import UserError, one_line
from sae_jax.interpret.neuronpedia.files import MANIFEST
from sae_jax.json_files import checked, parse_json, read_json
from sae_jax.progress_bar import progress

URL = "https://www.neuronpedia.org"
KEY = "NEURONPEDIA_API_KEY"

_PATH = "/api/feature/upload-batch"
_STATE = "pushed.json"
_TRIES = 8
_LONGEST_WAIT, _TIMEOUT = 120.0, 300.0  # seconds
_MOST_ANSWER = 2**16  # bytes
_HERE = ("localhost", "127.0.0.1", "::1")
_AGAIN = (408, 425, 429)  # and all of 5xx
_ADVICE = {
    401: "is the key right?",
    403: "is the key right, and the source set yours?",
    404: "is the address right?",
    413: "write smaller files, with fewer latents in each",
}


@dataclasses.dataclass(frozen=True)
class _Manifest:
    """Describes what a push needs of an export's manifest."""

    layout: str
    model: str
    source: str
    files: list[str]


@dataclasses.dataclass(frozen=True)
class _State:
    """Describes which files are there already, by the address that they went to."""

    sent: dict[str, list[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
      address: where requests went.
      sent: the files that it sent.
      there: how many were there before.
      size: how many bytes it sent.
    """

    address: str
    sent: list[str]
    there: int
    size: int


class _Again(Exception):
    """Is raised for an answer after which a request is worth another try."""

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would take the key to another server and drop the body."""

    def redirect_request(self, *_):
        """Returns None, for which urllib raises the answer as an error."""


def push(directory, *, url: str = URL, key_variable: str = KEY, wait: float = 1.0) -> Pushed:
    """Sends the files that are not there yet, one after the other.

    What was sent is noted beside the files, so that the same call goes on after an interruption. A
    request that gets no answer, or one of 408, 425, 429 or 5xx, is tried again up to 8 times, with
    waits that double, or as long as the server asks for. Neuronpedia keeps what it has of a latent.
    Where it took a file but its answer was lost, it may then have examples twice, of which it shows
    each once.

    Args:
      directory: the directory that `write_upload_batches` made.
      url: the server.
      key_variable: the name of the environment variable that holds the key.
      wait: how long to wait before the second try, in seconds.

    Raises UserError if the key is missing, if the server refuses a file, and if it does not answer.
    """
    address, manifest, todo = _plan(directory, url)
    directory, state = paths.local(directory), _state(directory)
    key = _key(key_variable)
    sent, size = [], 0
    for name in progress(todo, f"sending to {address}", len(todo), "file"):
        body = _body(directory / name)
        done = f"{len(manifest.files) - len(todo) + len(sent)} of {len(manifest.files)} files"
        try:
            _send(address, key, body, wait)
        except UserError as error:
            text = str(error).replace(key, "***")  # should a server repeat it
            raise UserError(f"{name}: {text}; {done} are there, the same command goes on") from None
        sent.append(name)
        size += len(body)
        state.sent.setdefault(address, []).append(name)
        paths.save_json(dataclasses.asdict(state), directory / _STATE)
    return Pushed(address, sent, len(manifest.files) - len(sent), size)


def planned(directory, *, url: str = URL, key_variable: str = KEY) -> str:
    """Returns the requests that `push` would make, with their sizes; it makes none.

    The key is not needed, and not shown. Raises UserError if there is nothing that could be sent.
    """
    address, manifest, todo = _plan(directory, url)
    known = "set" if os.environ.get(key_variable) else "not set"
    lines, total = [], 0
    for name in todo:
        body = _body(paths.local(directory) / name)
        latents = len(parse_json(body, name)["features"])
        lines.append(f"POST {address}  {name}: {latents} latents, {len(body):,} bytes")
        total += len(body)
    there = len(manifest.files) - len(todo)
    lines.append(
        f"{len(todo)} requests, {total:,} bytes, to {manifest.model}/{manifest.source}; {there} "
        f"were sent before. The key in x-api-key is {known}."
    )
    return "\n".join(lines)


def _plan(directory, url: str) -> tuple[str, _Manifest, list[str]]:
    """Returns the address, the manifest, and the names of the files that are still to be sent."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("https", "http") or not parts.hostname or parts.query:
        raise UserError(f"{url} is no address of a server; write {URL}")
    if parts.scheme == "http" and parts.hostname not in _HERE:
        raise UserError(f"{url}: the key would go over the network in the clear; write https://")
    if parts.username or parts.password:
        raise UserError("the server's address holds a password; the key belongs in the environment")
    directory = paths.local(directory)
    if not (directory / MANIFEST).is_file():
        raise UserError(f"{directory} holds no finished export for Neuronpedia; write one first")
    manifest = checked(read_json(directory / MANIFEST), _Manifest, directory / MANIFEST)
    if manifest.layout != "upload":
        raise UserError(f"{directory} is of the layout {manifest.layout}; only upload can be sent")
    for name in manifest.files:
        if not re.fullmatch(r"batch-[0-9]+\.json", name):
            raise UserError(f"{directory / MANIFEST} names {name!r}, which is no file of an export")
    address = url.rstrip("/") + _PATH
    there = set(_state(directory).sent.get(address, ()))
    return address, manifest, [name for name in manifest.files if name not in there]


def _state(directory) -> _State:
    file = paths.local(directory) / _STATE
    return checked(read_json(file, default={}), _State, file)


def _key(variable: str) -> str:
    """Returns the key. No message has the variable's name, for which a key may be mistaken."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            "the environment variable for Neuronpedia's key is not set; you find the key in your "
            "settings at neuronpedia.org"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError("the environment variable for Neuronpedia's key holds what is no key")
    return key


def _body(file: pathlib.Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; write the export again") from None


def _send(address: str, key: str, body: bytes, wait: float) -> None:
    """Sends one body, and tries again where that may help."""
    for tried in range(1, _TRIES + 1):
        try:
            _post(address, key, body)
            return
        except _Again as error:
            if tried == _TRIES:
                raise UserError(
                    f"{address} {error} {tried} times; do the source set and this source of it "
                    "exist there, and are they yours?"
                ) from None
            pause = wait * 2 ** (tried - 1) * random.uniform(0.5, 1.0)
            pause = min(_LONGEST_WAIT, max(pause, error.wait or 0.0))
            told = one_line(error).replace(key, "***")
            logging.warning("%s %s; again in %.0f s", address, told, pause)
            time.sleep(pause)


def _post(address: str, key: str, body: bytes) -> None:
    headers = {"content-type": "application/json", "x-api-key": key}
    request = urllib.request.Request(address, body, headers, method="POST")
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        with opener.open(request, timeout=_TIMEOUT) as answer:
            answer.read(_MOST_ANSWER)
    except urllib.error.HTTPError as error:
        with error:
            _refused(address, error)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise _Again(f"did not answer ({reason})") from None


def _refused(address: str, error: urllib.error.HTTPError) -> None:
    """Raises what an answer with an error's status means."""
    try:
        said = _said(error.read(_MOST_ANSWER))
    except (OSError, http.client.HTTPException):
        said = ""
    if error.code in _AGAIN or error.code >= 500:
        asked = error.headers.get("retry-after", "")
        raise _Again(f"answered {error.code}{said}", float(asked) if asked.isdecimal() else None)
    if 300 <= error.code < 400:
        to = error.headers.get("location", "elsewhere")
        raise UserError(f"{address} points to {to}; give the address that it has now")
    advice = _ADVICE.get(error.code)
    raise UserError(f"{address} answered {error.code}{said}" + (f"; {advice}" if advice else ""))


def _said(data: bytes) -> str:
    """Returns what the body of an error says, in brackets."""
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""  # a page of HTML
    if not isinstance(found, dict):
        return ""
    parts = [str(found[name])[:200] for name in ("error", "message", "path") if found.get(name)]
    return f" ({', '.join(parts)})" if parts else ""
