"""A server that speaks S3, moto's, as a process of its own, with one bucket."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

BUCKET = "s3://bucket"


@contextlib.contextmanager
def serve():
    """Yields the server's address; this process, and those it starts, find it by environment."""
    if not all(importlib.util.find_spec(name) for name in ("moto", "flask")):
        pytest.skip("needs moto[server]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    environment = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "name",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        _make_bucket(address, server)
        yield address
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _make_bucket(address: str, server: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            request(address, "/bucket", "PUT")
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < end, "the server does not start"
            time.sleep(0.05)


def request(address: str, path: str, method: str, body: bytes = b"") -> bytes:
    sent = urllib.request.Request(address + path, method=method, data=body)
    with urllib.request.urlopen(sent, timeout=10) as answer:
        return answer.read()
