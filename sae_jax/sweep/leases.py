"""Leases: which worker does which piece of work, agreed on by nothing but a shared directory.

    LEASES/NAME.GENERATION   one claim of NAME: whose, and for how many seconds without a heartbeat

A worker claims NAME by creating the file of its next generation exclusively, which one worker alone
can. The owner touches its file: that is the heartbeat. Whoever finds the newest generation
untouched for longer than it says may create the next one, and so takes the work over. No file is
ever renamed or removed, so that no two workers can mistake each other's files.

A host whose clock is wrong neither loses its leases nor takes those of others. In a directory every
time is the file system's own (lease_files.py). In an object store a lease is as old as the time for
which it has looked the same, on the reader's monotonic clock.

An owner that was thought dead (stopped, cut off) and wakes up sees a newer generation, because it
asks `Lease.lost` before it writes. Between the answer and the write there is a moment in which the
lease can be lost. So writes must be atomic, and the same whoever makes them.
"""

import contextlib
import dataclasses
import math
import os
import re
import socket
import threading
from collections.abc import Iterable

from absl import logging

from sae_jax import background
from sae_jax.errors import UserError
from sae_jax.paths import AnyPath, ObjectPath
from sae_jax.sweep.lease_files import Claim, LocalFiles, ObjectFiles
from sae_jax.train.watching import at_once

_RELEASE_SECONDS = 30  # after which work is not given back, and its lease runs out


class LeaseLostError(Exception):
    """Tells that another worker has taken the work over, so that this one must not write any
    more.
    """


@dataclasses.dataclass(frozen=True)
class Holder:
    """The worker that claimed a piece of work last.

    Attributes:
      owner: its host and process.
      age: seconds since its last heartbeat; None at the first look into an object store, which
        cannot tell.
      alive: whether its lease has not run out, as far as that can be told.
      told: the age by the clocks of both hosts, where `age` is not known, or is only since the
        first look; None elsewhere.
      lasts: the seconds after its last heartbeat in which its lease runs out.
      silent: whether it seems dead: it is not alive, or would not be if those clocks are right.
        That is for people to read, and no reason to take its work over.
    """

    owner: str
    age: float | None
    alive: bool
    lasts: float
    told: float | None = None
    silent: bool = False

    @property
    def heard_of(self) -> str:
        """Says in words when the last heartbeat was."""
        if self.told is not None and (self.age is None or self.told > self.age):
            return f"heard of {self.told:.0f} s ago by its clock"
        if self.age is None:
            return "alive or dead, which one look at an object store cannot tell"
        return f"heard of {self.age:.0f} s ago"


class Leases:
    """The leases in one directory."""

    def __init__(self, directory: AnyPath, seconds: float = 60):
        """Opens the leases in `directory`.

        Those claimed here run out after `seconds` without a heartbeat. Raises UserError unless
        that is a number above 0.
        """
        if not 0 < seconds < math.inf:
            raise UserError(f"a lease lasts for some seconds, above 0, not {seconds}")
        kind = ObjectFiles if isinstance(directory, ObjectPath) else LocalFiles
        self._files = kind(directory)
        self._seconds = seconds

    def claim(self, name: str) -> "Lease | None":
        """Returns the lease of `name`, whose heartbeat has begun; None if another worker has it."""
        generation = _newest(name, self._files.names())
        before = self._holder(name, generation) if generation else None
        if before and before.alive:
            return None
        owner = f"{socket.gethostname()} process {os.getpid()}"
        claim = self._files.create(f"{name}.{generation + 1}", f"{self._seconds} {owner}")
        if claim is None:  # another worker was faster
            return None
        if before:
            logging.info("took over %s from %s, %s", name, before.owner, before.heard_of)
        return Lease(self._files, claim, f"{name}.{generation + 2}", self._seconds / 6)

    def holder(self, name: str) -> Holder | None:
        """Returns who holds `name`; None where nobody has claimed it, or its last owner gave it
        back.
        """
        return self.holders([name])[name]

    def holders(self, names: Iterable[str]) -> dict[str, Holder | None]:
        """Returns `holder` of each name, after one listing of the files, for people to read: of
        leases that may not be written to it is by this host's clock."""
        files = self._files.names()
        newest = {name: _newest(name, files) for name in names}
        held = [name for name in newest if newest[name]]
        found = at_once(lambda name: self._holder(name, newest[name], to_show=True), held)
        return dict.fromkeys(newest) | dict(zip(held, found, strict=True))

    def living(self) -> list[Holder]:
        """Returns who holds something, of all names, and may be alive."""
        files = self._files.names()
        names = {entry.rpartition(".")[0] for entry in files} - {""}
        newest = {name: _newest(name, files) for name in sorted(names)}
        holders = [self._holder(name, number) for name, number in newest.items() if number]
        return [holder for holder in holders if holder is not None and holder.alive]

    def _holder(self, name: str, generation: int, to_show: bool = False) -> Holder | None:
        looked = self._files.look(f"{name}.{generation}", to_show)
        if looked is None:
            return None
        seconds, _, owner = looked.text.partition(" ")
        lasts = self._seconds  # where it is empty, in the moment in which it is made, or damaged
        with contextlib.suppress(ValueError):
            if 0 < float(seconds) < math.inf:
                lasts = float(seconds)
        age, told = looked.age, looked.told
        alive = not (age or 0) > lasts
        silent = not alive or (told or 0) > lasts
        return Holder(owner or "?", age, alive, lasts, told, silent)


class Lease:
    """A claim, which lasts until `release` or the end of the `with`.

    A thread touches its file meanwhile.
    """

    def __init__(self, files: LocalFiles | ObjectFiles, claim: Claim, next: str, interval: float):
        self._files = files
        self._claim = claim
        self._next = next
        self._interval = interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sae-jax-lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def lost(self) -> bool:
        """Whether another worker has taken over, or the lease was deleted."""
        names = self._files.names()
        return self._next in names or self._claim.name not in names

    def release(self) -> None:
        """Gives the work back, so that whoever comes next need not wait for the lease to run
        out. Where the store is away it is left to do so.
        """
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(_RELEASE_SECONDS)
        if self._thread.is_alive():
            return
        # Where it was deleted there is nothing to give back.
        with contextlib.suppress(OSError, UserError):
            background.start(self._claim.release).result(_RELEASE_SECONDS)

    def _beat(self) -> None:
        """Touches the file again and again until the lease ends."""
        while not self._ended.wait(self._interval):
            try:
                self._claim.beat()
            except (OSError, UserError) as error:  # away for a moment; `lost` will tell
                logging.warning("no heartbeat of %s, trying again: %s", self._claim.name, error)


def _newest(name: str, files: Iterable[str]) -> int:
    """Returns the newest generation of `name`, counted from 1; 0 where there is none."""
    parts = [file.rpartition(".") for file in files]
    numbers = (number for before, _, number in parts if before == name)
    return max((int(n) for n in numbers if re.fullmatch("[0-9]{1,18}", n)), default=0)
