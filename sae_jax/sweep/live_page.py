"""Serves a page of the curves of runs, to browsers on this machine alone."""

import http.server
import pathlib
from collections.abc import Mapping

from sae_jax import local_server
from sae_jax.local_server import Answer
from sae_jax.sweep.watch import Watch

_PAGE = pathlib.Path(__file__).parent / "live_page.html"
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'"
)


def open_server(watch: Watch, port: int) -> tuple[http.server.HTTPServer, str]:
    """Returns a server of the page, whose `serve_forever` runs it, and the address to open.

    Port 0 is any that is free. Raises UserError if the port cannot be used.
    """

    def get(path: str, query: Mapping[str, str]) -> Answer | None:
        if path == "/":
            return Answer(_PAGE.read_bytes(), "text/html; charset=utf-8")
        if path != "/data.json":
            return None
        since = query.get("since", "0")
        since = int(since) if since.isdecimal() and len(since) < 16 else 0
        return local_server.as_answer(watch.since(since, query.get("server")))

    pages = local_server.Pages("the page of the curves", get, local_server.nothing, _POLICY)
    return local_server.open_server(pages, port)
