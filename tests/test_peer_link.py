"""The connections of a program's processes, and the last words of one that is aborted."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys

import pytest

from sae_jax.errors import UserError
from sae_jax.train.peer_link import PeerLink, connect

TOKEN = "a token"


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def process_0(count: int):
    """Its link, and how others reach it."""
    listener = socket.create_server(("localhost", 0))
    async with PeerLink(0, count, listener, TOKEN) as link:
        yield link, {"hosts": ["localhost"], "port": listener.getsockname()[1], "token": TOKEN}


async def other(i: int, invitation: dict) -> PeerLink:
    return PeerLink(i, 3, await asyncio.to_thread(connect, i, **invitation), TOKEN)


def test_messages_go_to_and_from_process_0_and_a_closed_connection_is_noticed():
    async def talk():
        async with process_0(3) as (link, invitation):
            async with await other(1, invitation) as one, await other(2, invitation) as two:
                one.send({"beat": 1})
                one.send({"beat": 2})
                two.send({"beat": 7})
                await until(lambda: link.heard == {1: {"beat": 2}, 2: {"beat": 7}})
                link.send({"verdict": None}, but=(2,))
                await until(lambda: one.heard == {0: {"verdict": None}})
                assert not link.gone and not two.heard
            await until(lambda: link.gone == {1, 2})

    asyncio.run(talk())


def hello(process, token=TOKEN) -> bytes:
    return json.dumps({"process": process, "token": token}).encode() + b"\n"


@pytest.mark.parametrize(
    "words",
    [hello(1, "no"), hello(1, None), hello(0), hello(3), hello("1"), b"GET / HTTP/1.1\r\n", b"[]\n",
     b"\n", b"\xff\n", b"x" * 100_000],
    ids=lambda words: repr(words[:40]),
)  # fmt: skip
def test_who_does_not_present_itself_rightly_is_not_listened_to(words):
    async def talk():
        async with process_0(3) as (link, invitation):
            reader, writer = await asyncio.open_connection("localhost", invitation["port"])
            writer.write(words)
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(10):
                    assert await reader.read() == b""
            writer.close()
            async with await other(1, invitation):  # nobody has taken its place
                pass
            await until(lambda: link.gone == {1})
            assert not link.heard

    asyncio.run(talk())


def test_a_line_without_end_ends_the_connection():
    async def talk():
        async with process_0(3) as (link, invitation):
            end = await asyncio.to_thread(connect, 1, **invitation)
            with contextlib.suppress(OSError):
                await asyncio.to_thread(end.sendall, b"x" * 1_000_000)
            await until(lambda: link.gone == {1})
            end.close()

    asyncio.run(talk())


def test_process_0_that_cannot_be_reached_is_said_with_what_to_do():
    with socket.create_server(("localhost", 0)) as other_program:
        port = other_program.getsockname()[1]
    with pytest.raises(UserError, match=rf"process 2 cannot .* port {port} .*--watchdog_port=PORT"):
        connect(2, ["localhost"], port, TOKEN)


ABORTED = """
import os, sys, threading, time
from sae_jax.train.last_words import HeldAbort
abort = HeldAbort({0})
def ends():
    abort.begun.wait()
    print("last words", flush=True)
    os._exit(75)
if {1}:
    threading.Thread(target=ends, daemon=True).start()
print("begins", flush=True)
if {2}:
    os.abort()  # which lets no other thread run
time.sleep(60)
"""


@pytest.mark.parametrize(
    "last_words,watched,held,code,said",
    [
        (None, True, False, 75, "last words"),
        pytest.param("farewell", False, False, 75, "sae-jax: farewell", marks=pytest.mark.slow),
        pytest.param(None, True, True, -signal.SIGABRT, "", marks=pytest.mark.slow),
        pytest.param(None, False, False, -signal.SIGABRT, "Aborted", marks=pytest.mark.slow),
    ],
    ids=["watched", "a line set before", "no thread can run", "nobody ends it"],
)
def test_an_aborted_process_has_time_for_last_words_but_ends(last_words, watched, held, code, said):
    text = ABORTED.format(repr(last_words), watched, held)
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout.readline() == "begins\n"
    if not held:
        process.send_signal(signal.SIGABRT)
    out, _ = process.communicate(timeout=50)
    assert process.returncode == code and said in out
