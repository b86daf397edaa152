"""The connections over which the processes of one program tell each other how they are.

Process 0 listens on a TCP port, and every other process holds one connection to it. A message is
one line of JSON. JAX has a store of keys and values for its processes, but no public name for it
(as of 0.10.2).

Process 0 tells the others its addresses, its port and a random token through a public collective.
A connection that does not present the token is closed. Nothing is encrypted.
"""

import asyncio
import contextlib
import hmac
import json
import secrets
import socket

import jax
import numpy as np
from jax.experimental import multihost_utils

from sae_jax.errors import UserError

_LINE_BYTES = 1 << 16  # of the longest message
_INVITATION_BYTES = 2048
_CONNECT_SECONDS = 20.0  # seconds for a connection, and for the other side to present the token


class PeerLink:
    """The connections of this process.

    Process 0 has one with every other process, which have one with process 0. One thread that runs
    an event loop uses it, within `async with`.

    Attributes:
      me: the number of this process.
      count: how many processes there are.
      heard: the last message of each process, by its number.
      gone: the processes whose connection has closed. That happens at once when a process dies, and
        not at all when its host is cut off.
    """

    def __init__(self, me: int, count: int, end: socket.socket, token: str):
        """Prefer `open_link`. `end` is process 0's listening socket, or a connection to it."""
        self.me, self.count = me, count
        self.heard: dict[int, dict] = {}
        self.gone: set[int] = set()
        self._end, self._token = end, token
        self._writers: dict[int, asyncio.StreamWriter] = {}

    async def __aenter__(self) -> "PeerLink":
        if self.me == 0:
            self._server = await asyncio.start_server(
                self._welcome, sock=self._end, limit=_LINE_BYTES
            )
        else:
            reader, self._writers[0] = await asyncio.open_connection(
                sock=self._end, limit=_LINE_BYTES
            )
            self._listening = asyncio.create_task(self._listen(0, reader))
        return self

    async def __aexit__(self, *_) -> None:
        if self.me == 0:
            self._server.close()
        for writer in self._writers.values():
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def send(self, message: dict, but: tuple[int, ...] = ()) -> None:
        """Sends a message to all with whom there is a connection, except those in `but`."""
        line = json.dumps(message).encode() + b"\n"
        for i, writer in self._writers.items():
            if i not in self.gone and i not in but:
                writer.write(line)

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError, TimeoutError):
            hello = json.loads(await asyncio.wait_for(reader.readline(), _CONNECT_SECONDS))
            i = hello["process"]
            known = hmac.compare_digest(hello["token"], self._token)
            if known and i in range(1, self.count) and i not in self._writers:
                self._writers[i] = writer
                writer.write(_hello(0, self._token))
                await self._listen(i, reader)
        writer.close()

    async def _listen(self, i: int, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ValueError, OSError):
            while line := await reader.readline():
                self.heard[i] = json.loads(line)
        self.gone.add(i)


def open_link(host: str | None, port: int) -> PeerLink:
    """Returns this process's connections. All processes that jax.distributed has joined call it.

    Args:
      host: the name of process 0's host, if the user has given one.
      port: the port on which process 0 listens, 0 for any that is free.

    Raises UserError if process 0 cannot listen on the port, or cannot be reached.
    """
    listener, invitation = None, {}
    if jax.process_index() == 0:
        try:
            listener = _listener(host, port)
        except OSError as error:
            invitation = {"error": error.strerror or str(error)}
        else:
            hosts = [host] if host else _own_addresses()
            port = listener.getsockname()[1]
            invitation = {"hosts": hosts, "port": port, "token": secrets.token_hex(16)}
    # The line is padded to a length that all processes know.
    line = json.dumps(invitation).encode().ljust(_INVITATION_BYTES)
    line = multihost_utils.broadcast_one_to_all(np.frombuffer(line, np.uint8))
    invitation = json.loads(bytes(line))
    if "error" in invitation:
        raise UserError(
            f"process 0 cannot listen on --watchdog_port={port} ({invitation['error']}); choose "
            "another, or 0 for any that is free"
        )
    end = listener or connect(jax.process_index(), **invitation)
    return PeerLink(jax.process_index(), jax.process_count(), end, invitation["token"])


def _listener(host: str | None, port: int) -> socket.socket:
    """Returns a socket that listens on the interface of `host`.

    It listens on all interfaces where no host is given, or where its name leads here through
    others (a service of Kubernetes).
    """
    if host:
        with contextlib.suppress(OSError):
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address[:2], family=family, backlog=jax.process_count())
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(
        ("", port), family=family, backlog=jax.process_count(), dualstack_ipv6=both
    )


def _own_addresses() -> list[str]:
    """Returns the names and addresses under which other hosts may reach this one."""
    name = socket.gethostname()
    found = [name, socket.getfqdn()]
    with contextlib.suppress(OSError):
        found += [address[0] for *_, address in socket.getaddrinfo(name, None)]
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as outward:
        outward.connect(("192.0.2.1", 9))  # sends nothing; it picks the interface
        found.append(outward.getsockname()[0])
    return list(dict.fromkeys(found))


def connect(process: int, hosts: list[str], port: int, token: str) -> socket.socket:
    """Returns a connection of `process` to process 0 at one of `hosts`.

    Both sides present the token. Raises UserError if process 0 is at none of them.
    """
    problems = []
    for host in hosts:
        try:
            end = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
            end.sendall(_hello(process, token))
            expected, answer = _hello(0, token), b""
            while len(answer) < len(expected) and (part := end.recv(len(expected) - len(answer))):
                answer += part
            if answer == expected:
                return end
            problems.append(f"{host}: another program answers")
            end.close()
        except OSError as error:
            problems.append(f"{host}: {error.strerror or error}")
    raise UserError(
        f"process {process} cannot reach process 0 on port {port} "
        f"({'; '.join(problems)}); with --watchdog_port=PORT choose one that is open between hosts"
    )


def _hello(process: int, token: str) -> bytes:
    """Returns the first line that a process sends."""
    return json.dumps({"process": process, "token": token}).encode() + b"\n"
