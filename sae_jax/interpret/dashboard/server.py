"""Serves the dashboard: the page, the files that it reads, made when they are asked for, and the
API by which it asks the SAE and its model.
"""

import functools
import http.server
import re
import threading
from collections.abc import Mapping

import msgspec

from sae_jax import local_server
from sae_jax.interpret.dashboard.export import PAGE_KINDS, About, packed, page_files, shard_of
from sae_jax.interpret.dashboard.latents import Latents
from sae_jax.interpret.dashboard.live import Live
from sae_jax.local_server import LOCAL, Answer

SHARD = 8  # latents in a file, so that one is made at once
_KEPT = 512  # files that are kept
_LEVEL = 1  # of gzip
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def open_server(
    latents: Latents, known: About, live: Live, port: int, host: str = LOCAL
) -> tuple[http.server.HTTPServer, str]:
    """Returns a server of the dashboard, whose `serve_forever` runs it, and the address to open.

    Args:
      latents: the latents.
      known: what the dashboard is about.
      live: what answers the API.
      port: the port; 0 is any that is free.
      host: the address to listen at; others than this machine alone need a secret.

    Raises UserError if the port or the host cannot be used.
    """
    site = _Site(latents, known, live)
    pages = local_server.Pages("the dashboard", site.get, site.post, _POLICY)
    return local_server.open_server(pages, port, host)


class _Site:
    """Answers requests. Files are made one at a time, as JAX's work is shared by all the processors
    anyway, and kept for who asks next; the model answers one at a time beside that, so that a long
    continuation keeps nobody from reading."""

    def __init__(self, latents: Latents, known: About, live: Live):
        self._latents, self._about, self._live = latents, known, live
        self._making, self._asking = threading.Lock(), threading.Lock()
        self._pages = {file.name: file for file in page_files()}
        self._shard = functools.lru_cache(_KEPT)(self._make)

    @functools.cached_property
    def _hints(self) -> bytes:
        return packed(self._latents.hints(), _LEVEL)

    def get(self, path: str, query: Mapping[str, str]) -> Answer | None:
        del query
        name = path.removeprefix("/") or "index.html"
        if file := self._pages.get(name):
            return Answer(file.read_bytes(), PAGE_KINDS[file.suffix])
        if name == "data/about.json":
            return _json(self._about)
        if name == "data/index.bin":
            return _packed(self._latents.columns().tobytes())
        if name == "data/labels.json.gz":
            return _packed(packed(self._latents.labels.names, _LEVEL))
        if name == "data/explanations.json.gz" and self._latents.explained:
            return _packed(packed(self._latents.explained.texts, _LEVEL))
        if name == "data/hints.json.gz":
            with self._making:
                return _packed(self._hints)
        shard = re.fullmatch(r"data/latents/([0-9]{5,9})\.json\.gz", name)
        if shard and int(shard[1]) < self._about.shards:
            with self._making:
                return _packed(self._shard(int(shard[1])))
        return None

    def post(self, path: str, values: object) -> Answer | None:
        with self._asking:
            found = self._live.answer(path.removeprefix("/api/"), values)
        return None if found is None else _json(found)

    def _make(self, number: int) -> bytes:
        return packed(shard_of(self._latents, number, SHARD), _LEVEL)


def _json(values) -> Answer:
    return Answer(msgspec.json.encode(values), "application/json")


def _packed(data: bytes) -> Answer:
    return Answer(data, "application/octet-stream")
