"""A server of OpenAI's chat protocol on this machine, whose answers a test scripts.

with judge_server.serve(lambda body: "yes") as server:
    client = Client(server.base_url, "judge", cache=tmp_path / "cache.jsonl")
"""

import collections
import contextlib
import dataclasses
import http.server
import json
import threading
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Fault:
    """A failure. status: what is answered; 0 for 200; body: with what, a dict as JSON; headers;
    hang: seconds before anything comes; close: whether nothing comes; cut: whether only the first
    half of an answer comes."""

    status: int = 0
    body: dict | bytes = b""
    headers: dict = dataclasses.field(default_factory=dict)
    hang: float = 0.0
    close: bool = False
    cut: bool = False


class Server(http.server.ThreadingHTTPServer):
    """Attributes: calls, the bodies of all requests that came; paid, how often each body was
    answered in full, by its canonical JSON; headers, those of all requests; faults, what it does
    with the next requests: a Fault, or None for an answer."""

    daemon_threads = True

    def __init__(self, answer: Callable[[dict], object], faults=()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.faults = answer, list(faults)
        self.calls, self.headers, self.paid = [], [], collections.Counter()
        self.lock, self.closing = threading.Lock(), threading.Event()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_):
        """Says nothing of clients that have gone away."""


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.calls.append(body)
            server.headers.append(dict(self.headers))
            fault = server.faults.pop(0) if server.faults else None
        answer = fault or server.answer(body)
        if self.path != "/v1/chat/completions":
            answer = Fault(404)
        fault = answer if isinstance(answer, Fault) else Fault()
        server.closing.wait(fault.hang)
        if fault.close or server.closing.is_set():
            self.close_connection = True
        elif fault.status:
            said = fault.body
            said = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send(fault.status, said, fault.headers)
        else:
            data = json.dumps(completion(body, "" if answer is fault else answer)).encode()
            self.send(200, data, fault.headers, len(data) // 2 if fault.cut else None)
            if answer is not fault:
                with server.lock:
                    server.paid[json.dumps(body, sort_keys=True)] += 1

    def send(self, status, data, headers, shown=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:shown])

    def log_message(self, *_):
        """Prints nothing."""


def completion(body: dict, answer: str | dict) -> dict:
    """Returns the body of an answer: a text, or a dict with some of content, refusal,
    finish_reason, logprobs (a list) and usage; or with choices, which is all of it."""
    if not isinstance(answer, str) and ("choices" in answer or "error" in answer):
        return answer
    given = {"content": answer} if isinstance(answer, str) else answer
    question = "".join(str(message["content"]) for message in body["messages"])
    prompt, done = len(question.split()), len(str(given.get("content")).split())
    usage = {"prompt_tokens": prompt, "completion_tokens": done, "total_tokens": prompt + done}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": given.get("content")},
        "finish_reason": given.get("finish_reason", "stop"),
        "logprobs": {"content": given["logprobs"]} if "logprobs" in given else None,
    }
    if "refusal" in given:
        choice["message"]["refusal"] = given["refusal"]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": body["model"],
        "choices": [choice],
        "usage": given.get("usage", usage),
    }


@contextlib.contextmanager
def serve(answer: Callable[[dict], "str | dict | Fault"], faults=()):
    """Yields a `Server`.

    Args:
      answer: gives the answer to a request's body: a text, a dict (see `completion`), or a Fault.
        Called from several threads.
      faults: what it does with the first requests before that, one each: a Fault, or None.
    """
    server = Server(answer, faults)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
