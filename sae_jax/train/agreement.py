"""What all processes of a program must agree on before the first step.

Processes that differ in it would train on in silence, each a part of another model, or wait for
each other for ever. Each check costs one small collective. With one process it costs nothing.
"""

import contextlib
import hashlib
import json
import secrets
import socket
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from sae_jax import config as configs
from sae_jax import paths, recipe_files
from sae_jax.config import Config
from sae_jax.errors import UserError, some
from sae_jax.paths import AnyPath

_SEEN_SECONDS = 30.0  # until a file that one host has written is seen by all, over a network too


def check_same(own: Callable[[], dict], what: str) -> None:
    """Raises UserError, in all processes, if one of them has other values than process 0.

    Args:
      own: returns nested plain values of this process. It is not called if there is only one.
      what: what they are, for the message, such as "config".

    The message names the process, its host, and the fields that differ with both values.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(own(), sort_keys=True, default=str)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    if (digests == digests[0]).all():
        return
    mine = {"host": socket.gethostname(), "values": json.loads(text)}
    all_of_them = [json.loads(text) for text in _gather(json.dumps(mine))]
    first = all_of_them[0]
    for i, other in enumerate(all_of_them):
        if different := configs.difference(first["values"], other["values"]):
            raise UserError(
                f"process {i} (on {other['host']}) has another {what} than process 0 (on "
                f"{first['host']}): "
                f"{some(different, 4)}; start all processes of a program with the same command, "
                "versions and data"
            )


def from_process_0(own: Callable[[], str]) -> str:
    """Returns a text that process 0 decides, in all processes.

    Args:
      own: returns it. Only process 0 calls it.
    """
    is_first = jax.process_index() == 0
    return _gather(own() if is_first else "")[0] if jax.process_count() > 1 else own()


def described(config: Config) -> dict:
    """Returns the plain values of a config that all processes must have.

    They are without the places of files, which may lie elsewhere on each host. Of a user's own
    Python file there is the hash.
    """
    values = configs.to_dict(config)
    file = values.pop("architecture_file", None)
    own, _, function = values["sae"]["extra_loss"].rpartition(":")
    values["files"] = [_file_hash(name) for name in (file, own) if name]
    values["sae"]["extra_loss"] = function
    values["data"].pop("store")
    values["train"].pop("init")
    values["train"].pop("branch_from")
    return values


def data_fingerprint(stream) -> str:
    """Returns a hash of what a stream reads: its data, its sites, their statistics, its rows."""
    about = [stream.fingerprint, stream.site_names, stream.site_widths]
    about += [stream.rows_per_epoch, stream.num_steps]
    numbers = np.concatenate([stream.mean, stream.site_mean_squared_norms]).astype(np.float64)
    return hashlib.sha256(json.dumps(about).encode() + numbers.tobytes()).hexdigest()[:16]


def parameters_fingerprint(parameters: dict[str, jax.Array]) -> str:
    """Returns a hash of the values of parameters by name, which must be whole in this process."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(parameters[name]))
    return digest.hexdigest()[:16]


def check_shared(folder: AnyPath) -> None:
    """Raises UserError, in all processes, if one does not see what process 0 writes in `folder`.

    All processes call it when the folder exists. It waits at most 30 seconds for a file to appear.
    """
    if jax.process_count() == 1:
        return
    token = np.frombuffer(secrets.token_bytes(8), np.uint8)
    token = bytes(multihost_utils.broadcast_one_to_all(token)).hex()
    file = folder / f"config.json.{token}.tmp"
    if jax.process_index() == 0:
        paths.write(file, "")
    multihost_utils.sync_global_devices("process 0 has written")
    deadline = time.monotonic() + _SEEN_SECONDS
    while not (seen := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = [json.loads(text) for text in _gather(json.dumps([seen, socket.gethostname()]))]
    if jax.process_index() == 0:
        file.unlink()
    for i, (sees, host) in enumerate(found):
        if not sees:
            raise UserError(
                f"process {i} (on {host}) does not see what process 0 (on {found[0][1]}) wrote in "
                f"{folder} {_SEEN_SECONDS:.0f} s ago; give all processes one --workdir that they "
                "share, on a network's disk or in an object store"
            )


def _gather(text: str) -> list[str]:
    """Returns the texts of all processes, in their order."""
    data = text.encode()
    sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32))[:, 0]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def _file_hash(name: str) -> str | None:
    """Returns a hash of a Python file's content, None where there is none, which is told later."""
    with contextlib.suppress(UserError, OSError):
        return hashlib.sha256(recipe_files.find(name).read_bytes()).hexdigest()[:16]
