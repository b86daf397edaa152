"""Leases among real processes: one owner at a time, whatever dies, sleeps or tells wrong times.

One contract for a directory and for an object store."""

import collections
import errno
import os
import pathlib
import signal
import subprocess
import sys
import time
import uuid

import gcs_server
import pytest
import s3_server

from sae_jax import paths
from sae_jax.cli import main
from sae_jax.errors import UserError
from sae_jax.sweep.leases import Leases

SECONDS = 1.0  # of a lease
ROOT = pathlib.Path(__file__).parents[1]

WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from sae_jax import paths
from sae_jax.cli import main
from sae_jax.errors import UserError
from sae_jax.sweep.leases import Leases

directory, seconds = paths.path(sys.argv[2]), float(sys.argv[3])
leases = Leases(directory, seconds)
"""

RACE = """
while not (directory / "go").exists():
    time.sleep(1e-4)
won, end = [], time.monotonic() + float(sys.argv[4])
while True:
    won += [name for name in sys.argv[5:] if name not in won and leases.claim(name)]
    if time.monotonic() > end:
        break
    time.sleep(0.05)
print(*won, flush=True)
sys.stdin.readline()
"""

HOLD = """
lease = leases.claim("work")
print("claimed" if lease else "refused", flush=True)
for line in sys.stdin:
    print("lost" if lease.lost() else "held", flush=True)
