"""Where the processes of a program meet before `jax.distributed` joins them.

JAX aborts a process whose peers do not come, dies of a port that is taken, and lets the others wait
where two processes have one number. So process 0 listens on the coordinator's port first, until
all have said who they are. It tells every one of them what is wrong. Then it leaves the port to
JAX. A line of JSON goes each way, and nothing else is believed.
"""

import contextlib
import json
import selectors
import socket
import time

from sae_jax.errors import UserError, some

_LINE_BYTES = 4096
_PORT_SECONDS = 10.0  # for a process that has just ended to leave the port
_TELL_SECONDS = 5.0  # for a mistake to be told to processes that come later
_RETRY_SECONDS = 0.3


class MissingError(Exception):
    """Not all processes of a program came in time. Starting them again may help."""


def meet(coordinator: str, count: int, me: int, seconds: float) -> None:
    """Returns when all processes of the program have come, each with a number of its own.

    Args:
      coordinator: HOST:PORT of process 0.
      count: how many processes there are.
      me: the number of this one.
      seconds: how long to wait for the others.

    Raises UserError, in all processes that have come, if their numbers do not fit together, and in
    process 0 if it cannot have the port; MissingError after `seconds`.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator is {coordinator!r}; it must be HOST:PORT of process 0")
    deadline = time.monotonic() + seconds
    if not 0 <= me < count:
        with contextlib.suppress(UserError, MissingError):  # so that the others need not wait
            _report(host.strip("[]"), int(port), count, me, deadline - seconds + _TELL_SECONDS, 0)
        raise UserError(
            f"--process_id={me} is not one of the {count} processes (--num_processes), which count "
            "from 0"
        )
    if me == 0:
        with _listener(int(port), deadline) as listener, contextlib.closing(_Host(count)) as there:
            there.await_all(listener, deadline, seconds)
    else:
        _report(host.strip("[]"), int(port), count, me, deadline, seconds)


class _Host:
    """What process 0 knows of those that have come."""

    def __init__(self, count: int):
        self._count = count
        self._came: dict[int, socket.socket] = {}  # by number
        self._selector = selectors.DefaultSelector()

    def close(self) -> None:
        for connection in self._came.values():
            connection.close()
        self._selector.close()

    def await_all(self, listener: socket.socket, deadline: float, seconds: float) -> None:
        """Answers connections until all processes have come."""
        self._selector.register(listener, selectors.EVENT_READ)
        try:
            while not self._are_all_there():
                left = deadline - time.monotonic()
                ready = self._selector.select(left) if left > 0 else []
                if not ready and left <= 0:
                    raise MissingError(self._missing(seconds))
                for key, _ in ready:
                    if key.fileobj is listener:
                        self._welcome(listener.accept()[0])
                    else:
                        self._forget_the_gone()
        except (UserError, MissingError) as error:
            answer = {"error": str(error), "missing": isinstance(error, MissingError)}
            self._tell(answer)
            if isinstance(error, UserError):
                _tell_latecomers(listener, answer, self._count - 1 - len(self._came))
            raise
        self._tell({})

    def _welcome(self, connection: socket.socket) -> None:
        connection.settimeout(_TELL_SECONDS)
        hello = _read_line(connection) or {}
        i, count = hello.get("process"), hello.get("count")
        if not isinstance(i, int) or not isinstance(count, int):
            connection.close()  # something else that looks who is there
            return
        self._forget_the_gone()
        problem = None
        if count != self._count:
            problem = (
                f"process {i} has --num_processes={count}, but process 0 has {self._count}; start "
                "all with the same"
            )
        elif i in self._came or not 0 < i < self._count:
            what = "two processes have" if i in (0, *self._came) else "a process has"
            problem = f"{what} --process_id={i}; give each of the {self._count} its own, from 0"
        if problem:
            with contextlib.suppress(OSError), connection:
                connection.sendall(_line({"error": problem}))
            raise UserError(problem)
        self._came[i] = connection
        self._selector.register(connection, selectors.EVENT_READ)

    def _are_all_there(self) -> bool:
        if len(self._came) == self._count - 1:
            self._forget_the_gone()
        return len(self._came) == self._count - 1

    def _forget_the_gone(self) -> None:
        for connection in [other for other in self._came.values() if _has_hung_up(other)]:
            self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        """Forgets a process that has gone before all had come. It may come again."""
        self._selector.unregister(connection)
        connection.close()
        self._came = {i: other for i, other in self._came.items() if other is not connection}

    def _missing(self, seconds: float) -> str:
        missing = [str(i) for i in range(1, self._count) if i not in self._came]
        return (
            f"process {some(missing)} of {self._count} did not come within {seconds:.0f} s "
            "(--start_seconds); start all processes of the program"
        )

    def _tell(self, answer: dict) -> None:
        """Answers all that have come, and waits until they have hung up, which frees the port."""
        for connection in self._came.values():
            with contextlib.suppress(OSError):
                connection.sendall(_line(answer))
                connection.recv(1)


def _tell_latecomers(listener: socket.socket, answer: dict, count: int) -> None:
    """Answers up to `count` processes that come soon after, so that they need not wait in vain."""
    deadline = time.monotonic() + _TELL_SECONDS
    while count > 0 and (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(left)
                connection.sendall(_line(answer))
                connection.recv(_LINE_BYTES)
            count -= 1


def _listener(port: int, deadline: float) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    last = min(deadline, time.monotonic() + _PORT_SECONDS)
    while True:
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=both)
        except OSError as error:
            if time.monotonic() > last:
                raise UserError(
                    f"process 0 cannot listen on port {port} of --coordinator "
                    f"({error.strerror}); choose another that is free"
                ) from None
        time.sleep(_RETRY_SECONDS)


def _report(host: str, port: int, count: int, me: int, deadline: float, seconds: float) -> None:
    """Tells process 0 that this one has come, and waits for its answer."""
    problem = "it does not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 5.0)) as connection:
                connection.sendall(_line({"process": me, "count": count}))
                connection.settimeout(left + _TELL_SECONDS)  # process 0 may have begun later
                answer = _read_line(connection)
        except OSError as error:
            problem, answer = error.strerror or str(error), None
        if answer is not None:
            if answer.get("missing"):
                raise MissingError(answer["error"])
            if "error" in answer:
                raise UserError(f"process 0 says: {answer['error']}")
            return
        time.sleep(_RETRY_SECONDS)
    raise MissingError(
        f"process {me} cannot reach process 0 at {host}:{port} within {seconds:.0f} s "
        f"(--start_seconds): {problem}; is it started, and is --coordinator right?"
    )


def _has_hung_up(connection: socket.socket) -> bool:
    """Whether the other side, which has nothing more to say, has closed a connection."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(_TELL_SECONDS)


def _read_line(connection: socket.socket) -> dict | None:
    """Returns the JSON object in the line that comes, or None if something else does."""
    text = b""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        while not text.endswith(b"\n") and len(text) < _LINE_BYTES:
            part = connection.recv(_LINE_BYTES)
            if not part:
                break
            text += part
        values = json.loads(text)
        if isinstance(values, dict):
            return values
    return None


def _line(values: dict) -> bytes:
    return json.dumps(values).encode() + b"\n"
