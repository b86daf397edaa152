"""A server between a program and one that speaks S3, which loses requests as networks do."""

import contextlib
import http.client
import http.server
import os
import random
import threading
import time
import urllib.parse

from sae_jax import buckets


class Requests(list):
    """The requests so far, (method, whether it was lost).

    Attributes:
      share: what share of the coming ones is lost.
    """

    share: float


@contextlib.contextmanager
def serve(address: str, share: float, seconds: float = 0.0, status: int = 503, seed: int = 0):
    """Yields the `Requests` of the server, while programs that look for S3 by their environment
    find this one.

    Args:
      address: the server that does the work.
      share: what share of requests is lost. Half of them are answered with `status`, and half with
        nothing.
      seconds: how long each request takes more.
      status: what is answered.
      seed: chooses which are lost.
    """
    upstream = urllib.parse.urlsplit(address)
    chance, lock, requests = random.Random(seed), threading.Lock(), Requests()
    requests.share = share

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            with lock:
                luck, share = chance.random(), requests.share
                requests.append((self.command, luck < share))
            time.sleep(seconds)
            if luck < share / 2:
                self.answer(status, {}, b"")
                return
            if luck < share:
                self.close_connection = True
                return
            connection = http.client.HTTPConnection(upstream.hostname, upstream.port)
            with contextlib.closing(connection):
                connection.request(self.command, self.path, body, dict(self.headers))
                found = connection.getresponse()
                self.answer(found.status, dict(found.getheaders()), found.read())

        def answer(self, status, headers, body):
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            """Prints nothing."""

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
    buckets._open.cache_clear()
    try:
        yield requests
    finally:
        os.environ["AWS_ENDPOINT_URL"] = address
        buckets._open.cache_clear()
        server.shutdown()
        server.server_close()
        thread.join()
