"""The answers that were paid for, in a file: a line of JSON for each, on disk before it is used."""

import collections
import dataclasses
import fcntl
import json
import os
import threading
import weakref

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.json_files import checked, parse_json


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a server answered to one call.

    Attributes:
      key: the hash of all that decides the answer.
      model: the model that was asked.
      prompt: the name and version of the prompt.
      attempt: how often the question had been asked before.
      status: "ok", "cut" or "refused".
      text: what it said, cut or whole, or why it refused.
      prompt_tokens: how many tokens were paid for the question.
      completion_tokens: how many tokens were paid for the answer.
      logprobs: as the server gives them, or None.
    """

    key: str
    model: str
    prompt: str
    attempt: int
    status: str
    text: str
    prompt_tokens: int
    completion_tokens: int
    logprobs: list | None = None


class Cache:
    """A file of entries, which several clients of one process may share.

    It can be read at any time. To be written to, it is opened, which keeps other processes out
    until it is closed, or the process ends. What a process that was killed wrote of its last line
    is dropped then.
    """

    def __init__(self, path):
        """Takes the path of the file, on this machine; it need not be there."""
        self.path = paths.local(path)
        self._entries: dict[str, Entry] = {}
        self._tokens = collections.defaultdict(lambda: [0, 0])
        self._lock = threading.Lock()  # of the file and of what is in memory
        self._file, self._end, self._close = None, 0, None

    def open(self) -> None:
        """Opens it to be written to; does nothing where it is open.

        Raises UserError if another process has it, and if a line is damaged.
        """
        with self._lock:
            if self._file is not None:
                return
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror}") from None
            closing = weakref.finalize(self, os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._read()
                os.ftruncate(file, self._end)
            except BlockingIOError:
                closing()
                raise UserError(
                    f"another process asks for {self.path}; wait for it, or stop it"
                ) from None
            except UserError:
                closing()
                raise
            self._file, self._close = file, closing

    def close(self) -> None:
        """Closes it, for other processes to open; it can be opened again."""
        with self._lock:
            if self._file is not None:
                self._file = None
                self._close()

    def read(self) -> None:
        """Reads what is in the file, where it is not open. Raises UserError for a damaged line."""
        with self._lock:
            if self._file is None:
                self._read()

    def _read(self) -> None:
        try:
            data = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None
        self._end = data.rfind(b"\n") + 1
        self._entries.clear()
        self._tokens.clear()
        for number, line in enumerate(data[: self._end].split(b"\n")[:-1], 1):
            where = f"line {number} of {self.path}"
            try:
                self._keep(checked(parse_json(line, where), Entry, where))
            except UserError as error:
                raise UserError(f"{error}; take that line out, and it is asked again") from None

    def _keep(self, entry: Entry) -> None:
        self._entries[entry.key] = entry
        self._tokens[entry.model][0] += entry.prompt_tokens
        self._tokens[entry.model][1] += entry.completion_tokens

    def get(self, key: str) -> Entry | None:
        """Returns the entry of a key, or None."""
        return self._entries.get(key)

    def tokens(self, model: str) -> tuple[int, int]:
        """Returns how many tokens a model was sent, and gave back, for all entries."""
        with self._lock:
            sent, got = self._tokens[model]
            return sent, got

    def add(self, entry: Entry) -> None:
        """Keeps an entry; it is on disk when this returns. Raises UserError if it cannot be."""
        fields = dataclasses.asdict(entry)
        line = json.dumps(fields, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                written = os.write(self._file, line)
                if written < len(line):
                    os.write(self._file, line[written:])  # says why it cannot
                os.fsync(self._file)
            except OSError as error:
                os.ftruncate(self._file, self._end)
                raise UserError(f"cannot write {self.path}: {error.strerror}") from None
            self._end += len(line)
            self._keep(entry)
