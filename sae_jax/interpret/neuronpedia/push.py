"""Sends files of the layout `upload` to neuronpedia.org, or to a server of the same kind.

Each file is the body of a request POST /api/feature/upload-batch. The key is in the environment,
and goes into the header x-api-key and nowhere else: not into messages, not to another server.
"""

import dataclasses
import os
import pathlib
import re

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.http_posts import (
    Key,
    Refused,
    check_address,
    check_secrecy,
    post,
    read_key,
    until_answered,
)
from sae_jax.interpret.neuronpedia.files import MANIFEST
from sae_jax.json_files import checked, parse_json, read_json
from sae_jax.progress_bar import progress

URL = "https://www.neuronpedia.org"
KEY = "NEURONPEDIA_API_KEY"

_PATH = "/api/feature/upload-batch"
_STATE = "pushed.json"
_TIMEOUT = 300.0  # seconds
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


def push(directory, *, url: str = URL, key_variable: str = KEY, wait: float = 1.0) -> Pushed:
    """Sends the files that are not there yet, one after the other.

    What was sent is noted beside the files, so that the same call goes on after an interruption. A
    request that gets no answer, or one of 408, 409, 425, 429 or 5xx, is tried again up to 8 times,
    with waits that double, or as long as the server asks for. Neuronpedia keeps what it has of a
    latent. Where it took a file but its answer was lost, it may then have examples twice, of which
    it shows each once.

    Args:
      directory: the directory that `write_upload_batches` made.
      url: the server.
      key_variable: the name of the environment variable that holds the key.
      wait: how long to wait before the second try, in seconds.

    Raises UserError if the key is missing, if the server refuses a file, and if it does not answer.
    """
    address, manifest, todo = _plan(directory, url)
    directory, state = paths.local(directory), _state(directory)
    advice = "you find the key in your settings at neuronpedia.org"
    key = read_key(key_variable, "Neuronpedia's", advice)
    sent, size = [], 0
    for name in progress(todo, f"sending to {address}", len(todo), "file"):
        body = _body(directory / name)
        done = f"{len(manifest.files) - len(todo) + len(sent)} of {len(manifest.files)} files"
        try:
            _send(address, key, body, wait)
        except UserError as error:
            raise UserError(
                f"{name}: {error}; {done} are there, the same command goes on"
            ) from None
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
    check_address(url, URL)
    check_secrecy(url)
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


def _body(file: pathlib.Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; write the export again") from None


def _send(address: str, key: Key, body: bytes, wait: float) -> None:
    """Sends one body, and tries again where that may help."""
    advice = "do the source set and this source of it exist there, and are they yours?"
    try:
        until_answered(
            lambda: post(address, body, key, "x-api-key", _TIMEOUT), address, wait, advice
        )
    except Refused as error:
        advice = _ADVICE.get(error.status)
        raise UserError(f"{address} {error}" + (f"; {advice}" if advice else "")) from None
