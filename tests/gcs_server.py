"""A stand-in for Google's server, as far as TensorStore's driver speaks to it: objects are written,
read, deleted and listed, with ifGenerationMatch. Made from the documentation of the JSON API."""

import contextlib
import http.server
import itertools
import json
import os
import threading
import urllib.parse

BUCKET = "gs://bucket"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet
    disable_nagle_algorithm = True
    objects: dict[str, tuple[int, bytes]] = {}  # generation, content
    generations = itertools.count(1)
    lock = threading.Lock()

    def log_message(self, *_):
        pass

    def do_GET(self):
        key, query = self._parse()
        if key == "":
            return self._no_bucket()
        with self.lock:
            if key is None:
                return self._list(query)
            if key not in self.objects:
                return self._answer(404)
            generation, data = self.objects[key]
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        headers = {"x-goog-generation": str(generation)}
        if "Range" not in self.headers:
            return self._answer(200, data, headers)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(len(data), int(last) + 1) if first and last else len(data)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._answer(206, data[start:stop], headers)

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        key, query = self._parse()
        if key == "":
            return self._no_bucket()
        with self.lock:
            if not self._matches(query["name"], query):
                return self._answer(412)
            generation = next(self.generations)
            self.objects[query["name"]] = generation, data
        self._answer_json(self._described(query["name"]))

    def do_DELETE(self):
        key, query = self._parse()
        with self.lock:
            if key not in self.objects:
                return self._answer(404)
            if not self._matches(key, query):
                return self._answer(412)
            del self.objects[key]
        self._answer(204)

    def _parse(self) -> tuple[str | None, dict[str, str]]:
        """(the object, None for none, "" in another bucket; the query)."""
        url = urllib.parse.urlsplit(self.path)
        _, _, after = url.path.partition("/b/")
        bucket, _, rest = after.partition("/o")
        key = urllib.parse.unquote(rest.removeprefix("/")) or None
        query = dict(urllib.parse.parse_qsl(url.query))
        return key if bucket == "bucket" else "", query

    def _matches(self, key: str, query: dict[str, str]) -> bool:
        there = self.objects.get(key, (0, b""))[0]
        return int(query.get("ifGenerationMatch", there)) == there

    def _list(self, query: dict[str, str]) -> None:
        start, end = query.get("startOffset", ""), query.get("endOffset")
        names = [key for key in sorted(self.objects) if key >= start and (not end or key < end)]
        names = [key for key in names if key.startswith(query.get("prefix", ""))]
        self._answer_json({"items": [self._described(name) for name in names]})

    def _no_bucket(self) -> None:
        error = {"code": 404, "message": "The specified bucket does not exist."}
        self._answer(404, json.dumps({"error": error}).encode())

    def _described(self, name: str) -> dict:
        generation, data = self.objects[name]
        return {"name": name, "generation": str(generation), "size": str(len(data))}

    def _answer_json(self, values: dict) -> None:
        self._answer(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _answer(self, code: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if code not in (204, 304):
            self.wfile.write(data)


@contextlib.contextmanager
def serve():
    """This process, and those it starts, find the server by environment."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_port}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
    }
    os.environ.update(environment)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        for name in environment:
            del os.environ[name]
