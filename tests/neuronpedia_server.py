"""A server that takes uploads as neuronpedia.org does, and fails as it is told to."""

import contextlib
import http.server
import json
import math
import threading

KEY = "np-secret-key"


class Server(http.server.ThreadingHTTPServer):
    """Attributes: requests, the bodies that it took; asked, how many requests came; failures, what
    it does with the next ones: a status, (status, headers, body), or "close"; the last one for good
    where it is repeated with `always`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests, self.asked, self.failures, self.always = [], 0, [], None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked += 1
        failure = self.server.failures.pop(0) if self.server.failures else self.server.always
        if failure == "close":
            self.close_connection = True
            return
        if failure is not None:
            status, headers, text = failure if isinstance(failure, tuple) else (failure, {}, b"")
            self._answer(status, text, headers)
            return
        if self.path != "/api/feature/upload-batch" or self.headers["x-api-key"] != KEY:
            self._answer(401, b'{"error": "no"}')
            return
        if wrong := what_is_wrong(json.loads(body)):
            self._answer(400, json.dumps({"error": wrong}).encode())
            return
        self.server.requests.append(json.loads(body))
        self._answer(200, b'{"message": "created."}')

    def _answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Prints nothing."""


@contextlib.contextmanager
def serve():
    """Yields a `Server`."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def what_is_wrong(body: dict) -> str | None:
    """Returns what Neuronpedia's uploadBatchSchema would refuse, field by field, or None."""
    for name in ("modelId", "source"):
        if not isinstance(body[name], str) or not body[name] or body[name] != body[name].lower():
            return name
    features = body["features"]
    if not 1 <= len(features) <= 128 or len({f["index"] for f in features}) < len(features):
        return "features"
    for feature in features:
        if not isinstance(feature["index"], int) or not 0 <= feature["index"] <= 10_000_000:
            return "index"
        if not 0 <= feature.get("density", 0) <= 1:
            return "density"
        for name in ("topLogits", "bottomLogits"):
            logits = feature.get(name) or []
            wrong = [x for x in logits if not x["token"] or not _is_number(x["value"])]
            if len(logits) > 20 or wrong:
                return name
        for found in feature.get("explanations", []):
            if not 1 <= len(found["text"].encode("utf-16-le")) // 2 <= 512:
                return "explanations"
        if not feature["activations"]:
            return "activations"
        for found in feature["activations"]:
            tokens, values = found["tokens"], found["values"]
            if not 1 <= len(tokens) <= 1024 or len(tokens) != len(values):
                return "tokens"
            if not all(isinstance(t, str) and t for t in tokens) or not all(
                map(_is_number, values)
            ):
                return "values"
            if any((found.get(name) or 0) > 99_999_999 for name in ("quantileMin", "quantileMax")):
                return "quantileMax"
            if not 0 <= (found.get("quantileFraction") or 0) <= 1:
                return "quantileFraction"
    return None


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
