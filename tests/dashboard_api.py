"""A server of a dashboard's folder with an API of planted answers, for tests of its page.

A token is a word. Latent 3 fires on "bridge", latent 4 on "fog", latent 5 on every word; holding a
latent makes the continuation say so.
"""

import contextlib
import functools
import http.server
import json
import threading

FIRES = {3: "bridge", 4: "fog"}


def value(latent: int, word: str) -> float:
    """What a latent is on a word."""
    return 0.5 if latent == 5 else 8.0 * (FIRES[latent] in word.lower())


def cut(text: str) -> list[str]:
    words = text.split(" ")
    return [words[0], *(f" {word}" for word in words[1:])]


def encode(asked: dict) -> dict:
    texts, negatives = ([cut(text) for text in asked[key]] for key in ("texts", "negatives"))
    found = []
    for latent in (3, 4, 5):
        values = [[value(latent, piece) for piece in pieces] for pieces in texts]
        in_none = not any(value(latent, piece) for pieces in negatives for piece in pieces)
        if in_none and all(any(own) for own in values):
            highest = max(map(max, values))
            found.append(
                {"index": latent, "score": highest, "max": highest, "label": None, "values": values}
            )

    def shown(pieces):
        tokens = [[[n, v] for n in (3, 4, 5) if (v := value(n, piece))] for piece in pieces]
        return {"pieces": pieces, "stops": list(range(1, len(pieces) + 1)), "tokens": tokens}

    found.sort(key=lambda one: -one["score"])
    return {"texts": [*map(shown, texts)], "negatives": [*map(shown, negatives)], "latents": found}


def generate(asked: dict) -> dict:
    held = "".join(f" {c['latent']}x{c['factor']}" for c in asked["clamps"])
    return {"clean": " and so on", "steered": f" and so on{held}"}


def ablate(asked: dict) -> dict:
    length = asked["stop"] - asked["start"]
    return {"effects": [0.0, -1.5, 0.4, *[0.0] * (length - 3)]}


def search(asked: dict) -> dict:
    return {"latents": [7] if "river" in asked["query"] else []}


ANSWERS = {"encode": encode, "generate": generate, "ablate": ablate, "search": search}


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Content-Type"] == "application/json"
        what = self.path.rsplit("/", 1)[1]
        status, answer = 200, None
        if asked.get("prompt") == "":
            status, answer = 400, {"error": "the prompt is empty; type some text"}
        data = json.dumps(answer or ANSWERS[what](asked)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        """Prints nothing."""


@contextlib.contextmanager
def serve(directory):
    """Serves a directory and the API; the address is without a slash at the end."""
    handler = functools.partial(Handler, directory=directory)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
