"""Serves a page of the curves of runs, to browsers on this machine alone."""

import errno
import http.server
import json
import pathlib
import sys
import urllib.parse

from absl import logging

from sae_jax.errors import UserError, on_one_line
from sae_jax.sweep.watch import Watch

_HOST = "127.0.0.1"
_PAGE = pathlib.Path(__file__).parent / "live_page.html"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}


def open_server(watch: Watch, port: int) -> tuple[http.server.HTTPServer, str]:
    """Returns a server of the page, whose `serve_forever` runs it, and the address to open.

    It listens to this machine alone, and answers only who calls it by this machine's name, so that
    no page of another site can read it. Port 0 is any that is free.

    Raises UserError if the port cannot be used.
    """
    try:
        server = _Server((_HOST, port), _handler(watch))
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "is taken" if taken else f"cannot be used ({error.strerror})"
        raise UserError(
            f"--serve: port {port} of this machine {why}; give another one, such as "
            f"--serve={port % 65535 + 1}, or --serve=0 for any that is free"
        ) from None
    return server, f"http://{_HOST}:{server.server_port}"


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Logs in one line what kept a request from being answered, but for a tab that closed."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            logging.error("the page of the curves: %s", on_one_line(error))


def _handler(watch: Watch) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def do_GET(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            name = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname
            if name not in (_HOST, "localhost"):
                self._answer(403, "text/plain", b"this page is for this machine alone\n")
            elif url.path == "/":
                self._answer(200, "text/html; charset=utf-8", _PAGE.read_bytes())
            elif url.path == "/data.json":
                asked = urllib.parse.parse_qs(url.query)
                since = asked.get("since", ["0"])[-1]
                since = int(since) if since.isdecimal() and len(since) < 16 else 0
                news = watch.since(since, asked.get("server", [None])[-1])
                data = json.dumps(news, allow_nan=False, separators=(",", ":")).encode()
                self._answer(200, "application/json", data)
            else:
                self._answer(404, "text/plain", b"there is / and /data.json\n")

        def _answer(self, status: int, kind: str, data: bytes) -> None:
            self.send_response(status)
            for header, value in _HEADERS.items():
                self.send_header(header, value)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_) -> None:
            """Prints nothing."""

    return Handler
