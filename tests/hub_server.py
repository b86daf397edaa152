"""A small server that speaks the Hugging Face hub's protocol, as much of it as we use.

Repositories are in memory: models with revisions, private ones, gated ones. What was asked for is
kept in `requests`, so that a test can say what was downloaded. Files of tensors are given by
another host, as the hub does, with ranges; a transfer can be cut.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import importlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator

import pytest

TOKEN = "hf_right"
_BIG = (".safetensors", ".npz", ".pt", ".bin")  # given by the other host


@dataclasses.dataclass
class Repo:
    files: dict[str, bytes]  # of main
    private: bool = False
    gated: bool = False
    revisions: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)

    def commit(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit."""
        commits = {name: _digest(files) for name, files in self.all().items()}
        return revision if revision in commits.values() else commits.get(revision)

    def at(self, commit: str) -> dict[str, bytes]:
        return next(files for files in self.all().values() if _digest(files) == commit)

    def all(self) -> dict[str, dict[str, bytes]]:
        return {"main": self.files, **self.revisions}


def _digest(files: dict[str, bytes]) -> str:
    content = [(path, hashlib.sha1(data).hexdigest()) for path, data in files.items()]
    return hashlib.sha1(repr(content).encode()).hexdigest()


def files_of(folder, below: str = "") -> dict[str, bytes]:
    """{path in the repository: content} of a local folder's files."""
    return {
        f"{below}/{path.relative_to(folder)}".lstrip("/"): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Hub(http.server.ThreadingHTTPServer):
    """repos: by name. cut: {file: bytes after which every transfer of it breaks off}. broken: each
    request is answered 503. uploads: {path of the request: body}."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://localhost:{self.server_port}"
        self.other_host = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # (method, path, Range)
        self.cut: dict[str, int] = {}
        self.broken = False
        self.uploads: dict[str, bytes] = {}

    def sent(self) -> list[str]:
        """The files whose content was asked for since the last call, in order of their names."""
        gets = [path for method, path, _ in self.requests if method == "GET"]
        self.requests.clear()
        pattern = r"/(?:other/)?[^/]+/[^/]+/(?:resolve/)?[0-9a-f]{40}/(.*)"
        found = (re.fullmatch(pattern, path) for path in gets)
        return sorted({match[1] for match in found if match})


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def use(server: Hub, monkeypatch, cache) -> None:
    """Has huggingface_hub in this process, which read its environment when it was imported, talk to
    `server`, without a token, and keep its cache in `cache`."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    constants = importlib.import_module("huggingface_hub.constants")
    importlib.import_module("huggingface_hub.file_download")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, huggingface_hub.file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no_token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.uploads[self.path] = body
        url = f"{self.server.url}/me/sae"
        if self.path == "/api/repos/create":
            answer = {"url": url}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif self.path == "/api/models/me/sae/preupload/main":
            files = [file["path"] for file in json.loads(body)["files"]]
            fields = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": path, **fields} for path in files]}
        elif self.path == "/api/models/me/sae/commit/main":
            answer = {"commitUrl": f"{url}/commit/0", "commitOid": "0"}
        else:
            return self._refuse(404, "EntryNotFound")
        self._answer(answer)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.urlparse(self.path).path
        self.server.requests.append((self.command, path, self.headers["Range"]))
        if self.server.broken:
            return self._refuse(503, "")
        if found := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|refs)(?:/(.*))?)?", path
        ):
            return self._api(*found.groups())
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            return self._resolve(*found.groups())
        if found := re.fullmatch(r"/other/([^/]+/[^/]+)/([^/]+)/(.*)", path):
            repo, commit, file = found.groups()
            return self._send(file, self.server.repos[repo].at(commit)[file])
        self._refuse(404, "EntryNotFound")

    def _api(self, name, what, rest):
        if not (repo := self._repo(name)):
            return
        if what == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": repo.commit(name)}
                for name in repo.all()
            ]
            return self._answer({"branches": branches, "tags": [], "converts": []})
        revision = urllib.parse.unquote((rest or "main").partition("/")[0])
        if not (commit := repo.commit(revision)):
            return self._refuse(404, "RevisionNotFound")
        files = repo.at(commit)
        if what == "tree":
            return self._answer(
                [
                    {"type": "file", "path": path, "oid": _etag(data), "size": len(data)}
                    for path, data in files.items()
                ]
            )
        siblings = [{"rfilename": path} for path in files]
        self._answer({"id": name, "sha": commit, "siblings": siblings, "private": repo.private})

    def _resolve(self, name, revision, file):
        if not (repo := self._repo(name)):
            return
        if not (commit := repo.commit(urllib.parse.unquote(revision))):
            return self._refuse(404, "RevisionNotFound")
        if repo.gated:
            return self._refuse(403 if self.headers["Authorization"] else 401, "GatedRepo")
        file = urllib.parse.unquote(file)
        data = repo.at(commit).get(file)
        if data is None:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit}
        if not file.endswith(_BIG):
            return self._send(file, data, headers)
        headers |= {"X-Linked-Size": len(data), "X-Linked-Etag": f'"{_etag(data)}"'}
        where = f"{self.server.other_host}/other/{name}/{commit}/{urllib.parse.quote(file)}"
        self._head(302, headers | {"Location": where, "Content-Length": 0})

    def _repo(self, name: str) -> Repo | None:
        """Answers for one that is not there, or that the request may not see."""
        repo, token = self.server.repos.get(name), self.headers["Authorization"]
        if repo is None or repo.private and token != f"Bearer {TOKEN}":
            self._refuse(404 if token else 401, "RepoNotFound")
            return None
        return repo

    def _send(self, file: str, data: bytes, headers: dict | None = None) -> None:
        start = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            start = int(wanted[1])
        headers = {"Content-Length": len(data) - start, "Accept-Ranges": "bytes"} | (headers or {})
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._head(206 if start else 200, headers)
        if self.command == "GET":
            end = self.server.cut.get(file, len(data))
            self.wfile.write(data[start:end])

    def _answer(self, values) -> None:
        body = json.dumps(values).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": len(body)})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, headers: dict | None = None) -> None:
        self._head(status, {"X-Error-Code": code, "Content-Length": 0} | (headers or {}))

    def _head(self, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *arguments):
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
