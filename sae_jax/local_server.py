"""Serves pages to browsers on this machine, and to others only where that is asked for.

A page of another site must not be able to read what is served here, or to make it work. So a
request is answered only if it calls this machine by a name of its own, which keeps out names that
were made to point here (DNS rebinding), and what a page sends must be JSON that comes from a page
of this server. Where other machines can connect, every request needs a secret besides, which is in
the address that is printed, and which the browser keeps as a cookie.
"""

import errno
import hmac
import http.server
import ipaddress
import json
import re
import secrets
import socket
import socketserver
import sys
import urllib.parse
from collections.abc import Callable, Mapping
from typing import NamedTuple

from absl import logging

from sae_jax.errors import UserError, on_one_line
from sae_jax.json_files import parse_json

LOCAL = "127.0.0.1"
_MOST_BYTES = 10**6  # of what a page sends
_LOCAL_NAMES = (LOCAL, "localhost")
_COOKIE_SECONDS = 30 * 86_400


class Answer(NamedTuple):
    """What a request is answered with.

    Attributes:
      data: the content.
      kind: its type, as in "text/html; charset=utf-8".
      status: the status of HTTP.
    """

    data: bytes
    kind: str
    status: int = 200


class Pages(NamedTuple):
    """What a server serves.

    Attributes:
      name: what the log calls it.
      get: gives the answer to a path and its query, or None where there is nothing.
      post: gives the answer to a path and the JSON that was sent to it, or None where there is
        nothing. Its UserError is sent to the page.
      policy: the Content-Security-Policy.
    """

    name: str
    get: Callable[[str, Mapping[str, str]], Answer | None]
    post: Callable[[str, object], Answer | None]
    policy: str


def nothing(path: str, values: object) -> None:
    """Answers no path, as the `post` of pages that only show."""


def as_answer(values) -> Answer:
    """Returns values as JSON on one line. NaN and infinity, which JSON lacks, are an error."""
    data = json.dumps(values, allow_nan=False, separators=(",", ":")).encode()
    return Answer(data, "application/json")