"""

HOUR_OFF = """
ahead = {offset}
real, real_ns = time.time, time.time_ns
time.time = lambda: real() + ahead
time.time_ns = lambda: real_ns() + int(ahead * 1e9)
"""


@pytest.fixture(
    params=[
        "local",
        pytest.param("s3", marks=pytest.mark.slow),
        pytest.param("gcs", marks=pytest.mark.long),
    ]
)
def directory(request, tmp_path):
    if request.param == "local":
        return tmp_path
    request.getfixturevalue(request.param)
    bucket = {"s3": s3_server, "gcs": gcs_server}[request.param].BUCKET
    return paths.path(bucket) / f"leases-{uuid.uuid4()}"


@pytest.fixture
def start(directory):
    """Starts a process with `Leases(directory, SECONDS)` and a program; ended with the test."""
    processes = []

    def begin(program: str, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-c", WORKER + program]
        process = subprocess.Popen(
            [*command, str(ROOT), str(directory), str(SECONDS), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen) -> str:
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def claim_when_free(leases: Leases, name: str = "work", patience: float = 10 * SECONDS):
    end = time.monotonic() + patience
    while (lease := leases.claim(name)) is None:
        assert time.monotonic() < end, "never became free"
        time.sleep(0.02)
    return lease


def test_racing_processes_share_out_the_work(start, directory):
    """Rounds of new names, and of names whose owners died: each gets one owner each time."""
    remote = paths.is_remote(directory)  # then the dead are known by looking on for a while
    names = [f"pass-{i}" for i in range(5 if remote else 20)]
    for wave in range(2):
        patience = 2 * SECONDS if remote and wave else 0
        racers = [start(RACE, str(patience), *names) for _ in range(4)]
        paths.write(directory / "go", "")
        won = collections.Counter(n for r in racers for n in r.stdout.readline().split())
        assert won == dict.fromkeys(names, 1), f"wave {wave}"
        for racer in racers:
            racer.kill()
            racer.wait()
        (directory / "go").unlink()
        if not remote:
            time.sleep(1.3 * SECONDS)  # until the leases of the dead have run out


def test_a_dead_owner_is_followed_after_the_lease_ran_out(start, directory):
    leases = Leases(directory, SECONDS)
    owner = start(HOLD)
    assert owner.stdout.readline() == "claimed\n"
    end = time.monotonic() + 1.5 * SECONDS
    while time.monotonic() < end:  # its heart beats
        assert leases.claim("work") is None
        time.sleep(0.1 * SECONDS)
    assert leases.holder("work").owner.endswith(f"process {owner.pid}")
    owner.kill()
    begin = time.monotonic()
    with claim_when_free(leases) as lease:
        assert time.monotonic() - begin > 0.5 * SECONDS
        assert not lease.lost()
        assert leases.holder("work").owner.endswith(f"process {os.getpid()}")


def test_an_owner_that_slept_learns_that_it_lost(start, directory):
    leases = Leases(directory, SECONDS)
    owner = start(HOLD)
    owner.stdout.readline()
    assert ask(owner) == "held"
    owner.send_signal(signal.SIGSTOP)
    with claim_when_free(leases) as lease:
        owner.send_signal(signal.SIGCONT)
        assert ask(owner) == "lost"
        time.sleep(0.5 * SECONDS)  # its heart beats again, for nobody
        assert not lease.lost()
        assert leases.claim("work") is None
    with claim_when_free(leases):
        assert ask(owner) == "lost", "a later owner is not taken for itself"


@pytest.mark.parametrize("ahead", [-3600, 3600])
def test_a_clock_that_is_an_hour_off_does_no_harm(start, directory, ahead):
    """Neither is its owner taken for dead, nor does it take the living for dead."""
    off = HOUR_OFF.format(offset=ahead) + HOLD
    leases = Leases(directory, SECONDS)
    with leases.claim("work"):
        assert start(off).stdout.readline() == "refused\n"
    owner = start(off)
    assert owner.stdout.readline() == "claimed\n"
    assert leases.claim("work") is None
    assert leases.holder("work").age < SECONDS, "at a second look"
    assert ask(owner) == "held"


def test_what_is_given_back_is_free_at_once(directory):
    leases = Leases(directory / "made" / "when needed", 3600)
    assert leases.holder("work") is None
    with leases.claim("work") as lease:
        assert leases.holder("work").alive and leases.claim("work") is None
    assert leases.holder("work") is None
    again = leases.claim("work")
    assert lease.lost()
    again.release()
    again.release()  # twice is once


def test_a_lease_is_as_long_as_its_owner_said(directory):
    """Workers of a sweep may be started with other --lease_seconds."""
    with Leases(directory, 3600).claim("long"), Leases(directory, 0.1).claim("short") as short:
        time.sleep(0.3)
        assert Leases(directory, 0.1).claim("long") is None
        assert Leases(directory, 0.1).claim("short") is None, "its heart beats"
        short._ended.set()  # its heart stops
        short._thread.join()
        time.sleep(0.3)
        assert claim_when_free(Leases(directory, 3600), "short")


def test_names_do_not_mix(directory):
    leases = Leases(directory, 3600)
    names = ["pass-1", "pass-11", "pass-1.1", "pass-1.2"]
    held = [leases.claim(name) for name in names]
    assert all(held)
    assert [leases.claim(name) for name in names] == [None] * 4
    for lease in held:
        lease.release()


def test_a_deleted_lease_is_lost(directory):
    lease = Leases(directory, 3600).claim("work")
    for path in directory.iterdir():
        path.unlink()
    assert lease.lost()
    lease.release()


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_lease_lasts_for_some_seconds(tmp_path, seconds):
    """One of NaN was never alive, so that two workers had it."""
    with pytest.raises(UserError, match="a lease lasts for some seconds"):
        Leases(tmp_path, seconds)


def test_nan_on_the_command_line(capsys):
    assert main(["sweep", "--workdir=S", "--status", "--lease_seconds=nan"]) == 2
    assert "--lease_seconds=nan: not a finite number" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"", b"soon me", b"\xff\xfe\x00", b"1e999 me", b"[" * 100])
def test_a_damaged_lease_lasts_as_long_as_ones_own(tmp_path, data):
    """Then it has run out."""
    (tmp_path / "a.1").write_bytes(data)
    leases = Leases(tmp_path, 30)
    assert leases.holder("a").alive
    assert leases.claim("a") is None
    old = time.time() - 60
    os.utime(tmp_path / "a.1", (old, old))
    with leases.claim("a") as lease:
        assert not lease.lost()


def test_what_is_no_generation_of_a_lease_is_passed_over(tmp_path):
    (tmp_path / "a.1").write_text("30 me")
    for name in ("a.tmp", "a.-1", "a.", "a.9" + "9" * 99, "a.\u0663"):
        (tmp_path / name).touch()
    assert Leases(tmp_path, 30).holder("a").owner == "me"


@pytest.mark.parametrize("name", ["a.1", "clock"])
@pytest.mark.parametrize("kind", ["folder", "dangling link", "link loop"])
def test_what_is_no_file_of_a_lease_is_named(tmp_path, name, kind):
    Leases(tmp_path, 30).claim("a").release()
    os.utime(tmp_path / "a.1", (1, 1))
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to(name if kind == "link loop" else tmp_path / "none" / "none")
    if (name, kind) == ("clock", "folder"):  # it tells the time as well
        Leases(tmp_path, 30).claim("a").release()
        return
    with pytest.raises(UserError, match=f"{tmp_path}/{name}"):
        Leases(tmp_path, 30).claim("a")


def test_who_works_on_a_sweep_is_shown_to_those_who_may_only_read_it(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    leases = Leases(tmp_path / "leases")
    with leases.claim("a"):
        monkeypatch.setattr(pathlib.Path, "touch", refuse)
        assert leases.holder("a").alive
        for decides in (lambda: leases.claim("a"), leases.living):
            with pytest.raises(UserError, match="clock: Permission denied"):
                decides()
