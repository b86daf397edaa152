"""Processes that meet before JAX joins them: who is missing or there twice, whose port it is."""

import concurrent.futures
import socket
import time

import pytest

from sae_jax.errors import UserError
from sae_jax.train import meeting


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def all_ends(*processes: tuple[int, int], port: int | None = None, seconds: float = 5) -> list:
    """What `meet` raises in each of the processes, given as (number, count); None if nothing."""
    address = f"localhost:{port or free_port()}"

    def end(process):
        try:
            meeting.meet(address, process[1], process[0], seconds)
        except (UserError, meeting.MissingError) as error:
            return error
        return None

    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(end, processes))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(meeting, "_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(meeting, "_PORT_SECONDS", 0.1)
    monkeypatch.setattr(meeting, "_TELL_SECONDS", 0.5)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 2, 0)])
def test_all_come(order):
    assert all_ends(*((i, 4) for i in order)) == [None] * 4


def test_one_is_alone():
    assert all_ends((0, 1)) == [None]


def test_some_are_missing():
    begun = time.monotonic()
    ends = all_ends((0, 5), (1, 5), (3, 5), seconds=0.5)
    assert time.monotonic() - begun < 3
    for end in ends:
        assert isinstance(end, meeting.MissingError)
        assert str(end).startswith("process 2, 4 of 5 did not come within 0 s (--start_seconds)")


def test_process_0_is_missing():
    (end,) = all_ends((1, 2), seconds=0.3)
    assert isinstance(end, meeting.MissingError)
    assert "process 1 cannot reach process 0 at localhost:" in str(end)


@pytest.mark.parametrize(
    "others,words",
    [
        ([(1, 3), (1, 3)], "two processes have --process_id=1; give each of the 3 its own"),
        ([(1, 3), (1, 2)], "process 1 has --num_processes=2"),
        ([(1, 3), (3, 3)], "process_id=3"),
        ([(1, 3), (5, 6)], "process 5 has --num_processes=6, but process 0 has 3"),
    ],
)
def test_numbers_that_do_not_fit(others, words):
    """All who are there hear of it, and nobody waits."""
    begun = time.monotonic()
    ends = all_ends((0, 3), *others, seconds=20)
    assert time.monotonic() - begun < 15
    assert all(isinstance(end, UserError) for end in ends), ends
    assert all(words in str(end) for end in ends)


@pytest.mark.parametrize(
    "coordinator,process,words",
    [
        ("localhost", 0, "must be HOST:PORT"),
        ("localhost:http", 0, "must be HOST:PORT"),
        (":8080", 0, "must be HOST:PORT"),
        ("localhost:99999", 0, "must be HOST:PORT"),
        ("localhost:8080", 4, "--process_id=4 is not one of the 4"),
        ("localhost:8080", -1, "--process_id=-1"),
    ],
)
def test_what_cannot_be_meant(coordinator, process, words):
    with pytest.raises(UserError, match=words):
        meeting.meet(coordinator, 4, process, 1)


def test_a_port_that_is_taken():
    """By a program that does not answer, or answers something else."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        first, second = all_ends((0, 2), (1, 2), port=port, seconds=0.5)
    assert isinstance(first, UserError)
    assert f"cannot listen on port {port} of --coordinator" in str(first)
    assert isinstance(second, meeting.MissingError)


def test_what_knocks_at_the_port_besides():
    """A scanner, one who hangs up, and one who goes and comes again; then all are there."""
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(meeting.meet, f"localhost:{port}", 3, 0, 10)
        for hello in (b"GET / HTTP/1.1\r\n\r\n", b"", b"[]\n", b'{"process": "x"}\n',
                      b'{"process": 1, "count": 3}\n'):  # fmt: skip
            while True:
                try:
                    with socket.create_connection(("localhost", port)) as connection:
                        connection.sendall(hello)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
        assert all_ends((1, 3), (2, 3), port=port) == [None, None]
        first.result()