def open_server(
    pages: Pages, port: int, host: str = LOCAL
) -> tuple[http.server.ThreadingHTTPServer, str]:
    """Returns a server of pages, whose `serve_forever` runs it, and the address to open.

    Args:
      pages: what is served.
      port: the port; 0 is any that is free.
      host: the address to listen at. Others than this machine alone need the secret in the address.

    Raises UserError if the port or the host cannot be used.
    """
    secret = None if host in _LOCAL_NAMES else secrets.token_urlsafe(24)
    try:
        server = _Server((host, port), _Handler)
    except OSError as error:  # of a name that is none, too
        if error.errno not in (errno.EADDRINUSE, errno.EACCES) and host not in _LOCAL_NAMES:
            why = error.strerror or error
            raise UserError(
                f"--host={host} is no IPv4 address of this machine ({why}); give one that it has, "
                "or 0.0.0.0 for all of them"
            ) from None
        why = (
            "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        )
        raise UserError(
            f"--serve: port {port} of this machine {why}; give another one, such as "
            f"--serve={port % 65535 + 1}, or --serve=0 for any that is free"
        ) from None
    server.pages, server.secret = pages, secret
    name = socket.gethostname() if host == "0.0.0.0" else host
    return server, f"http://{name}:{server.server_port}" + (f"/?token={secret}" if secret else "")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    pages: Pages
    secret: str | None

    def server_bind(self) -> None:
        """Binds without asking a name server for this machine's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address) -> None:
        """Logs in one line what kept a request from being answered, but for a tab that closed."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            logging.error("%s: %s", self.pages.name, on_one_line(error))

    def knows(self, name: str | None) -> bool:
        """Whether `name` is one of this machine's own.

        Where other machines connect, any number is, since none can be made to point elsewhere.
        """
        if self.secret is None:
            return name in _LOCAL_NAMES
        names = (*_LOCAL_NAMES, socket.gethostname().lower(), str(self.server_address[0]).lower())
        return name in names or _is_number(name)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: _Server

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = {name: values[-1] for name, values in urllib.parse.parse_qs(url.query).items()}
        if not (self._is_for_this_machine() and self._has_secret(query)):
            return
        if self.server.secret and "token" in query:
            return self._keep_secret(url.path)
        path = urllib.parse.unquote(url.path, errors="replace")
        answer = self._answer(self.server.pages.get, path, query)
        self._send(answer or _text(404, "there is nothing of this name"))

    def do_POST(self) -> None:
        self.close_connection = True  # what is not read of a refused body is no next request
        size = self.headers.get("Content-Length", "")
        kind = self.headers.get_content_type()
        if not (self._is_for_this_machine() and self._has_secret({})):
            return
        if kind != "application/json" or not self._is_own_page():
            return self._send(_error(415, "send application/json, from this server's page"))
        if not re.fullmatch("[0-9]{1,7}", size) or int(size) > _MOST_BYTES:
            return self._send(_error(413, f"send at most {_MOST_BYTES:,} bytes, and say how many"))
        path = urllib.parse.urlsplit(self.path).path
        body = self.rfile.read(int(size))
        self.close_connection = False
        answer = self._answer(self._post, path, body)
        self._send(answer or _error(404, "there is nothing of this name"))

    def _post(self, path: str, body: bytes) -> Answer | None:
        return self.server.pages.post(path, parse_json(body, "what was sent"))

    def _answer(self, function: Callable, path: str, given) -> Answer | None:
        """Returns what `function` answers; its error, so that no page takes us to be gone."""
        try:
            return function(path, given)
        except UserError as error:
            return _error(400, str(error))
        except Exception as error:
            failed = f"{path} failed: {type(error).__name__}: {on_one_line(error)}"
            logging.error("%s: %s", self.server.pages.name, failed)
            return _error(500, failed)

    def _is_for_this_machine(self) -> bool:
        if self.server.knows(_host(self.headers.get("Host", ""))):
            return True
        self._send(_text(403, "open the address that was printed: this server has no other name"))
        return False

    def _has_secret(self, query: Mapping[str, str]) -> bool:
        if self.server.secret is None:
            return True
        parts = (part.strip().partition("=") for part in self.headers.get("Cookie", "").split(";"))
        given = [value for name, _, value in parts if name == self._cookie]
        given += [query["token"]] if "token" in query else []
        if any(hmac.compare_digest(g.encode(), self.server.secret.encode()) for g in given):
            return True
        self._send(_text(403, "open the address that was printed, with its token"))
        return False

    @property
    def _cookie(self) -> str:
        return f"sae_jax_{self.server.server_port}"  # cookies are shared by all ports

    def _keep_secret(self, path: str) -> None:
        """Goes on to the same path with the secret in a cookie, and not in the address bar."""
        self.send_response(303)
        cookie = f"{self._cookie}={self.server.secret}; Max-Age={_COOKIE_SECONDS}"
        self.send_header("Set-Cookie", f"{cookie}; Path=/; HttpOnly; SameSite=Strict")
        self.send_header("Location", "/" + path.lstrip("/"))
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _is_own_page(self) -> bool:
        """Whether a page of this server sends this, or no page at all."""
        origin = self.headers.get("Origin")
        return origin is None or urllib.parse.urlsplit(origin).netloc == self.headers.get("Host")

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", self.server.pages.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.data)))
        self.end_headers()
        self.wfile.write(answer.data)

    def log_message(self, *_) -> None:
        """Prints nothing."""


def _text(status: int, sentence: str) -> Answer:
    return Answer(f"{sentence}\n".encode(), "text/plain", status)


def _error(status: int, sentence: str) -> Answer:
    return as_answer({"error": sentence})._replace(status=status)


def _host(header: str) -> str | None:
    """Returns the name in a Host header, without the port; None where there is none."""
    try:
        return urllib.parse.urlsplit(f"//{header}").hostname
    except ValueError:
        return None


def _is_number(name: str | None) -> bool:
    try:
        ipaddress.ip_address(name or "")
    except ValueError:
        return False
    return True
